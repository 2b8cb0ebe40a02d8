"""Hardware counters of one launch of an optimizer's kernel: `python -m benchmarks.one_kernel adamw 8 --ncu`.

Without `--ncu` it takes a few steps on the matrices of GPT-2, so that each step is one launch over 124 million elements
in the given precision. With `--ncu` it does so under Nsight Compute, which has to be installed, and prints what was
counted in one launch after the kernel is warm, in the last line as JSON. `--show` prints the command line instead.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.contenders import SHARED
from benchmarks.shapes import gpt2_124m, tiny
from benchmarks.timing import random_params
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.storage.policy import SMALLEST

WARM, STEPS = 10, 12  # launches before the one that is counted: RAdam has changed its form by then
# By what the results call them. Nanoseconds, cycles and bytes.
METRICS = {
    "ns": "gpu__time_duration.sum",
    "cycles": "sm__cycles_elapsed.max",
    "bytes_read": "dram__bytes_read.sum",
    "bytes_written": "dram__bytes_write.sum",
    "instructions": "smsp__inst_executed.sum",
    "issue_active_percent": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
    "occupancy_percent": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "occupancy_limit_percent": "sm__maximum_warps_per_active_cycle_pct",
    "dram_percent": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "alu_instructions": "sm__inst_executed_pipe_alu.sum",
    "fma_instructions": "sm__inst_executed_pipe_fma.sum",
    "xu_instructions": "sm__inst_executed_pipe_xu.sum",
}
FEW = ("ns", "cycles", "bytes_read", "bytes_written", "instructions", "registers")


def take_steps(name: str, bits: int, small: bool) -> dict[str, Any]:
    """Take the steps, and say over how many elements."""
    shapes = [shape for shape in (tiny() if small else gpt2_124m()) if math.prod(shape) >= SMALLEST]
    device = torch.device("cpu" if small else "cuda")
    options: dict[str, Any] = {**SHARED.get(name, {"lr": 1e-4}), "state_bits": bits, "engine": "triton"}
    params = random_params(shapes, torch.float32, device)
    optimizer = OPTIMIZERS[name](params, **options)
    for _ in range(STEPS):
        optimizer.step()
    multiprocessors = 1 if small else torch.cuda.get_device_properties(device).multi_processor_count
    return {"elements": sum(p.numel() for p in params), "multiprocessors": multiprocessors}


def command(name: str, bits: int, metrics: Sequence[str]) -> list[str]:
    """The command line that counts one launch."""
    return [
        *("ncu", "--clock-control", "none", "--csv", "--page", "raw", "--print-units", "base"),
        *("--kernel-name", f"regex:^{name}_", "--launch-skip", str(WARM), "--launch-count", "1"),
        *("--metrics", ",".join(METRICS[word] for word in metrics)),
        *(sys.executable, "-m", "benchmarks.one_kernel", name, str(bits)),
    ]


def counted(output: str) -> dict[str, Any]:
    """What ncu printed, and the program under it.

    Args:
        output: Lines of JSON and of ncu's messages, and then a table: names of columns, units, and a launch in a line.

    Returns:
        The kernel, what the program said of itself and the metrics by their short names. `cycles_per_1024` are the
        cycles of one multiprocessor for 1024 elements.

    Raises:
        ValueError: where there is no launch in the table.
    """
    lines = output.splitlines()
    begin = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), None)
    rows = list(csv.DictReader(lines[begin:])) if begin is not None else []
    if len(rows) < 2:  # the first holds units
        raise ValueError(f"ncu measured no launch: {output[-1000:]}")
    row = rows[1]
    said: dict[str, Any] = next((json.loads(line) for line in lines if line.startswith('{"elements"')), {})
    found: dict[str, Any] = {"kernel": row["Kernel Name"], **said}
    for word, metric in METRICS.items():
        value = (row.get(metric) or "").replace(",", "")
        found |= {word: float(value)} if _is_number(value) else {}
    if {"cycles", "elements", "multiprocessors"} <= found.keys():
        found["cycles_per_1024"] = found["cycles"] * found["multiprocessors"] * 1024 / found["elements"]
    return found


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def measure(name: str, bits: int) -> dict[str, Any]:
    """Counters of one launch; the most important ones alone where ncu does not take them all."""
    problems: list[str] = []
    for metrics in (tuple(METRICS), FEW):
        done = subprocess.run(command(name, bits, metrics), capture_output=True, text=True, env=dict(os.environ))
        try:
            return counted(done.stdout)
        except ValueError as error:
            problems.append(f"{error} {done.stderr[-500:]}")
    return {"failed": problems}


def main(args: Sequence[str] | None = None) -> int:
    """Take steps, or count one of their launches."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a word such as adamw")
    parser.add_argument("bits", type=int, choices=(32, 16, 8))
    parser.add_argument("--ncu", action="store_true", help="count one launch with Nsight Compute")
    parser.add_argument("--show", action="store_true", help="print the command line")
    parser.add_argument("--tiny", action="store_true", help="small tensors, for the interpreter on a CPU")
    given = parser.parse_args(args)
    if given.show:
        print(shlex.join(command(given.name, given.bits, tuple(METRICS))))
    else:
        print(
            json.dumps(measure(given.name, given.bits) if given.ncu else take_steps(given.name, given.bits, given.tiny))
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
