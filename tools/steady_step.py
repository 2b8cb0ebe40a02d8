"""What a steady optimizer step does in Python: how many calls it makes, and through which files of the package.

    python tools/steady_step.py [--optimizer adamw] [--tensors 4] [--engine compiled]

A steady step is one after the state and all caches exist. Calls of Python functions and of built-in functions are
counted apart, by `sys.setprofile`.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch

import lightning_optim


def count_calls(optimizer: torch.optim.Optimizer) -> tuple[Counter[str], int]:
    """Calls of Python functions by file, and the number of calls of built-in functions, in one step."""
    files: Counter[str] = Counter()
    builtin = 0

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal builtin
        if event == "call":
            files[frame.f_code.co_filename] += 1
        elif event == "c_call":
            builtin += 1

    sys.setprofile(profile)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    return files, builtin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--tensors", type=int, default=4)
    parser.add_argument("--engine", default="auto")
    given = parser.parse_args()
    params = [torch.nn.Parameter(torch.randn(16, 16)) for _ in range(given.tensors)]
    optimizer = lightning_optim.create_optimizer({"name": given.optimizer, "engine": given.engine}, params)
    for p in params:
        p.grad = torch.randn_like(p)
    for _ in range(4):
        optimizer.step()
    files, builtin = count_calls(optimizer)
    root = Path(lightning_optim.__file__).parent
    own = {Path(file).relative_to(root).as_posix(): n for file, n in files.items() if Path(file).is_relative_to(root)}
    print(f"{given.optimizer}, {given.tensors} tensors, engine {given.engine}")
    print(f"calls of Python functions: {sum(files.values())}, of the package {sum(own.values())}; built-in: {builtin}")
    print(f"files of the package: {len(own)}")
    for file, n in sorted(own.items(), key=lambda item: -item[1]):
        print(f"  {n:5d}  {file}")


if __name__ == "__main__":
    main()
