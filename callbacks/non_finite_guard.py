"""Keep gradients that are not finite away from weights and state, the same way on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim.distributed.names import plain_name
from lightning_optim.distributed.placement import drop_gradients, local
from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.errors import OptionError


class NonFiniteGuard(Callback):
    """Skip the step, or raise, on all ranks where a gradient of any rank holds NaN or infinity.

    Under DDP a bad gradient is on all ranks once it is reduced; under FSDP it may lie in the shard of one. So the ranks
    agree by the mean of one number in each step. A skipped step is one without gradients: weights, state,
    counters and stages stay as they are, in our optimizers and in torch's. The Trainer counts it in `global_step`
    and moves the schedule, as it does when a gradient scaler skips.

    Put it before callbacks that read gradients. Each skip is logged as `skipped_steps`, the number so far.

    Args:
        action: "skip" the step, or "raise" an error.
        patience: Skips in a row after which it raises: weights that are not finite themselves never recover. None
            never raises.

    Raises:
        OptionError: where an option is out of range; when the fit starts, for "raise" beside a gradient scaler, which
            overflows as a matter of course.
    """

    def __init__(self, action: Literal["skip", "raise"] = "skip", patience: int | None = 10) -> None:
        if action not in ("skip", "raise"):
            raise OptionError(f"NonFiniteGuard: action={action!r} must be 'skip' or 'raise'.")
        if patience is not None and (type(patience) is not int or patience < 1):
            raise OptionError(f"NonFiniteGuard: patience={patience!r} must be an integer of at least 1, or None.")
        self.action, self.patience = action, patience
        self.skipped = 0
        self.in_a_row = 0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.action == "raise" and getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise OptionError(
                "NonFiniteGuard: action='raise' would end the training at the first overflow, and a gradient scaler "
                "finds its scale by overflows. Use action='skip', whose patience bounds them."
            )

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        params = [p for group in optimizer.param_groups for p in group["params"]]
        bad = torch.tensor(float(not all_finite(params)), device=trainer.strategy.root_device)
        if not mean_over_ranks(bad).item():
            self.in_a_row = 0
            return
        where = f"step {trainer.global_step}: {_first_bad(pl_module)}"
        if self.action == "raise":
            raise FloatingPointError(f"NonFiniteGuard: {where}.")
        drop_gradients(params)
        self.skipped += 1
        self.in_a_row += 1
        for logger in trainer.loggers:
            logger.log_metrics({"skipped_steps": float(self.skipped)}, trainer.global_step)
        if self.in_a_row == self.patience:
            raise FloatingPointError(
                f"NonFiniteGuard: {self.in_a_row} steps in a row were skipped, the last at {where}. Do the weights "
                "hold NaN already, or is the learning rate too large? Resume from an earlier checkpoint."
            )
        rank_zero_warn(f"NonFiniteGuard skips {where}.")

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped, self.in_a_row = state_dict["skipped"], state_dict["in_a_row"]


def all_finite(params: Iterable[Tensor]) -> bool:
    """Whether every gradient that this process holds, or the part that it holds, is finite."""
    parts = [_values(p.grad) for p in params if p.grad is not None]
    parts = [part for part in parts if part.numel()]
    # The Euclidean norm takes a thirtieth of the time on a CPU, but may overflow where all elements are finite.
    return any(_all_norms_finite(parts, order) for order in (2.0, math.inf))


def _all_norms_finite(parts: list[Tensor], order: float) -> bool:
    norms = torch._foreach_norm(parts, order) if parts else []  # pyright: ignore[reportPrivateImportUsage]
    return all(bool(torch.stack(same).isfinite().all()) for same in _by_type(norms))


def _by_type(norms: Iterable[Tensor]) -> list[list[Tensor]]:
    """Tensors sorted so that one call can take those of each list."""
    found: dict[Any, list[Tensor]] = {}
    for norm in norms:
        found.setdefault((norm.device, norm.dtype), []).append(norm)
    return list(found.values())


def _values(grad: Tensor) -> Tensor:
    part = local(grad)
    return part.coalesce().values() if part.is_sparse else part


def _first_bad(module: LightningModule) -> str:
    for name, p in module.named_parameters():
        if not all_finite([p]):
            return f"the gradient of {plain_name(name)} is not finite"
    return "another rank has a gradient that is not finite"
