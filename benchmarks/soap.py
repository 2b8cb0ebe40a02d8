"""A step of SOAP beside another program's, in one run: the authors' file, or pytorch_optimizer.

python -m benchmarks.soap --theirs /path/to/soap.py   # the authors' program, or pytorch_optimizer if it is installed
python -m benchmarks.soap --frequency 1 --steps 20

`python -m benchmarks.matrix --soap /path/to/soap.py` records it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lightning_optim.optimizers import SOAP

# The weights of two layers of a transformer, and their biases.
SHAPES = ((384, 128), (128, 128), (512, 128), (128, 512)) * 2 + ((128,), (512,)) * 4


def theirs(path: Path | None, frequency: int) -> tuple[str, Callable[..., Any]]:
    """The other program by name, and a function that makes its optimizer."""
    if path is not None:
        spec = importlib.util.spec_from_file_location("their_soap", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return "the authors' program", lambda params: module.SOAP(params, precondition_frequency=frequency)
    other: Any = importlib.import_module("pytorch_optimizer")
    return "pytorch_optimizer", lambda params: other.SOAP(params, precondition_frequency=frequency)


def seconds(make: Callable[..., Any], steps: int) -> list[float]:
    """The seconds of each step, after those that create state."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    optimizer = make(params)
    found = []
    for _ in range(steps + 2):
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        begun = time.perf_counter()
        optimizer.step()
        found.append(time.perf_counter() - begun)
    return found[2:]


def compare(path: Path | None, frequency: int = 10, steps: int = 20, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds of a step of both, which take turns.

    A step that renews bases takes longer, so what is compared is the median over rounds of the mean over their steps.

    Args:
        path: The authors' soap.py; None for pytorch_optimizer.
        frequency: A basis is renewed so rarely.
        steps: Steps of a round, a multiple of the frequency.
        rounds: How often each of the two is measured.
    """
    name, make = theirs(path, frequency)
    times: tuple[list[float], list[float]] = [], []
    for _ in range(rounds):
        for own, each in zip(times, (lambda params: SOAP(params, frequency=frequency), make), strict=True):
            own.append(1e3 * statistics.mean(seconds(each, steps)))
    ours, other = map(statistics.median, times)
    facts = {"other": name, "frequency": frequency, "steps": steps, "rounds": rounds}
    return {**facts, "ms": ours, "other_ms": other, "ratio": ours / other}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--theirs", type=Path, help="the authors' soap.py; by default pytorch_optimizer")
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="a multiple of the frequency")
    parser.add_argument("--rounds", type=int, default=5, help="of both, in turn")
    given = parser.parse_args()
    print(json.dumps(compare(given.theirs, given.frequency, given.steps, given.rounds), indent=1))


if __name__ == "__main__":
    main()
