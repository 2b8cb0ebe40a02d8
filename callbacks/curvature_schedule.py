"""Set learning rate and momentum from the spectrum of the Hessian while training.

Granziol, Zohren & Roberts 2022, "Learning rates as a function of batch size", JMLR 23(173), arXiv:2006.09092.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.batch_size import (
    batch_eigenvalue,
    effective_batch,
    full_eigenvalue,
    noise_between,
    noise_edge,
)
from lightning_optim.analysis.measured_spectrum import measured_spectrum
from lightning_optim.analysis.products import Products, products_of
from lightning_optim.analysis.spectrum_rates import METHODS, Method, Rates, Small, from_spectrum
from lightning_optim.callbacks.looking_callback import LookingCallback, Tick
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.training.learning_rates import LearningRates, learning_rates_of
from lightning_optim.training.step_limits import is_sgd

NAME = "CurvatureSchedule"
UNKNOWN = 0.1  # a residual above this share of the largest eigenvalue: Lanczos has not found it


class CurvatureSchedule(LookingCallback):
    """Set the learning rate and the momentum of SGD from the largest and a small eigenvalue of the Hessian.

    They are those with which SGD with momentum contracts fastest on a quadratic with this spectrum. The eigenvalues are
    absolute values that Lanczos finds on fixed batches; see `lightning_optim.analysis.from_spectrum`. Between two looks
    the rates stay, and a look changes each by a bounded factor. All parameter groups get the same.

    The Hessian of a batch is sharper than that of all data, and the more so the smaller it is. The largest eigenvalue
    on the fixed batches is therefore corrected to that of a batch of a training step: the noise between the products of
    single batches tells how much is due to noise. `learning_rate_factor` and `curvature_factor` of
    `lightning_optim.analysis` are the corrections between two batch sizes as functions: linear for SGD, a square root
    for adaptive methods.

    Checkpoints have the configured learning rates, and those that are set here are with the callback. Looking leaves no
    trace. It logs `curvature_schedule/lr`, `.../momentum`, `.../largest`,
    `.../corrected` (the largest eigenvalue for a batch of a step), `.../noise` and `.../residual`.

    Source: Granziol, Zohren & Roberts 2022, JMLR 23(173), arXiv:2006.09092, and its authors' code.

    Args:
        every_n_steps: Optimizer steps from one look to the next; the first is before training.
        steps: Number of Lanczos steps in a look. Each costs about 2 to 3 training steps on `batches` batches.
        method: "heavy_ball" for momentum, "nesterov" for Nesterov's, "gradient_descent" leaves momentum alone. "auto"
            follows the optimizer.
        small: Which value stands for the smallest eigenvalue: the "median" of the absolute values, or the "least",
            which falls with more steps.
        safety: The share of the learning rate that is taken, in (0, 1].
        most_change: The largest factor by which a look changes the learning rate, and 1 - momentum; above 1.
        batches: Number of training batches of each rank that are looked at, the same in the whole fit. The correction
            for the batch size needs 2 or more.
        seed: Which batches these are, and the seed of the vectors.

    Attributes:
        history: What each look has found, with `step` and `loss`.
        rates: The learning rate and the momentum that are set; None before the first look.

    Raises:
        OptionError: if an option is out of range; at the start of training, for another optimizer than SGD and SGDW of
            this package or torch, beside a scheduler or `BatchSizeScaling`, or if the loader gives its batches only
            once.

    Example:
        >>> import torch
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> class Model(BoringModel):
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)
        >>> schedule = CurvatureSchedule(every_n_steps=2, steps=5)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=4, callbacks=[schedule], **options).fit(Model())
        >>> [found["step"] for found in schedule.history], schedule.rates.lr > 0.01
        ([0, 2, 4], True)

        In a config:

        .. code-block:: yaml

            model:
              optimizer: {name: sgd, lr: 0.01, momentum: 0.9}
            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.CurvatureSchedule
                  init_args: {every_n_steps: 500}
    """

    prefix = "curvature_schedule"

    def __init__(
        self,
        every_n_steps: int = 1000,
        steps: int = 20,
        method: Literal["auto", "heavy_ball", "nesterov", "gradient_descent"] = "auto",
        small: Literal["median", "least"] = "median",
        safety: float = 0.9,
        most_change: float = 2.0,
        batches: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_steps, batches, seed)
        check = functools.partial(errors.check, NAME)
        check("steps", steps, is_whole(steps, 2) and steps <= 1000, "an integer from 2 to 1000")
        errors.check_choice(NAME, "method", method, ["auto", *METHODS])
        errors.check_choice(NAME, "small", small, ["median", "least"])
        check("safety", safety, is_number(safety) and 0 < safety <= 1, "in (0, 1]")
        bounded = is_number(most_change) and 1 < most_change < math.inf
        check("most_change", most_change, bounded, "a number above 1")
        self.steps = int(steps)
        self.method: Method | Literal["auto"] = method
        self.small: Small = small
        self.safety, self.most_change = float(safety), float(most_change)

    @override
    def forget(self) -> None:
        super().forget()
        self.rates: Rates | None = None
        self._rates: list[LearningRates] = []

    @override
    def release(self) -> None:
        super().release()
        self._rates = []

    # ------------------------------------------------------------------ hooks

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            if not is_sgd(optimizer):
                raise OptionError(
                    f"{NAME} sets the learning rate and momentum of SGD; {type(optimizer).__name__} steps otherwise. "
                    "Use sgd or sgdw, or CurvatureMonitor to see how far its steps are from the edge of stability."
                )
        others = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        others += [name for name in (type(one).__name__ for one in callbacks) if name == "BatchSizeScaling"]
        if others:
            raise OptionError(
                f"{NAME} sets the learning rate, and {others[0]} does too. Leave the one or the other out."
            )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rates = [learning_rates_of(optimizer, []) for optimizer in trainer.optimizers]
        for rates in self._rates:
            rates.scale(NAME, [1.0] * len(rates.scheduled))
            self.undo.append(functools.partial(rates.release, NAME))
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                self.undo.append(functools.partial(group.__setitem__, "momentum", group["momentum"]))
        if self.rates is not None:
            self._set(trainer, self.rates)
        super().on_train_start(trainer, pl_module)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for rates in self._rates:
            rates.check()

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "rates": None if self.rates is None else tuple(self.rates)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.rates = None if state_dict["rates"] is None else Rates(*state_dict["rates"])

    # ------------------------------------------------------------------ a look

    @override
    def products(self) -> int:
        return self.steps + (self.batches if self.batches > 1 else 0)

    @override
    def look(self, trainer: Trainer, times: Products, tick: Tick) -> dict[str, float]:
        def product(v: Tensor) -> Tensor:
            found = times(v, 1.0)
            tick()
            return found

        seen = measured_spectrum(product, times.space, self.steps, 1, self.seed)
        noise = self._noise(times, tick)
        corrected = self._corrected(trainer, seen.largest, noise)
        values, weights = seen.runs[0].nodes.clone(), seen.runs[0].weights
        values[-1] = corrected
        top = int(values.abs().argmax())
        residual = seen.largest_error if top else seen.smallest_error
        if seen.largest <= 0 or residual > UNKNOWN * float(values[top].abs()):
            raise OptionError(
                f"the largest eigenvalue {seen.largest:.3g} is not above 0, or known to {residual:.2g} only, so the "
                "rates stay. Raise steps."
            )
        self._set(trainer, self._damped(trainer, from_spectrum(values, weights, self._method(trainer), self.small)))
        assert self.rates is not None
        rates = self.rates._asdict()
        return {**rates, "largest": seen.largest, "corrected": corrected, "noise": noise, "residual": residual}

    def _noise(self, times: Products, tick: Tick) -> float:
        """The noise κ of a single batch of all ranks, from products of the Hessians of each with one vector."""
        if self.fixed is None or len(self.fixed) < 2:
            return math.nan
        space, params = times.space, list(self.fixed.parameters().values())
        z = space.random(self.seed, 2**31)
        z /= space.norm(z)
        found = []
        for i in range(len(self.fixed)):
            with products_of(NAME, self.fixed.of_batch(i), params, products=times.way) as of_batch:
                found.append(of_batch(z, 1.0))
            tick()
        return noise_between(space, found)

    def _corrected(self, trainer: Trainer, largest: float, noise: float) -> float:
        """The largest eigenvalue of the Hessian of a batch of a step, from that of the fixed batches."""
        if math.isnan(noise) or self.fixed is None or largest <= 0:
            return largest
        every = max(float(trainer.num_training_batches), float(len(self.fixed)))

        def of(batches: int) -> float:
            return noise / effective_batch(min(batches, every), every)

        here = of(len(self.fixed))
        if largest <= noise_edge(here):  # it is noise itself, which tells nothing about the rest
            return largest
        return batch_eigenvalue(full_eigenvalue(largest, here), of(trainer.accumulate_grad_batches))

    # ------------------------------------------------------------------ rates

    def _method(self, trainer: Trainer) -> Method:
        if self.method != "auto":
            return self.method
        group = trainer.optimizers[0].param_groups[0]
        return "gradient_descent" if not group["momentum"] else "nesterov" if group.get("nesterov") else "heavy_ball"

    def _damped(self, trainer: Trainer, target: Rates) -> Rates:
        """The target times the safety factor, as far as the bound on changes lets it."""
        group = trainer.optimizers[0].param_groups[0]
        lr, momentum = float(group["lr"]), float(group["momentum"])
        new = _within(self.safety * target.lr, lr, self.most_change) if lr else self.safety * target.lr
        rest = _within(1 - target.momentum, 1 - momentum, self.most_change)
        damped = momentum if self._method(trainer) == "gradient_descent" else min(max(1 - rest, 1e-4), 0.99)
        rates: tuple[float, float] = trainer.strategy.broadcast((new, damped))  # ranks must agree to the last bit
        return Rates(*rates)

    def _set(self, trainer: Trainer, rates: Rates) -> None:
        self.rates = rates
        for known, optimizer in zip(self._rates, trainer.optimizers, strict=True):
            known.scale(NAME, [rates.lr / scheduled if scheduled else 0.0 for scheduled in known.scheduled])
            for group in optimizer.param_groups:
                if group["momentum"]:
                    group["momentum"] = rates.momentum


def _within(value: float, before: float, factor: float) -> float:
    return min(max(value, before / factor), before * factor)
