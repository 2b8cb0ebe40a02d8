"""Measures optimizers of whole matrices on a CPU: `python -m benchmarks.matrix --page`.

Muon beside the pair that stands for it in torch, SOAP beside its authors' program, the orthogonalization of many
matrices in batches beside one after the other, and Schedule-Free and Prodigy beside AdamW. The two of each comparison
alternate on the same tensors, and the result is the ratio of their medians. Each is saved at once.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pages import RESULTS, table, write_part
from benchmarks.pairs import FEWEST, Make, measure
from benchmarks.records import Record, commit, load, machine, save
from benchmarks.shapes import Shape, gpt2_124m, scaled
from benchmarks.soap import compare
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.orthogonalize import newton_schulz

EMBEDDINGS = 2  # the first two tensors of `gpt2`: its rows and its positions, which Muon leaves to AdamW


class Pair(torch.optim.Optimizer):
    """torch.optim.Muon for the matrices of a list and torch.optim.AdamW for the rest, as one optimizer."""

    def __init__(self, params: Sequence[Tensor], **options: Any) -> None:
        super().__init__(list(params), {})
        matrices, rest = split(params)
        self.parts = [
            torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options),
            torch.optim.AdamW(rest, fused=True, **options),
        ]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
        self.state = {**self.parts[0].state, **self.parts[1].state}  # type: ignore[assignment]


def split(params: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The matrices of a list of `gpt2`, and its embeddings and vectors."""
    matrices = [p for p in params[EMBEDDINGS:] if p.dim() == 2]
    return matrices, [*params[:EMBEDDINGS], *(p for p in params[EMBEDDINGS:] if p.dim() < 2)]


def muon(params: Sequence[Tensor], **options: Any) -> torch.optim.Optimizer:
    """Our Muon with the same two rules on the same tensors."""
    matrices, rest = split(params)
    return OPTIMIZERS["muon"]([{"params": matrices}, {"params": rest, "matrix": False}], **options)


def ours(name: str, **options: Any) -> Make:
    return functools.partial(OPTIMIZERS[name], **options)


def comparisons() -> dict[str, tuple[Callable[[], list[Shape]], Make, Make]]:
    """By title: the tensors, who is compared with, and who is measured."""
    classic: dict[str, Any] = {"coefficients": "classic", "lr": 1e-4}
    pair: Make = functools.partial(Pair, lr=1e-4)
    adamw = ours("adamw", lr=1e-4)
    found: dict[str, tuple[Callable[[], list[Shape]], Make, Make]] = {
        "Muon, products in bfloat16 / torch.optim.Muon + AdamW": (
            *(gpt2_124m, pair),
            functools.partial(muon, compute="bfloat16", **classic),
        ),
        "Muon, products in float32 / torch.optim.Muon + AdamW (bfloat16)": (
            *(gpt2_124m, pair),
            functools.partial(muon, compute="float32", **classic),
        ),
        **{
            f"{OPTIMIZERS[name].title} / our AdamW": (gpt2_124m, adamw, ours(name))
            for name in ("schedule_free_adamw", "schedule_free_sgd", "schedule_free_radam", "prodigy")
        },
    }
    return found


def batches(rounds: int, layers: int = 12) -> Record:
    """Seconds to orthogonalize GPT-2's matrices in batches of equal shapes, and one after the other."""
    generator = torch.Generator().manual_seed(0)
    width = 768
    shapes = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    stacks = [torch.randn(layers, *shape, generator=generator) for shape in shapes]
    found: Record = {"matrices": layers * len(shapes)}
    for compute in ("float32", "bfloat16"):
        run = functools.partial(newton_schulz, compute=compute)
        calls: dict[str, Callable[[], Any]] = {
            "batched": lambda run=run: [run(stack) for stack in stacks],  # type: ignore[misc]
            "one by one": lambda run=run: [run(x[None]) for stack in stacks for x in stack],  # type: ignore[misc]
        }
        times: dict[str, list[float]] = {label: [] for label in calls}
        for _ in range(rounds):
            for label, call in calls.items():
                begin = time.perf_counter()
                call()
                times[label].append(time.perf_counter() - begin)
        found[compute] = {label: statistics.median(elapsed) for label, elapsed in times.items()}
    return found


def page(found: Record) -> str:
    """The tables, in markdown."""
    rows = []
    for title, new in found.get("rows", {}).items():
        moved = new["must_move_bytes"] / new["base_bytes"] if "base_bytes" in new else math.nan
        bytes_of = f"{moved:.2f}" if "AdamW" in title and "Muon" not in title else ""
        rows.append([title, f"{new['ms']:.0f} ms", f"{new['base']['ms']:.0f} ms", f"{new['times_base']:.2f}", bytes_of])
    parts = [table(["step", "ours", "the other", "ratio", "ratio of bytes"], rows)]
    if "orthogonalize" in found:
        of = found["orthogonalize"]
        head = ["orthogonalization", "batched", "one by one", "ratio"]
        lines = []
        for word in ("float32", "bfloat16"):
            batched, single = (of[word][way] for way in ("batched", "one by one"))
            what = f"{of['matrices']} matrices, {word}"
            lines.append([what, f"{batched:.2f} s", f"{single:.2f} s", f"{batched / single:.2f}"])
        parts.append(table(head, lines))
    if "soap" in found:
        of = found["soap"]
        head = ["SOAP, mean step", "ours", of["other"], "ratio"]
        row = [f"bases renewed every {of['frequency']} steps", f"{of['ms']:.1f} ms", f"{of['other_ms']:.1f} ms"]
        parts.append(table(head, [[*row, f"{of['ratio']:.2f}"]]))
    about = found["about"]
    parts.append(f"{about['device']}, {about['threads']} thread, torch {about['torch']}.")
    return "\n\n".join(parts)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="comparisons whose title contains this")
    parser.add_argument("--rounds", type=int, default=FEWEST)
    parser.add_argument("--layers", type=int, default=12, help="of GPT-2, for the orthogonalization")
    parser.add_argument("--longest", type=float, default=240, help="seconds for one comparison, but three rounds")
    parser.add_argument("--tiny", action="store_true", help="tensors of some thousand elements: does it run?")
    parser.add_argument("--soap", type=Path, help="the soap.py of SOAP's authors, to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS / "matrix.json")
    parser.add_argument("--page", action="store_true", help="write the tables into docs/speed.md")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peers
    found = load(given.out, machine())
    for title, (shapes, base, other) in comparisons().items():
        if given.only not in title:
            continue
        of = scaled(20_000) if given.tiny else shapes()
        new = measure(of, base, other, given.rounds, given.longest, warm=1)
        new["base_bytes"] = 28 * sum(map(math.prod, of))  # AdamW: p, g, m, v read, p, m, v written
        found.setdefault("rows", {})[title] = {"code": commit(), **new}
        gc.collect()
        save(given.out, found)
        print(f"{title}: {new['times_base']:.2f}", flush=True)
    if given.only in "orthogonalize":
        found["orthogonalize"] = {"code": commit(), **batches(given.rounds, given.layers)}
        save(given.out, found)
    if given.soap:
        found["soap"] = {"code": commit(), **compare(given.soap)}
        save(given.out, found)
    print(page(found))
    if given.page:
        write_part("speed.md", "matrix", page(found))


if __name__ == "__main__":
    main()
