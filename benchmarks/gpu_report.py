"""The tables that `benchmarks/gpu.py` makes from its results."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import table

Pieces = dict[str, Any]


def page(found: dict[str, Any]) -> str:
    """All that is known so far."""
    pieces: Pieces = found["pieces"]
    about = ", ".join(f"{key} {value}" for key, value in found["about"].items() if key != "peers" and value)
    peers = ", ".join(f"{name} {version}" for name, version in found["about"]["peers"].items()) or "none"
    parts = [f"{about}. Other packages: {peers}.", *checks(pieces)]
    if "copy" in pieces:
        parts.append(f"A copy from device to device moves {pieces['copy']['bytes_per_second'] / 1e12:.2f} TB/s.")
    parts += goals(pieces)
    parts += [race(name, piece, pieces) for name, piece in pieces.items() if name.startswith("race/")]
    parts += first_steps(pieces)
    return "\n\n".join(parts)


def checks(pieces: Pieces) -> list[str]:
    """What was checked, and what failed."""
    found = {name.removeprefix("checks/"): piece for name, piece in pieces.items() if name.startswith("checks/")}
    lines = []
    if found:
        served = {name: piece for name, piece in found.items() if "cases" in piece}
        failed = [f"{case}: {'; '.join(said)}" for piece in served.values() for case, said in piece["failed"].items()]
        count = sum(piece["cases"] for piece in served.values())
        lines.append(f"Kernels against the reference: {count} cases of {len(served)} optimizers, {len(failed)} failed.")
        lines += [f"- {line}" for line in failed]
    for name, what in (
        ("host waits", "Steps that make the host wait"),
        ("graphs", "Steps that a CUDA graph replays wrongly"),
    ):
        if name in pieces:
            steps = pieces[name].get("steps")
            bad = [f"{step} ({said})" for step, said in (steps or {}).items() if said]
            told = pieces[name].get("skipped") or ", ".join(bad) or "none"
            lines.append(f"{what}: {told}" + (f" of {len(steps)}." if steps is not None else "."))
    return lines


def race(name: str, piece: Pieces, pieces: Pieces) -> str:
    """The table of one race."""
    _, which, optimizer, dtype = name.split("/")
    peak = pieces.get("copy", {}).get("bytes_per_second")
    rows = []
    for label, row in sorted(piece["rows"].items(), key=lambda item: item[1].get("ms", 1e9)):
        if "failed" in row:
            rows.append([label, f"failed: {row['failed'].splitlines()[0][:100]}", *[""] * 7])
            continue
        speed = row["must_move_bytes"] / (1e-3 * row["ms"])
        starts = row["launches"]
        rows.append(
            [
                label,
                f"{row['ms']:.3f} ({row['ms_10']:.3f} to {row['ms_90']:.3f})",
                f"{row['times_base']:.2f}" if "times_base" in row else "",
                f"{row['host_ms']:.3f}",
                f"{speed / 1e9:.0f}" + (f" ({100 * speed / peak:.0f} %)" if peak else ""),
                f"{row['state_bytes'] / piece['parameters']:.2f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
                "" if starts is None else f"{starts['kernels']} + {starts['copies']}",
                f"{row['first_step_s']:.2f}",
            ]
        )
    head = [
        *["", "ms (10 % to 90 %)", f"times {piece['base']}", "host ms", "GB/s (of a copy)"],
        *["state, bytes per parameter", "peak in a step, MiB", "launches + copies", "first step, s"],
    ]
    absent = "".join(f"\n\n{label}: {why}." for label, why in piece["absent"].items())
    return f"### {optimizer}, {which}, {dtype}\n\n{table(head, rows)}{absent}"


def first_steps(pieces: Pieces) -> list[str]:
    """The table of first steps."""
    if "first steps" not in pieces:
        return []
    rows = []
    for label, both in pieces["first steps"].items():
        cells = [f"{b['first']:.2f}" if isinstance(b, dict) else "failed" for b in (both["cold"], both["warm"])]
        warm = both["warm"]
        rows.append([label, *cells, f"{1e3 * warm['third']:.1f}" if isinstance(warm, dict) else ""])
    head = ["AdamW", "first step, nothing compiled, s", "kernels on disk, s", "third step, ms"]
    return [f"### The first step of a process\n\n{table(head, rows)}"]


def goals(pieces: Pieces) -> list[str]:
    """What was aimed at, and what came of it."""
    rows = []

    def ms(which: str, optimizer: str, *labels: str) -> float | None:
        found = pieces.get(f"race/{which}/{optimizer}/float32", {}).get("rows", {})
        times = [found[label]["ms"] for label in labels if "ms" in found.get(label, {})]
        return min(times) if len(times) == len(labels) else None

    def ratio(goal: str, limit: float, a: float | None, b: float | None) -> None:
        if a is not None and b is not None:
            rows.append([goal, f"{a / b:.2f}", "yes" if a / b <= limit else "no"])

    for which in ("GPT-2 124M", "1B decoder"):
        fused = ms(which, "adamw", "torch AdamW fused")
        ratio(
            f"{which}: AdamW at 32 bits at most 1.0 of torch's fused time",
            1.0,
            ms(which, "adamw", "ours, 32 bits"),
            fused,
        )
        few = ms(which, "adamw", "ours, 8 bits, log")
        ratio(f"{which}: AdamW at 8 bits at most 0.65 of torch's fused time", 0.65, few, fused)
        ratio(f"{which}: and at most 0.8 of bitsandbytes", 0.8, few, ms(which, "adamw", "bitsandbytes AdamW8bit"))
        rows += _bandwidths(which, pieces)
    small = "10,000 small"
    each = ms(small, "adamw", "torch AdamW fused, a call per tensor")
    ratio(f"{small}: at most 0.2 of a launch per tensor", 0.2, ms(small, "adamw", "ours, 32 bits"), each)
    return [f"### Goals\n\n{table(['goal', 'measured', 'met'], rows)}"] if rows else []


def _bandwidths(which: str, pieces: Pieces) -> list[list[str]]:
    """Of the bandwidth of a copy, at least 85 % for AdamW at 32 bits and 80 % for every other elementwise one."""
    if "copy" not in pieces:
        return []
    rows = []
    for optimizer in ("adamw", "adan", "lion", "radam"):
        found = pieces.get(f"race/{which}/{optimizer}/float32", {}).get("rows", {})
        for label in ("ours, 32 bits", "ours, 8 bits, log", "ours, 8 bits, dynamic"):
            if "ms" not in found.get(label, {}):
                continue
            goal = 0.85 if optimizer == "adamw" and label == "ours, 32 bits" else 0.80
            speed = found[label]["must_move_bytes"] / (1e-3 * found[label]["ms"])
            share = speed / pieces["copy"]["bytes_per_second"]
            said = f"{which}: {optimizer}, {label.removeprefix('ours, ')}, at least {goal:.0%} of a copy's bandwidth"
            rows.append([said, f"{share:.0%}", "yes" if share >= goal else "no"])
    return rows
