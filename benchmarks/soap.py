"""A step of SOAP beside another program's, in one run: the authors' file, or pytorch_optimizer.

python -m benchmarks.soap --theirs /path/to/soap.py   # the authors' program, or pytorch_optimizer if it is installed
python -m benchmarks.soap --frequency 1 --steps 20 --out benchmarks/results/soap.json
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--theirs", type=Path, help="the authors' soap.py; by default pytorch_optimizer")
    parser.add_argument("--frequency", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20, help="a multiple of the frequency")
    parser.add_argument("--rounds", type=int, default=3, help="of both, in turn")
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    args = parser.parse_args()
    name, make = theirs(args.theirs, args.frequency)
    ours: list[float] = []
    others: list[float] = []
    for _ in range(args.rounds):
        ours.append(statistics.mean(seconds(lambda params: SOAP(params, frequency=args.frequency), args.steps)))
        others.append(statistics.mean(seconds(make, args.steps)))
    result = {
        **{"other": name, "frequency": args.frequency, "steps": args.steps, "threads": torch.get_num_threads()},
        **{"ours, ms": 1e3 * min(ours), "other, ms": 1e3 * min(others), "ratio": min(ours) / min(others)},
    }
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
