"""Measures the first step of a new process: `python -m benchmarks.first_step adamw 'ours, 32 bits'`.

Prints a line of JSON. Tensors are created and the device is initialized before the clock starts. So the time covers
what the optimizer prepares: deferred imports, kernels that it generates and compiles, and state.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

from benchmarks.contenders import others, ours
from benchmarks.shapes import LISTS, tiny
from benchmarks.timing import random_params, synchronize


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("optimizer")
    parser.add_argument("label")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--list", default="tiny")
    given = parser.parse_args()
    device = torch.device(given.device)
    shapes = tiny() if given.list == "tiny" else LISTS[given.list]()
    params = random_params(shapes, torch.float32, device)
    found = {c.label: c for c in (*ours(given.optimizer), *others(given.optimizer, torch.float32)[0])}
    synchronize(device)
    begin = time.perf_counter()
    optimizer = found[given.label].make(params)
    marks = [time.perf_counter()]
    for _ in range(3):
        optimizer.step()
        synchronize(device)
        marks.append(time.perf_counter())
    seconds = [b - a for a, b in zip((begin, *marks), marks, strict=False)]
    print(json.dumps(dict(zip(("construct", "first", "second", "third"), seconds, strict=True))))


if __name__ == "__main__":
    main()
