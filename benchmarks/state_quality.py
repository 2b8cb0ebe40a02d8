"""How faithful state in few bits is over thousands of steps: `python benchmarks/state_quality.py`.

The same gradients go into AdamW with state in 32 bits and in fewer, and the last updates are compared: their relative
error, and their gain, which is the length along the true update. One round trip of a format says little: a second
moment moves a thousandth in a step, and a format that rounds it wrongly every time drifts.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lightning_optim import AdamW

STEPS = 3000
SHAPE = (64, 256)
CASES = ("stationary", "scale drops", "rare rows")
FORMATS: dict[str, dict[str, Any]] = {
    "16 bits (bfloat16, nearest)": {"state_bits": 16},
    "8 bits, dynamic": {"state_bits": 8, "state_format": "dynamic"},
    "8 bits, log": {"state_bits": 8, "state_format": "log"},
}


def closed_loop(case: str, options: dict[str, Any], seed: int = 0) -> tuple[float, float]:
    """Error and gain of the update after `STEPS` steps; rows and columns have log-normal scales."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(SHAPE[0], 1, generator=generator)
    scale = torch.exp(rows + torch.randn(1, SHAPE[1], generator=generator))
    exact, few = (torch.nn.Parameter(torch.zeros(SHAPE)) for _ in range(2))
    of_exact, of_few = AdamW([exact], lr=1.0, weight_decay=0.0), AdamW([few], lr=1.0, weight_decay=0.0, **options)
    for step in range(STEPS):
        if case == "scale drops" and step == STEPS // 2:
            scale[:, : SHAPE[1] // 2] *= 0.03
        grad = torch.randn(SHAPE, generator=generator) * scale
        if case == "rare rows":
            grad = grad * (torch.rand(SHAPE[0], 1, generator=generator) < 0.05)
        exact.grad = few.grad = grad
        with torch.no_grad():  # only the last update is looked at
            exact.zero_()
            few.zero_()
        of_exact.step()
        of_few.step()
    true, got = exact.detach().flatten(), few.detach().flatten()
    return float((got - true).norm() / true.norm()), float(got @ true / (true @ true))


def main() -> None:
    torch.set_num_threads(1)
    table = Table("format", *CASES, title=f"Error (gain) of AdamW's update after {STEPS} steps")
    results: dict[str, dict[str, tuple[float, float]]] = {}
    for name, options in FORMATS.items():
        results[name] = {case: closed_loop(case, options) for case in CASES}
        table.add_row(name, *(f"{error:.3f} ({gain:.2f})" for error, gain in results[name].values()))
    Console().print(table)
    about = {"torch": torch.__version__, "machine": platform.machine(), "steps": STEPS, "shape": SHAPE, "seed": 0}
    path = Path(__file__).parent / "results" / "state_quality.json"
    path.write_text(json.dumps({"about": about, "error and gain": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
