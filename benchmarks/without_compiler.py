"""What the blocked engine is worth where there is no C++ compiler: `python -m benchmarks.without_compiler`.

There `auto` takes `blocked`, and without it would take `reference`, plain torch. Both are asked for by name, so that
the machine may have a compiler, and take steps in turns, one process for each optimizer, case and number of bits, with
one thread, on random parameters and gradients. torch's own AdamW is measured beside them, fused and with `foreach`.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import records, shapes
from benchmarks.pages import RESULTS, ROOT
from benchmarks.timing import random_params, side_by_side
from lightning_optim import create_optimizer

OPTIMIZERS = ("adamw", "adan", "lamb")
CASES: dict[str, Callable[[], list[shapes.Shape]]] = {
    "200 tensors, 2M": shapes.two_million,
    "one tensor, 8M": lambda: [(2048, 4096)],
    "tiny": shapes.tiny,
}
ENGINES = ("reference", "blocked")
WARM = 3  # steps after which no slot is zero and all caches are filled
CPU = torch.device("cpu")


def contenders(optimizer: str, bits: int, case: str) -> dict[str, torch.optim.Optimizer]:
    """The two engines, each on tensors of its own, and torch's AdamW beside ours of the same precision."""
    found: dict[str, torch.optim.Optimizer] = {}
    for engine in ENGINES:
        params = random_params(CASES[case](), torch.float32, CPU)
        found[engine] = create_optimizer({"name": optimizer, "state_bits": bits, "engine": engine}, params)
    if optimizer == "adamw" and bits == 32:
        for way in ("fused", "foreach"):
            params = random_params(CASES[case](), torch.float32, CPU)
            found[f"torch, {way}"] = torch.optim.AdamW(params, **{way: True})  # type: ignore[arg-type]
    return found


def measure(optimizer: str, bits: int, case: str, rounds: int) -> records.Record:
    """Milliseconds of a step for each contender, in alternating visits; and how much faster blocked is."""
    torch.set_num_threads(1)
    made = contenders(optimizer, bits, case)
    for one in made.values():
        for _ in range(WARM):
            one.step()
    times = side_by_side({label: one.step for label, one in made.items()}, CPU, rounds)
    found: records.Record = {label: one.summary() for label, one in times.items()}
    found["reference / blocked"] = found["reference"]["ms"] / found["blocked"]["ms"]
    return found


def in_fresh_process(optimizer: str, bits: int, case: str, rounds: int) -> records.Record:
    """`measure`, where no other case has left its memory."""
    words = [optimizer, str(bits), case, str(rounds)]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.without_compiler", "--child", *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    found: records.Record = json.loads(done.stdout.splitlines()[-1])
    return found


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="visits to each contender")
    parser.add_argument("--tiny", action="store_true", help="a few small tensors: to try the script")
    parser.add_argument("--out", type=Path, default=RESULTS / "without_compiler.json")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.child:
        optimizer, bits, case, rounds = given.child
        found = measure(optimizer, int(bits), case, int(rounds))
        print(json.dumps(found))
        return found
    torch.set_num_threads(1)
    found = {"about": records.machine(), "commit": records.commit(), "steps": {}}
    for case in ["tiny"] if given.tiny else [case for case in CASES if case != "tiny"]:
        for optimizer in OPTIMIZERS:
            for bits in (32, 8):
                key = f"{optimizer}, {bits} bits, {case}"
                found["steps"][key] = in_fresh_process(optimizer, bits, case, given.rounds)
                medians = {label: one["ms"] for label, one in found["steps"][key].items() if isinstance(one, dict)}
                print(key, *(f"{label} {ms:.2f} ms" for label, ms in medians.items()), sep="; ", flush=True)
    records.save(given.out, found)
    return found


if __name__ == "__main__":
    main()
