"""Times kernels under other options of Triton's compiler on a GPU.

    python -m benchmarks.kernel_options adamw:8 lion:8

Each word is an optimizer and its bits. For each number of warps and each bound on registers a step on the tensors of
GPT-2 is timed, all of them in alternation, beside the options that the engine chooses. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.contenders import SHARED
from benchmarks.shapes import gpt2_124m, tiny
from benchmarks.timing import random_params, side_by_side
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.engines import triton as engine

VARIANTS = [(4, 64), (4, 80), (4, 96), (4, 128), (8, 64), (8, 80), (8, 96)]  # warps, and registers of a thread at most
WARM = 8  # steps before the first that is timed: RAdam has changed its form by then


def times(
    word: str, params: Sequence[torch.Tensor], variants: Sequence[tuple[int, int]], rounds: int
) -> dict[str, Any]:
    """Milliseconds of a step by variant, or how one failed."""
    name, bits = word.split(":")
    device, chosen = params[0].device, engine.options
    found: dict[str, Any] = {}
    calls: dict[str, Callable[[], Any]] = {}

    def step_of(optimizer: torch.optim.Optimizer, options: dict[str, int]) -> Callable[[], Any]:
        def step() -> None:
            engine.options = lambda kernel: {**chosen(kernel), **options}
            optimizer.step()

        return step

    for label, options in {
        "chosen": {},
        **{f"{w} warps, {r} registers": {"num_warps": w, "maxnreg": r} for w, r in variants},
    }.items():
        optimizer = OPTIMIZERS[name](params, **SHARED.get(name, {"lr": 1e-4}), state_bits=int(bits), engine="triton")
        step = step_of(optimizer, options)
        try:
            for _ in range(WARM):
                step()
            calls[label] = step
        except Exception as error:
            found[label] = f"{type(error).__name__}: {str(error)[:200]}"
    measured = side_by_side(calls, device, rounds)
    engine.options = chosen
    return found | {label: round(one.summary()["ms"], 4) for label, one in measured.items()}


def main(args: Sequence[str] | None = None) -> int:
    """Print the times of every word."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="+", metavar="NAME:BITS")
    parser.add_argument("--tiny", action="store_true", help="small tensors, for the interpreter on a CPU")
    given = parser.parse_args(args)
    device = torch.device("cpu" if given.tiny else "cuda")
    params = random_params(tiny() if given.tiny else gpt2_124m(), torch.float32, device)
    found = {}
    for word in given.words:
        found[word] = times(word, params, VARIANTS[:1] if given.tiny else VARIANTS, 1 if given.tiny else 6)
        print(word, found[word], flush=True)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
