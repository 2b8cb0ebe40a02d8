"""The squared norm of the full gradient in the middle of a fit, from batches of the training loader."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor

from lightning_optim.analysis.gradient_square import FullGradient
from lightning_optim.analysis.gradients import Gradients
from lightning_optim.analysis.ranks import Ranks
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.distributed.placement import reshard
from lightning_optim.distributed.ranks import any_rank
from lightning_optim.errors import OptionError
from lightning_optim.training import extra_pass
from lightning_optim.training.without_trace import without_trace

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


def measure(
    trainer: Trainer, module: LightningModule, space: Vectors, batches: int, seed: int, owner: str
) -> FullGradient | str:
    """Measure the full gradient at the parameters of now, without a trace.

    Batches are those of an epoch in the order of the seed, in the mode and precision of training, each averaged over
    ranks. |G|^2 is the mean of <g_a, g_b> over pairs of different batches, which noise does not make larger; over a
    whole epoch it is the squared norm of the mean. Beside the gradient of a batch one sum of gradients is held.

    Args:
        trainer: The Trainer, during a fit.
        module: Its module.
        space: The space of its parameters.
        batches: Number of batches; fewer if the epoch is over.
        seed: Which batches.
        owner: Who asks, for the progress bar.

    Returns:
        The estimate; or the reason why there is none.

    Raises:
        OptionError: if a batch gives no gradient, on all ranks.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    scale = 1.0 if scaler is None else float(scaler.get_scale())
    sums, gradients, ranks = _Sums(space), Gradients(space), Ranks(space.params)
    with contextlib.ExitStack() as stack:
        stack.callback(reshard, trainer.strategy.model)
        stack.enter_context(without_trace(trainer, module))
        fixed = extra_pass.fixed(trainer, module, batches, seed)
        for index, batch in track(fixed, owner, disable=trainer.progress_bar_callback is None, transient=True):
            gradient = _gradient(trainer, module, gradients, batch, index, scale)
            if len(gradient[space.replicated]):
                ranks.mean(gradient[space.replicated])
            sums.add(gradient.div_(scale))
            del gradient
    return sums.result(whole=len(fixed) < batches)


def _gradient(
    trainer: Trainer, module: LightningModule, gradients: Gradients, batch: Any, index: int, scale: float
) -> Tensor:
    """The gradient of a batch. What fails on one rank is raised on all."""
    loss: Any = None
    problem = "training_step returns no loss with a gradient"
    try:
        output = extra_pass.step(trainer, module, batch, index)
        loss = output.get("loss") if isinstance(output, Mapping) else output
        problem = "" if isinstance(loss, Tensor) and loss.requires_grad else problem
    except Exception as error:  # training has to go on
        problem = extra_pass.reason(module, error)
    _refuse(problem)
    gradient = gradients.space.zeros()
    try:
        gradient = gradients.of(loss * scale)
    except (RuntimeError, OptionError) as error:
        problem = extra_pass.reason(module, error)
    _refuse(problem)
    return gradient


def _refuse(problem: str) -> None:
    if any_rank(bool(problem)):
        raise OptionError(problem or "training_step fails on another rank")


class _Sums:
    """What is left of the gradients of batches."""

    def __init__(self, space: Vectors) -> None:
        self._space, self._sum = space, space.zeros()
        self.count, self.skipped = 0, 0
        self._squares: list[float] = []
        self._products: list[float] = []  # of each gradient with the sum of those before it

    def add(self, gradient: Tensor) -> None:
        square = float(self._space.dots(gradient[None], gradient)[0])
        if not math.isfinite(square):
            self.skipped += 1
            return
        self._squares.append(square)
        self._products.append(float(self._space.dots(self._sum[None], gradient)[0]))
        self._sum += gradient
        self.count += 1

    def result(self, whole: bool) -> FullGradient | str:
        """|G|^2; its error from the scatter of <g_b, mean of those before> over the later half of the batches.

        Of a whole epoch the mean is the full gradient, and has no error.
        """
        m = self.count
        needed = 1 if whole else 8
        if m < needed:
            return f"{m} batches had a finite gradient ({self.skipped} had none), and at least {needed} must have one"
        squares, products = sum(self._squares), sum(self._products)
        plug_in = (squares + 2 * products) / m**2
        if whole:
            return FullGradient(plug_in, 0.0, plug_in, (squares / m - plug_in) * m / max(m - 1, 1))
        square = 2 * products / (m * (m - 1))
        of_mean = [d / b for b, d in enumerate(self._products) if b >= m // 2]
        error = math.sqrt(4 * float(torch.tensor(of_mean, dtype=torch.float64, device="cpu").var()) / m)
        return FullGradient(square, error, plug_in, (squares / m - plug_in) * m / (m - 1))
