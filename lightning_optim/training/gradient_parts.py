"""Squared norms of gradients at two batch sizes: those of parts and that of their mean, over all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten

from lightning_optim.distributed.placement import shard_of, values_of
from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.errors import OptionError
from lightning_optim.training import extra_pass
from lightning_optim.training.dry_run import halves_of, size_of
from lightning_optim.training.part_gradients import PartGradients
from lightning_optim.training.without_trace import without_trace

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

TOLERANCE = 0.05  # of a part's norm; rounding to bfloat16 stays far below


@dataclass(frozen=True)
class Measurement:
    """What all ranks saw of one step.

    Attributes:
        small: Sum over parts of the squared norm of the gradient, as the backward pass left it.
        square: Squared norm of the gradient of the step.
        parts: Number of parts, over all ranks.
        size: Samples in a part, in the harmonic mean.
        refusal: Why these numbers cannot be used, as a sentence; empty where they can.
    """

    small: float
    square: float
    parts: int
    size: float
    refusal: str = ""


@torch.no_grad()
def over_ranks(
    seen: PartGradients | None, params: Sequence[Tensor], sizes: Sequence[int], scale: float, unscaled: float
) -> Measurement:
    """Squared norms of the parts and of the gradient of a step, with one message of ten numbers.

    Args:
        seen: The gradients of this rank; None to look at that of the step only.
        params: The parameters of the optimizer, with the gradient of the step.
        sizes: Samples in each batch of this rank since `seen` looks; 0 where unknown.
        scale: What the loss was multiplied by, in the gradients of `seen`.
        unscaled: The same for those of the step: 1, unless the optimizer unscales in its step.
    """
    ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    sums, batches = ([], 0) if seen is None else seen.sums(params)
    device = next((p.device for p in params), torch.device("cpu"))
    of_parts = torch.stack(sums).sum(0) if sums else torch.zeros(2, dtype=torch.float64, device=device)
    whole = _of_step(params, ranks, device)
    values = torch.cat([of_parts.to(device), whole]).cpu().tolist()
    flags = [
        float(seen is not None and bool(sums) and not batches),
        float(seen is not None and batches > len(sizes)),
        float(seen is not None and not all(sizes[-batches:] if batches else sizes)),
        float(seen is not None and bool(seen.refusal)),
    ]
    of_sizes = sum(1 / size for size in sizes[-batches:] if size) if batches else 0.0
    mine = torch.tensor([*values, float(batches), of_sizes, *flags], dtype=torch.float64, device=device)
    total = (mean_over_ranks(mine) * ranks).tolist()
    small, elements, square, elements_of_step, parts, inverse = total[:6]
    small, elements = small / scale**2, elements / scale
    square, elements_of_step = square / unscaled**2, elements_of_step / unscaled
    refusal = _refusal(total[6:], seen)
    difference = abs(elements / ranks - elements_of_step)
    finite = math.isfinite(small) and math.isfinite(square)
    if seen is not None and not refusal and finite and difference > TOLERANCE * math.sqrt(small / ranks):
        refusal = (
            "the gradient of the step is not the mean of those of its parts. A communication hook that rounds or "
            "delays, a hook of the module or a callback before this one has changed it, or one backward pass counts "
            "twice. Put this callback before those that change gradients."
        )
    return Measurement(small, square, round(parts), parts / inverse if inverse else math.nan, refusal)


def _of_step(params: Sequence[Tensor], ranks: int, device: torch.device) -> Tensor:
    """This rank's share of the squared norm, and of the sum of all elements, of the gradient of the step."""
    found = torch.zeros(2, dtype=torch.float64, device=device)
    for p in params:
        if p.grad is None or not p.grad.numel():
            continue
        holders = math.prod(dist.get_world_size(group) for group in shard_of(p).process_groups)
        gradient = values_of(p.grad)
        square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        # Every rank of `ranks` adds, and of them `holders` hold different elements.
        found += torch.stack([square, gradient.sum(dtype=torch.float64)]) * (holders / ranks)
    return found


def _refusal(flags: Sequence[float], seen: PartGradients | None) -> str:
    if flags[3]:
        return f"{seen.refusal if seen is not None else ''}."
    if flags[1]:
        return (
            "a parameter got two gradients from one batch: there were two backward passes, or activation checkpoints "
            "that reenter autograd (use_reentrant=True). Sum the losses before one backward pass."
        )
    if flags[0]:
        return (
            "gradients were there before the first backward pass of the step. Remove them with "
            "zero_grad(set_to_none=True) before it."
        )
    if flags[2]:
        return "the number of samples in a batch is not known. Set batch_size to that of one rank."
    return ""


def samples_of(batch: Any) -> int:
    """The length of the first tensor in a batch; 0 if there is none.

    Example:
        >>> samples_of({"image": torch.zeros(3, 4), "label": torch.zeros(3)}), samples_of(["a"])
        (3, 0)
    """
    leaves, _ = tree_flatten(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim()), 0)


def halves(
    trainer: Trainer, module: LightningModule, params: Sequence[Tensor], batch: Any, index: int
) -> tuple[float, float] | str:
    """Run `training_step` on each half of a batch, without a trace.

    Args:
        trainer: The Trainer, of one process.
        module: Its module.
        params: The parameters, which are not sharded.
        batch: The batch.
        index: Its index.

    Returns:
        The mean squared norm of the gradients of the two, and the samples in each; or why there is none.
    """
    parts = halves_of(batch)
    if len(parts) < 2:
        return (
            "on one rank without accumulation a batch is run again in two halves, and this one cannot be split: it "
            "needs two samples or more, in tensors of equal first axes. Accumulate batches "
            "(accumulate_grad_batches=2), or train on several ranks."
        )
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    try:
        with without_trace(trainer, module):
            squares = [_square_of(trainer, module, params, part, index, scale) for part in parts]
    except Exception as error:  # batch normalization wants two samples, for one; training goes on
        why = extra_pass.reason(module, error)
        return why if isinstance(error, OptionError) else f"half of a batch cannot be run. {why}"
    return sum(squares) / 2, float(size_of(parts[0]))


def _square_of(
    trainer: Trainer, module: LightningModule, params: Sequence[Tensor], batch: Any, index: int, scale: float
) -> float:
    """The squared norm of the gradient of a batch."""
    output = extra_pass.step(trainer, module, batch, index)
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or not loss.requires_grad:
        raise OptionError("training_step returned no loss with a gradient.")
    gradients = torch.autograd.grad(loss * scale, params, allow_unused=True)
    norms = [torch.linalg.vector_norm(values_of(g), dtype=torch.float64) for g in gradients if g is not None]
    if not norms:
        raise OptionError("no parameter of the optimizer gets a gradient. Is the model frozen?")
    return float(torch.stack(norms).square().sum()) / scale**2
