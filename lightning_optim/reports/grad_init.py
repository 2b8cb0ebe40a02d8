"""The results of GradInit: a line and a table to print, and values for loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.table import Table

from lightning_optim.distributed.names import plain_name
from lightning_optim.training.grad_init import Iteration

PREFIX = "grad_init"


def summary(history: Sequence[Iteration]) -> str:
    """One line on a search.

    Example:
        >>> summary([Iteration("objective", 2.5, 0.3, 2.4), Iteration("constraint", 2.25, 1.5, None)])
        'GradInit: 2 iterations, 1 for the bound, loss 2.5 to 2.25, gradient norm 0.3 to 1.5'
    """
    if not history:
        return "GradInit: no iteration"
    over = sum(iteration.branch == "constraint" for iteration in history)
    first, last = history[0], history[-1]
    return (
        f"GradInit: {len(history)} iterations, {over} for the bound, loss {first.loss:.4g} to {last.loss:.4g}, "
        f"gradient norm {first.norm:.4g} to {last.norm:.4g}"
    )


def table(module: torch.nn.Module, scales: Mapping[str, float]) -> Table:
    """The scale of every parameter tensor, with its number of elements."""
    table = Table()
    table.add_column("block", overflow="fold")
    table.add_column("values", justify="right")
    table.add_column("scale", justify="right")
    for name, p in module.named_parameters():
        if name in scales:
            table.add_row(plain_name(name, module), f"{p.numel():,}", f"{scales[name]:.4f}")
    return table


def metrics(scales: Mapping[str, float], history: Sequence[Iteration]) -> dict[str, float]:
    """The values for any logger, by key."""
    values = {"iterations": float(len(history))}
    if history:
        values |= {"loss": history[-1].loss, "gradient_norm": history[-1].norm}
    if scales:
        values |= {"smallest_scale": min(scales.values()), "largest_scale": max(scales.values())}
    return {f"{PREFIX}/{name}": value for name, value in values.items()}


def write_to_tensorboard(writer: Any, scales: Mapping[str, float], history: Sequence[Iteration]) -> None:
    """The scales as a table and a histogram, and the search as curves over the iterations.

    Args:
        writer: A `SummaryWriter`.
        scales: The scales by parameter name.
        history: The iterations of the search.
    """
    rows = ["| block | scale |", "| --- | ---: |", *(f"| `{name}` | {scale:.4f} |" for name, scale in scales.items())]
    writer.add_text(f"{PREFIX}/scales", "\n".join(rows), 0)
    if scales:
        writer.add_histogram(
            f"{PREFIX}/scales", torch.tensor(list(scales.values()), dtype=torch.float32, device="cpu"), 0
        )
    for i, iteration in enumerate(history):
        curves = {"loss": iteration.loss, "gradient_norm": iteration.norm, "loss_after_step": iteration.loss_after}
        for name, value in curves.items():
            if value is not None:
                writer.add_scalar(f"{PREFIX}/search/{name}", value, i)
