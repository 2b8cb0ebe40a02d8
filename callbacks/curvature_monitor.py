"""Watch the eigenvalues of the Hessian during training, and how close steps are to the edge of stability.

Cohen et al. 2021, arXiv:2103.00065; for adaptive methods Cohen et al. 2022, arXiv:2207.14484; the density of the
spectrum by Lanczos: Ghorbani, Krishnan & Xiao 2019, arXiv:1901.10159.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.density import smoothed
from lightning_optim.analysis.measured_spectrum import MeasuredSpectrum, measured_spectrum
from lightning_optim.analysis.products import Products
from lightning_optim.callbacks.looking_callback import LookingCallback, Tick
from lightning_optim.errors import OptionError, is_whole
from lightning_optim.reports.spectrum import density_figure
from lightning_optim.training.step_limits import StepLimit, is_sgd, step_limits

NAME = "CurvatureMonitor"


class CurvatureMonitor(LookingCallback):
    """Log the largest and the smallest eigenvalue of the Hessian, its trace and density, and the stability of steps.

    On a quadratic, steps of SGD diverge along an eigenvector whose eigenvalue is above 2 / lr, or 2 (1 + momentum) / lr
    with momentum. `curvature/stability` is the largest eigenvalue over this threshold: training with full batches rises
    to 1 and stays there, the edge of stability; with small batches it stays below. For Adam, AdamW and RMSprop it is
    that of the Hessian between the inverse roots of the preconditioner. Parameter groups with learning rates of their
    own are taken into account.

    The Hessian is that of the training loss on fixed batches, without dropout and in full precision, by Lanczos.
    Training does not notice: no generator moves, gradients, buffers and data order are what they were. Under FSDP
    products are central differences.

    It logs `curvature/largest`, `.../smallest`, each with `..._error`, `.../trace` and `.../trace_error`,
    `.../gradient_norm`, and where the optimizer's threshold is known `.../stability`, `.../threshold`,
    `.../lr_times_largest` and `.../lr_times_smallest`; for adaptive methods `.../preconditioned_largest` and
    `.../preconditioned_smallest`, of which the last products are taken. With matplotlib the density is a figure in
    TensorBoard.

    Sources: Cohen et al. 2021, arXiv:2103.00065; Cohen et al. 2022, arXiv:2207.14484.

    Args:
        every_n_steps: Optimizer steps from one look to the next; the first is before training.
        steps: Number of Lanczos steps from each random vector. Each costs about 2 to 3 training steps, and one vector
            of the size of the model is held for each.
        probes: Number of random vectors, which the trace and the density are means over.
        batches: Number of training batches of each rank that are looked at, the same in the whole fit. The largest
            eigenvalue of few samples is above that of all data.
        seed: Which batches these are, and the seed of the vectors.

    Attributes:
        history: What each look has found, with `step` and `loss`.
        spectrum: What the last look has found; None before.

    Raises:
        OptionError: if an option is out of range; at the start of training, if the loader gives its batches only once.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> monitor = CurvatureMonitor(every_n_steps=2, steps=5)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=4, callbacks=[monitor], **options).fit(BoringModel())
        >>> [found["step"] for found in monitor.history], monitor.history[0]["threshold"]  # SGD with lr=0.1
        ([0, 2, 4], 20.0)

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.CurvatureMonitor
                  init_args: {every_n_steps: 500}
    """

    prefix = "curvature"

    def __init__(
        self, every_n_steps: int = 1000, steps: int = 20, probes: int = 2, batches: int = 1, seed: int = 0
    ) -> None:
        super().__init__(every_n_steps, batches, seed)
        errors.check(NAME, "steps", steps, is_whole(steps, 2) and steps <= 1000, "an integer from 2 to 1000")
        errors.check(NAME, "probes", probes, is_whole(probes) and probes < 2**31, "an integer of at least 1")
        self.steps, self.probes = int(steps), int(probes)

    @override
    def forget(self) -> None:
        super().forget()
        self.spectrum: MeasuredSpectrum | None = None
        self._dimension = 0

    @override
    def products(self) -> int:
        return self.steps * (self.probes + 1)

    @override
    def look(self, trainer: Trainer, times: Products, tick: Tick) -> dict[str, float]:
        def product(v: Tensor) -> Tensor:
            found = times(v, 1.0)
            tick()
            return found

        self._dimension = times.space.dimension
        self.spectrum = seen = measured_spectrum(product, times.space, self.steps, self.probes, self.seed)
        found = {name: value for name, value in seen._asdict().items() if isinstance(value, float)}
        found["gradient_norm"] = times.space.norm(times.gradient)
        return {**found, **self._stability(trainer, times, seen, tick)}

    @override
    def draw(self, trainer: Trainer) -> Mapping[str, Any]:
        if self.spectrum is None:
            return {}
        threshold = self.history[-1].get("threshold", math.inf)
        marks = [(threshold, "stable up to")] if threshold <= 4 * abs(self.spectrum.largest) else []
        title = f"Hessian at step {trainer.global_step}"
        curve = smoothed(self.spectrum.runs, self._dimension)
        return {"density": density_figure(curve.grid, curve.density, title, marks)}

    # ------------------------------------------------------------------ the edge of stability

    def _stability(self, trainer: Trainer, times: Products, seen: MeasuredSpectrum, tick: Tick) -> dict[str, float]:
        limits = self._limits(trainer, times)
        if limits is None:
            return {}
        rates, thresholds = {limit.lr for limit in limits}, {limit.threshold for limit in limits}
        lr = rates.pop() if len(rates) == 1 else math.nan
        threshold = thresholds.pop() if len(thresholds) == 1 else math.nan
        if not math.isnan(threshold) and all(limit.preconditioner is None for limit in limits):
            return {
                "threshold": threshold,
                "stability": seen.largest / threshold,
                "lr_times_largest": lr * seen.largest,
                "lr_times_smallest": lr * seen.smallest,
            }
        low, high = self._scaled(times, limits, tick)
        return {
            "threshold": threshold,
            "stability": high,
            "preconditioned_largest": high * threshold,
            "preconditioned_smallest": low * threshold,
            "lr_times_largest": lr * high * threshold,
            "lr_times_smallest": lr * low * threshold,
        }

    def _limits(self, trainer: Trainer, times: Products) -> Sequence[StepLimit] | None:
        """The limit of each parameter; None where there is none yet, or none is known."""
        if trainer.global_step == 0 and not all(map(is_sgd, trainer.optimizers)):
            return None
        try:
            known = {p: limit for optimizer in trainer.optimizers for p, limit in step_limits(optimizer).items()}
        except OptionError as error:
            self.warn_once(f"{NAME} logs eigenvalues, but no stability: {error}.")
            return None
        return [known.get(p, StepLimit(0.0, math.inf, None)) for p in times.space.params]

    def _scaled(self, times: Products, limits: Sequence[StepLimit], tick: Tick) -> tuple[float, float]:
        """The smallest and the largest eigenvalue of the Hessian in units of what each parameter tolerates."""
        space = times.space
        parts = zip(space.shards(space.zeros()), limits, strict=True)
        root = space.flat([_share(part, limit) for part, limit in parts]).sqrt_()

        def product(v: Tensor) -> Tensor:
            found = times(root * v).mul_(root)
            tick()
            return found

        found = measured_spectrum(product, space, self.steps, 1, self.seed)
        return found.smallest, found.largest


def _share(part: Tensor, limit: StepLimit) -> Tensor:
    """The share of an eigenvalue of 1 in what is stable, element by element."""
    divisor = limit.threshold if limit.preconditioner is None else limit.threshold * limit.preconditioner
    return torch.ones_like(part) / divisor
