"""Measures the accuracy of state in few bits over thousands of steps: `python -m benchmarks.state_quality`.

AdamW with 32-bit state and AdamW with fewer bits get the same gradients, and their last updates are compared: the
relative error, and the gain, which is the length along the true update. One round trip through a format says little. A
second moment changes by a thousandth per step, and a format that always rounds it in the wrong direction drifts.

Optimizers of other packages are included if they are installed (`benchmarks/peers.py`), with their own code for this
device.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.pages import RESULTS, table, write_part
from benchmarks.peers import PEERS, missing, versions
from lightning_optim import AdamW
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.storage import FORMATS

STEPS = 3000
SHAPE = (64, 256)
CASES = {
    "stationary": "stationary",
    "scale drops": "scale of half the columns drops 30-fold",
    "rare rows": "rare rows",
}
OPTIONS: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.0}
OURS: dict[str, dict[str, Any]] = {
    "16 bits (bfloat16, nearest)": {"state_bits": 16},
    "8 bits, dynamic": {"state_bits": 8, "state_format": "dynamic"},
    "8 bits, log": {"state_bits": 8, "state_format": "log"},
}

MOMENTUM = ("lion", "sgdw", "adabelief")  # optimizers whose first moment has no quantized second moment beside it
SEEDS, MOMENTUM_STEPS = 3, 1000  # with which momentum is measured, whose memory is shorter

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


def gradients(case: str, steps: int, seed: int) -> Iterator[torch.Tensor]:
    """Gradients on the CPU, of sizes that differ by row and column; in "scale drops" half of them shrink half-way."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(SHAPE[0], 1, generator=generator)
    scale = torch.exp(rows + torch.randn(1, SHAPE[1], generator=generator))
    for step in range(steps):
        if case == "scale drops" and step == steps // 2:
            scale[:, : SHAPE[1] // 2] *= 0.03
        grad = torch.randn(SHAPE, generator=generator) * scale
        if case == "rare rows":
            grad = grad * (torch.rand(SHAPE[0], 1, generator=generator) < 0.05)
        yield grad


def closed_loop(
    case: str, make: Make, steps: int, device: str = "cpu", dtype: torch.dtype | None = None, seed: int = 0
) -> tuple[float, float]:
    """Error and gain of the update after some steps; rows and columns have log-normal scales.

    Args:
        case: One of `CASES`.
        make: Makes the optimizer that is measured.
        steps: How many; the scale drops after half of them.
        device: Where both optimizers run.
        dtype: The type of the parameter and the gradients of the measured one; float32 if None.
        seed: Of the gradients.
    """
    exact = torch.nn.Parameter(torch.zeros(SHAPE, device=device))
    few = torch.nn.Parameter(torch.zeros(SHAPE, device=device, dtype=dtype))
    of_exact, of_few = torch.optim.AdamW([exact], **OPTIONS), make([few])
    for grad in gradients(case, steps, seed):
        exact.grad, few.grad = grad.to(device), grad.to(device, few.dtype)
        with torch.no_grad():  # only the last update is looked at
            exact.zero_()
            few.zero_()
        of_exact.step()
        of_few.step()
    true, got = exact.detach().double().flatten(), few.detach().double().flatten()
    return float((got - true).norm() / true.norm()), float(got @ true / (true @ true))


def momentum_loop(name: str, case: str, steps: int, device: str = "cpu", seed: int = 0) -> dict[str, float]:
    """The error of updates whose momentum has no second moment beside it, over the last 50 steps, by `state_format`.

    Args:
        name: The optimizer, at 32 bits and in each format at 8 bits.
        case: As in `closed_loop`.
        steps: How many; the scale drops after half of them.
        device: Where they run.
        seed: Of the gradients.
    """
    found: dict[str, tuple[torch.nn.Parameter, torch.optim.Optimizer]] = {}
    make: Any = OPTIMIZERS[name]
    for label in ("32 bits", *FORMATS):
        options = {"state_bits": 32} if label == "32 bits" else {"state_bits": 8, "state_format": label}
        p = torch.nn.Parameter(torch.zeros(SHAPE, device=device))
        found[label] = (p, make([p], lr=1.0, weight_decay=0.0, **options))
    squares, true = dict.fromkeys(FORMATS, 0.0), 0.0
    for step, grad in enumerate(gradients(case, steps, seed)):
        for p, optimizer in found.values():
            p.grad = grad.to(device)
            with torch.no_grad():
                p.zero_()
            optimizer.step()
        if step >= steps - 50:
            exact = found["32 bits"][0].detach()
            true += float(exact.square().sum())
            for label in FORMATS:
                squares[label] += float((found[label][0].detach() - exact).square().sum())
    return {label: (square / true) ** 0.5 for label, square in squares.items()}


def momentum_of(name: str, steps: int, device: str) -> dict[str, dict[str, float]]:
    """The error of an optimizer's updates by case and format, the root mean square over seeds."""
    runs = {case: [momentum_loop(name, case, steps, device, seed) for seed in range(SEEDS)] for case in CASES}
    return {
        case: {label: (sum(run[label] ** 2 for run in of_case) / SEEDS) ** 0.5 for label in FORMATS}
        for case, of_case in runs.items()
    }


def momentum_page(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """The table of updates from momentum."""
    rows = [
        [f"`{name}`, {label}", *(f"{of_case[label]:.3f}" for of_case in cases.values())]
        for name, cases in results.items()
        for label in FORMATS
    ]
    return table(["optimizer, format", *CASES.values()], rows)


def contenders() -> dict[str, tuple[Make, torch.dtype | None]]:
    """What is measured, by its label; a peer that is not installed is left out."""
    found: dict[str, tuple[Make, torch.dtype | None]] = {
        name: (functools.partial(AdamW, **OPTIONS, **options), None) for name, options in OURS.items()
    }
    for peer in PEERS["adamw"]:
        if peer.bits < 32 and not missing(peer):
            found[peer.label] = (functools.partial(peer.make, **OPTIONS), peer.dtype)
    return found


def measure(steps: int, device: str) -> dict[str, Any]:
    """Error and gain of every contender in every case, or why there are none."""
    results: dict[str, Any] = {peer.label: missing(peer) for peer in PEERS["adamw"] if peer.bits < 32 and missing(peer)}
    for name, (make, dtype) in contenders().items():
        try:
            results[name] = {case: closed_loop(case, make, steps, device, dtype) for case in CASES}
        except NotImplementedError as error:
            results[name] = str(error).rstrip(".")
        print(name, results[name], flush=True)
    return results


def page(results: dict[str, Any]) -> str:
    """The table."""
    rows = []
    for name in [*OURS, *(peer.label for peer in PEERS["adamw"] if peer.label in results)]:
        found = results[name]
        if isinstance(found, str):
            rows.append([name, *[f"– ({found})"] * len(CASES)])
        else:
            rows.append([name, *(f"{error:.3f} ({gain:.2f})" for error, gain in found.values())])
    return table(["format", *CASES.values()], rows)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS / "state_quality.json")
    parser.add_argument("--no-page", action="store_true", help="do not change the table in docs/state.md")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # of the peers' imports
    results = measure(given.steps, given.device)
    momentum = {name: momentum_of(name, min(given.steps, MOMENTUM_STEPS), given.device) for name in MOMENTUM}
    about = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "device": given.device,
        "steps": given.steps,
        "shape": SHAPE,
        "seed": 0,
        "peers": versions(),
    }
    given.out.write_text(json.dumps({"about": about, "error and gain": results, "momentum": momentum}, indent=1) + "\n")
    if not given.no_page:
        write_part("state.md", "closed loop", page(results))
        write_part("state.md", "momentum", momentum_page(momentum))


if __name__ == "__main__":
    main()
