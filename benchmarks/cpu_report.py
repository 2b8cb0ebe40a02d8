"""The tables and the picture that `benchmarks/cpu.py` makes from its results."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.pages import table
from benchmarks.pictures import new_figure, save_figure
from benchmarks.records import Record, describe
from lightning_optim.config.catalog import line

BASE_BYTES = 28  # AdamW: parameter, gradient and two slots read, all but the gradient written
FIXED = {("adan", 32): 2.0, ("lamb", 32): 2.5, ("adamw", 8): 3.0}
FIXED_IN_CASE = {("adafactor", 32, "b"): 1.5}  # of small tensors its means cost more than their bytes
CLOSE = ("adamw", "radam", "adabelief", "acprop")
OVER_BOUND = 1.3


@functools.cache
def _elementwise(optimizer: str) -> bool:
    return not line(optimizer).needs


def goal(optimizer: str, bits: int, bound: float, case: str) -> float | None:
    """What a ratio should not exceed; None where nothing is asked."""
    if (optimizer, bits) in FIXED:
        return FIXED[optimizer, bits]
    if (optimizer, bits, case) in FIXED_IN_CASE:
        return FIXED_IN_CASE[optimizer, bits, case]
    if bits != 32 or not _elementwise(optimizer):
        return None
    if optimizer in CLOSE:
        return 1.2 if case == "b" else 1.3
    return OVER_BOUND * bound


def peak(piece: Record) -> float:
    """Bytes per second that simple work on memory reaches, in the median over the visits to this list of tensors."""
    found = piece["bandwidth"]
    return max(float(statistics.median(one[kind] for one in found)) for kind in found[0])


def of(piece: Record, **wanted: Any) -> list[Record]:
    """The rows that were measured and have these values."""
    rows = [{"label": key.partition("/")[2], **row} for key, row in piece["rows"].items() if "times_base" in row]
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def bound(row: Record, piece: Record) -> float:
    """The ratio that a row would have if it and AdamW were as fast as their bytes allow."""
    ratio: float = row["must_move_bytes"] / piece["parameters"] / BASE_BYTES
    return ratio


def _fastest_elsewhere(piece: Record, optimizer: str, bits: int) -> Record | None:
    rows = [row for row in of(piece, optimizer=optimizer, bits=bits) if row["package"] != "ours"]
    return min(rows, key=lambda row: float(row["times_base"]), default=None)


def _ours(piece: Record) -> Iterator[tuple[Record, Record | None]]:
    """What a user gets, by optimizer and bits, each with the blocked engine's row."""
    for row in of(piece, package="ours", engine="auto"):
        same = {key: row[key] for key in ("optimizer", "bits")}
        yield row, next(iter(of(piece, package="ours", engine="blocked", **same)), None)


def goals(found: Record) -> str:
    """For each list of tensors: our ratios beside bound, goal and the fastest elsewhere."""
    parts = [describe(found["about"])]
    for case, piece in found["cases"].items():
        rows, asked, met = [], 0, 0
        for row, blocked in sorted(_ours(piece), key=lambda pair: (-pair[0]["bits"], pair[0]["optimizer"])):
            limit = goal(row["optimizer"], row["bits"], bound(row, piece), case)
            good = limit is not None and row["times_base"] <= limit
            asked, met = asked + (limit is not None), met + good
            rival = _fastest_elsewhere(piece, row["optimizer"], row["bits"])
            rows.append(
                [
                    f"`{row['optimizer']}`",
                    str(row["bits"]),
                    f"{row['must_move_bytes'] / piece['parameters']:.1f}",
                    f"{bound(row, piece):.2f}",
                    "" if limit is None else f"{limit:.2f}",
                    f"{row['times_base']:.2f} ({row['served_by'].partition(' ')[0]})",
                    "" if limit is None else "yes" if good else "no",
                    "" if blocked is None else f"{blocked['times_base']:.2f}",
                    f"{_speed(row) / peak(piece):.0%}",
                    "" if rival is None else f"{rival['times_base']:.2f} {rival['label']}",
                ]
            )
        head = ["", "bits", "bytes", "bound", "goal", "ours", "met", "blocked", "% of bandwidth", "fastest elsewhere"]
        said = f"{_facts(piece)} {met} of {asked} goals met."
        parts.append(f"### {piece['title']}\n\n{said}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def _speed(row: Record) -> float:
    speed: float = row["must_move_bytes"] / (1e-3 * row["ms"])
    return speed


def _facts(piece: Record) -> str:
    reference = statistics.median(row["base"]["ms"] for row in of(piece))
    codes = ", ".join(sorted({row["code"] for row in of(piece)}))
    return (
        f"torch's fused AdamW takes {reference:.2f} ms (median over all pairs). "
        f"Memory bandwidth: {peak(piece) / 1e9:.1f} GB/s. Commit: {codes}."
    )


def full(found: Record) -> str:
    """Everyone who was measured, by method and speed."""
    parts = ["# Steps on a CPU", describe(found["about"])]
    for piece in found["cases"].values():
        rows = []
        for row in sorted(of(piece), key=lambda row: (row["optimizer"], row["times_base"])):
            busy = row["times_base_busy"]
            rows.append(
                [
                    f"`{row['optimizer']}`",
                    row["label"],
                    f"{row['ms']:.2f} ({row['ms_10']:.2f} to {row['ms_90']:.2f})",
                    f"{row['times_base']:.2f}",
                    f"{busy:.2f}",
                    f"{bound(row, piece):.2f}",
                    f"{_speed(row) / 1e9:.1f}",
                    f"{row['state_bytes'] / piece['parameters']:.2f}",
                    f"{row['first_step_s']:.2f}",
                    row.get("served_by", "") + (" (numbers are not finite)" if row.get("not_finite") else ""),
                ]
            )
        head = [
            *["method", "", "ms (10 % to 90 %)", "times AdamW fused", "by processor time", "bound", "GB/s"],
            *["state, bytes per parameter", "first step, s", "engine"],
        ]
        parts.append(f"## {piece['title']}\n\n{_facts(piece)}\n\n{table(head, rows)}")
        failed = [f"- {key}: {row['failed']}" for key, row in piece["rows"].items() if "failed" in row]
        parts += ["Not measured:\n\n" + "\n".join(failed)] if failed else []
    return "\n\n".join(parts)


BARS: tuple[tuple[str, str, Callable[[Record, str], Record | None]], ...] = (
    ("ours, 32 bits", "#1f77b4", lambda piece, name: next(iter(_auto(piece, name, 32)), None)),
    ("fastest elsewhere, 32 bits", "#aec7e8", lambda piece, name: _fastest_elsewhere(piece, name, 32)),
    ("ours, 8 bits", "#d62728", lambda piece, name: next(iter(_auto(piece, name, 8)), None)),
    ("fastest elsewhere, 8 bits", "#ff9896", lambda piece, name: _fastest_elsewhere(piece, name, 8)),
)


def _auto(piece: Record, optimizer: str, bits: int) -> list[Record]:
    return of(piece, package="ours", engine="auto", optimizer=optimizer, bits=bits)


def picture(found: Record, path: Path) -> None:
    """A bar for each optimizer and number of bits, ours and the fastest elsewhere, with a stroke at the bound."""
    cases = [piece for piece in found["cases"].values() if of(piece)]
    names = sorted({row["optimizer"] for piece in cases for row in of(piece)}, reverse=True)
    if not names:
        return
    figure, axes = new_figure(1, len(cases), width=5.5 * len(cases), height=1.2 + 0.45 * len(names))
    for ax, piece in zip(axes, cases, strict=True):
        for i, (label, colour, look_up) in enumerate(BARS):
            shown = [(y, row) for y, name in enumerate(names) if (row := look_up(piece, name)) is not None]
            places = [y + 0.3 - 0.2 * i for y, _ in shown]
            widths = [row["times_base"] for _, row in shown]
            ax.barh(places or [0], widths or [0], height=0.18, color=colour, label=label)
            if label.startswith("ours"):
                bounds = [bound(row, piece) for _, row in shown]
                ax.vlines(bounds, [y - 0.1 for y in places], [y + 0.1 for y in places], color="black", linewidth=1)
        ax.axvline(1, color="grey", linewidth=0.5)
        ax.set(xscale="log", title=piece["title"], ylim=(-0.6, len(names) - 0.4))
        ax.set_xlabel("times torch.optim.AdamW(fused=True)\nstrokes: what the bytes allow")
        ax.set_yticks(range(len(names)), names)
    axes[0].legend(loc="lower right", fontsize=7)
    save_figure(figure, path)
