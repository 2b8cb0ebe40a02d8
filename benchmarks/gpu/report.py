"""The tables that are made from the results."""

from __future__ import annotations

from typing import Any

from benchmarks.pages import table

Pieces = dict[str, Any]


def page(everything: dict[str, Any]) -> str:
    """All that is known so far, device by device."""
    return "\n\n".join(_of_device(found) for found in everything.values()) or "Unmeasured."


def _of_device(found: dict[str, Any]) -> str:
    pieces: Pieces = found["pieces"]
    about = dict(found["about"])
    peers = ", ".join(f"{name} {version}" for name, version in about.pop("peers").items()) or "none"
    device = about.pop("device")
    commits = ", ".join(dict.fromkeys(piece.get("commit", "unknown") for piece in pieces.values()))
    versions = ", ".join(f"{key} {value}" for key, value in about.items() if value)
    parts = [f"## {device}", f"{versions}. Other packages: {peers}. Code of the commits {commits}."]
    if "copy" in pieces:
        parts.append(f"A copy from device to device moves {pieces['copy']['bytes_per_second'] / 1e12:.2f} TB/s.")
    parts += [*checks(pieces), *steps(pieces), *programs(pieces)]
    if found["failed"]:
        parts.append("Without a result: " + "; ".join(f"{name} ({why})" for name, why in found["failed"].items()) + ".")
    parts += goals(pieces)
    parts += [race(name, piece, pieces) for name, piece in pieces.items() if name.startswith("race/")]
    return "\n\n".join([*parts, *replays(pieces), *counters(pieces), *first_steps(pieces)])


def of_kind(pieces: Pieces, kind: str) -> Pieces:
    """The pieces of a kind, by the rest of their names."""
    return {name.removeprefix(f"{kind}/"): piece for name, piece in pieces.items() if name.startswith(f"{kind}/")}


def checks(pieces: Pieces) -> list[str]:
    """What was checked, and what failed."""
    served = {name: piece for name, piece in of_kind(pieces, "checks").items() if "cases" in piece}
    if not served:
        return []
    failed = [f"{case}: {'; '.join(said)}" for piece in served.values() for case, said in piece["failed"].items()]
    count = sum(piece["cases"] for piece in served.values())
    said = f"Kernels against the reference: {count} cases of {len(served)} optimizers, {len(failed)} failed."
    return ["\n".join([said, *(f"- {line[:400]}" for line in failed)])]


def steps(pieces: Pieces) -> list[str]:
    """Which steps make the host wait, and which a graph replays otherwise."""
    found = [piece for piece in of_kind(pieces, "steps").values() if "waits" in piece]
    lines = []
    for key, what in (
        ("waits", "Steps that make the host wait"),
        ("replays", "Steps that a CUDA graph replays wrongly"),
    ):
        every = {step: said for piece in found for step, said in piece[key].items()}
        refused = [step for step, said in every.items() if said.startswith("refused")]
        bad = [f"{step} ({said[:200]})" for step, said in every.items() if said and step not in refused]
        without = f" Without `capturable`: {', '.join(refused)}." if refused else ""
        if every:
            lines.append(f"{what}: {', '.join(bad) or 'none'}, of {len(every) - len(refused)}.{without}")
    return lines


def programs(pieces: Pieces) -> list[str]:
    """Two ranks on one card, and the tests that need a GPU."""
    lines = []
    if "two ranks" in pieces:
        cases = pieces["two ranks"].get("cases", {})
        bad = [f"{name} ({_why(said)})" for name, said in cases.items() if not said["agrees"]]
        lines.append(
            f"Two ranks on one card against one process: {len(cases)} cases, wrong: {', '.join(bad) or 'none'}."
        )
    if "summary" in pieces.get("tests", {}):
        lines.append(f"Tests that need a GPU: {pieces['tests']['summary'].strip('= ')}.")
    return lines


def _why(said: dict[str, Any]) -> str:
    return said.get("failed") or said.get("failed on the other rank") or f"differs by {said['differs']:.1e}"


def race(name: str, piece: Pieces, pieces: Pieces) -> str:
    """The table of one race."""
    _, which, optimizer, dtype, *slow = name.split("/")
    peak = pieces.get("copy", {}).get("bytes_per_second")
    rows = []
    for label, row in sorted(piece["rows"].items(), key=lambda item: item[1].get("ms", 1e9)):
        if "failed" in row:
            rows.append([label, f"failed: {row['failed'].splitlines()[0][:100]}", *[""] * 8])
            continue
        speed = row["must_move_bytes"] / (1e-3 * row["ms"])
        starts = row.get("launches")
        rows.append(
            [
                label,
                f"{row['ms']:.3f} ({row['ms_10']:.3f} to {row['ms_90']:.3f})",
                f"{row['times_base']:.2f}" if "times_base" in row else "",
                f"{row['kernel_ms']:.3f}" if "kernel_ms" in row else "",
                f"{row['host_ms']:.3f}",
                f"{speed / 1e9:.0f}" + (f" ({100 * speed / peak:.0f} %)" if peak else ""),
                f"{row['state_bytes'] / piece['parameters']:.2f}",
                "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.1f}",
                "" if starts is None else f"{starts['kernels']} + {starts['copies']}",
                f"{row['first_step_s']:.2f}",
            ]
        )
    head = [
        *["", "ms (10 % to 90 %)", f"times {piece['base']}", "kernels, ms", "host, ms", "GB/s (of a copy)"],
        *["state, bytes per parameter", "peak in a step, MiB", "launches + copies", "first step, s"],
    ]
    absent = "".join(f"\n\n{label}: {why}." for label, why in piece["absent"].items())
    note = ", packages that compile for every shape" if slow else ""
    code = f" (code of {piece['commit']})" if "commit" in piece else ""
    return f"### {optimizer}, {which}, {dtype}{note}{code}\n\n{table(head, rows)}{absent}"


def replays(pieces: Pieces) -> list[str]:
    """Steps as they are called and as a graph replays them."""
    parts = []
    for which, piece in of_kind(pieces, "replay").items():
        rows = [
            [label, f"{row['ms']:.3f} ({row['ms_10']:.3f} to {row['ms_90']:.3f})", f"{row['host_ms']:.3f}"]
            for label, row in piece.get("rows", {}).items()
        ]
        if rows:
            parts.append(f"### Replayed from a CUDA graph, AdamW, {which}\n\n{table(['', 'ms', 'host, ms'], rows)}")
    return parts


def counters(pieces: Pieces) -> list[str]:
    """What the hardware counted in one launch."""
    found = {label: row for label, row in pieces.get("counters", {}).items() if isinstance(row, dict)}
    if not found:
        return []
    metrics = list(dict.fromkeys(metric for row in found.values() for metric in row))
    rows = [[metric, *(str(row.get(metric, "")) for row in found.values())] for metric in metrics]
    return [f"### Hardware counters of one launch, AdamW, GPT-2 124M\n\n{table(['', *found], rows)}"]


def first_steps(pieces: Pieces) -> list[str]:
    """The table of first steps."""
    if "first steps" not in pieces:
        return []
    rows = []
    for label, both in pieces["first steps"].items():
        if not isinstance(both, dict):  # the commit and the like
            continue
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
        few = ms(which, "adamw", "ours, 8 bits")
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
        for label in ("ours, 32 bits", "ours, 8 bits"):
            if "ms" not in found.get(label, {}):
                continue
            goal = 0.85 if optimizer == "adamw" and label == "ours, 32 bits" else 0.80
            speed = found[label]["must_move_bytes"] / (1e-3 * found[label]["ms"])
            share = speed / pieces["copy"]["bytes_per_second"]
            said = f"{which}: {optimizer}, {label.removeprefix('ours, ')}, at least {goal:.0%} of a copy's bandwidth"
            rows.append([said, f"{share:.0%}", "yes" if share >= goal else "no"])
    return rows
