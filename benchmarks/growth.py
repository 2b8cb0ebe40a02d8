"""Measures how step time and state grow: `python -m benchmarks.growth --budget 600`.

There are two axes: the 148 tensors of GPT-2 with 1 to 300 million parameters, and 10 to 10,000 tensors of 1,000
elements. The steps of each optimizer alternate with those of `torch.optim.AdamW(fused=True)`, as in
`benchmarks/cpu.py`. Each point is saved at once, the smallest first, and the same command continues where the budget
ended.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_contenders import base, ours
from benchmarks.pages import RESULTS, table, write_part
from benchmarks.pairs import measure
from benchmarks.pictures import new_figure, save_figure
from benchmarks.records import Record, commit, describe, load, machine, save
from benchmarks.shapes import Shape, scaled

TORCH = "torch AdamW fused"
LINES = (("adamw", 32), ("adamw", 8), ("adan", 32), ("lamb", 32), ("lion", 32))
NUMBERS = (1_000_000, 3_000_000, 10_000_000, 30_000_000, 100_000_000, 300_000_000)
COUNTS = (10, 30, 100, 300, 1000, 3000, 10_000)
AXES: dict[str, tuple[str, Sequence[int], Callable[[int], list[Shape]]]] = {
    "parameters": ("parameters in 148 tensors", NUMBERS, scaled),
    "tensors": ("tensors of 1,000 elements", COUNTS, lambda count: [(1000,)] * count),
}


def points(largest: float) -> Iterator[tuple[str, int, str, int]]:
    """All that is measured: the axis, the place on it, the optimizer and its bits."""
    for axis, (_, places, _) in AXES.items():
        for place in places:
            if place <= largest:
                yield from ((axis, place, name, bits) for name, bits in LINES)


def point(axis: str, place: int, name: str, bits: int, rounds: int, longest: float) -> Record:
    """One point of one line, and of torch's, which was measured beside it."""
    shapes = AXES[axis][2](place)
    entry = next(entry for entry in ours(name, "auto") if entry.contender.bits == bits)
    found = measure(shapes, base().make, entry.contender.make, rounds, longest)
    facts = {"axis": axis, "place": place, "line": _label(name, bits), "code": commit()}
    return {**facts, "parameters": sum(map(math.prod, shapes)), "tensors": len(shapes), **found}


def _label(name: str, bits: int) -> str:
    return f"{name}, {bits} bits"


# ---------------------------------------------------------------------------------------------- what comes of it


def lines(found: Record, axis: str) -> dict[str, list[Record]]:
    """The points of each line in order; torch's are medians over the pairs, at 8 bytes of state per parameter."""
    rows = [row for row in found["points"] if row["axis"] == axis]
    of: dict[str, list[Record]] = {}
    for place in sorted({row["place"] for row in rows}):
        here = [row for row in rows if row["place"] == place]
        numbers = {key: here[0][key] for key in ("place", "parameters", "tensors")}
        milliseconds = statistics.median(row["base"]["ms"] for row in here)
        state = 8 * numbers["parameters"] + 4 * numbers["tensors"]
        of.setdefault(TORCH, []).append({**numbers, "ms": milliseconds, "state_bytes": state})
        for row in here:
            of.setdefault(row["line"], []).append(row)
    return of


def bends(line: Sequence[Record], axis: str) -> str:
    """Where the cost of one more stops being what it was, in words."""
    if len(line) < 3:
        return ""
    each = [1e6 * row["ms"] / row[axis] for row in line]  # nanoseconds
    if axis == "tensors":
        fixed, per = _straight([row["tensors"] for row in line], [row["ms"] for row in line])
        said = f"{1e3 * per:.1f} µs a tensor"
        return f"{said} and {1e3 * fixed:.0f} µs a step, as much as {fixed / per:.0f} tensors" if fixed else said
    steps = [b / a for a, b in itertools.pairwise(each)]
    i = max(range(len(steps)), key=lambda i: steps[i])
    if steps[i] < 1.15:
        return f"from {each[0]:.2f} down to {min(each):.2f} ns a parameter, with no increase above 15 %"
    held = [(8 * row["parameters"] + row["state_bytes"]) / 2**20 for row in line[i : i + 2]]
    return (
        f"from {each[i]:.2f} to {each[i + 1]:.2f} ns a parameter as parameters, gradients and state grow from "
        f"{held[0]:.0f} to {held[1]:.0f} MiB"
    )


def _straight(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Start and slope of a line through points whose relative errors are alike."""
    import numpy as np

    weight = 1 / np.asarray(y)
    columns = np.stack([np.ones(len(x)), np.asarray(x, float)], axis=1) * weight[:, None]
    (start, slope), *_ = np.linalg.lstsq(columns, np.ones(len(x)), rcond=None)
    return max(0.0, float(start)), max(1e-12, float(slope))


def page(found: Record) -> str:
    """A table for each axis, times and where they bend."""
    codes = ", ".join(sorted({row["code"] for row in found["points"]}))
    parts = [f"{describe(found['about'])} Commit: {codes}."]
    for axis, (title, _, _) in AXES.items():
        of = lines(found, axis)
        if not of:
            continue
        places = [row["place"] for row in of[TORCH]]
        rows = []
        for label, line in of.items():
            at = {row["place"]: row for row in line}
            cells = [f"{at[place]['ms']:.3g}" if place in at else "" for place in places]
            state = f"{line[-1]['state_bytes'] / line[-1]['parameters']:.2f}"
            rows.append([label, *cells, state, bends(line, axis)])
        head = ["ms", *(f"{place:,}" for place in places), "state, bytes per parameter", "how time grows"]
        parts.append(f"### From {places[0]:,} to {places[-1]:,} {title}\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def picture(found: Record, path: Path) -> None:
    """Time and state over both axes, all scales logarithmic."""
    axes_with_points = [axis for axis in AXES if lines(found, axis)]
    if not axes_with_points:
        return
    figure, axes = new_figure(len(axes_with_points), 2, width=11, height=4.2 * len(axes_with_points))
    for i, axis in enumerate(axes_with_points):
        for ax, (what, unit) in zip(
            axes[2 * i :], (("ms", "ms a step"), ("state_bytes", "bytes of state")), strict=False
        ):
            _curves(ax, lines(found, axis), what)
            ax.set(xscale="log", yscale="log", xlabel=AXES[axis][0], ylabel=unit)
            ax.grid(which="major", linewidth=0.3)
    axes[0].legend(fontsize=7)
    save_figure(figure, path)


def _curves(ax: Any, of: dict[str, list[Record]], what: str) -> None:
    for label, line in of.items():
        style = {"color": "black", "linestyle": "--"} if label == TORCH else {}
        ax.plot([row["place"] for row in line], [row[what] for row in line], marker=".", label=label, **style)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--longest", type=float, default=30, help="seconds for one point, but at least three rounds")
    parser.add_argument("--largest", type=float, default=math.inf, help="largest value on an axis to measure")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new point starts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / "growth.json", help="the picture is written next to it")
    parser.add_argument("--page", action="store_true", help="write the tables to docs/speed.md")
    given = parser.parse_args(args)
    end = time.monotonic() + given.budget
    torch.set_num_threads(given.threads)
    found = load(given.out, machine())
    done = {(row["axis"], row["place"], row["line"]) for row in found.setdefault("points", [])}
    for axis, place, name, bits in points(given.largest):
        if (axis, place, _label(name, bits)) in done:
            continue
        if time.monotonic() > end:
            print(f"the budget is spent before {place:,} {axis}; the same command continues there")
            break
        new = point(axis, place, name, bits, given.rounds, given.longest)
        found["points"].append(new)
        gc.collect()
        save(given.out, found)
        print(f"{place:,} {axis}, {new['line']}: {new['ms']:.3g} ms, {new['times_base']:.2f}", flush=True)
    picture(found, given.out.with_suffix(".png"))
    print(page(found))
    if given.page:
        write_part("speed.md", "growth", page(found))


if __name__ == "__main__":
    main()
