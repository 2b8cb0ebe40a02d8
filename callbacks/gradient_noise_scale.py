"""Measure the gradient noise scale, an estimate of the critical batch size, while training.

McCandlish, Kaplan, Amodei & the OpenAI Dota Team 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
)
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.noise_scale import from_two_sizes, steps_and_samples
from lightning_optim.analysis.running_noise_scale import RunningNoiseScale
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.distributed.placement import is_sharded
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.training.gradient_parts import Measurement, halves, over_ranks, samples_of
from lightning_optim.training.lightning_names import is_a
from lightning_optim.training.part_gradients import PartGradients

NAME = "GradientNoiseScale"


class GradientNoiseScale(FitCallback):
    """Estimate the gradient noise scale B = tr(Sigma) / |G|^2 during training; it approximates the critical batch size.

    Well below that batch size, twice the samples in a step save nearly half of the steps; well above, they save
    nothing. At it, training takes twice the least number of steps, and twice the least number of samples.

    Squared norms of gradients at two batch sizes tell noise from signal. The small ones are the gradients of each
    rank and of each accumulated batch, seen by hooks on their way, before ranks are averaged; the large one is the
    gradient of the step. With one rank and no accumulation, each half of a batch is run once more, without a trace.
    Ranks exchange one message of ten numbers for a measurement. Nothing is copied; the halves hold one more gradient
    while they run. Between measurements the callback does nothing.

    Put it before callbacks that change gradients. The loss must be a mean over the samples of a batch.

    Source: McCandlish et al. 2018, arXiv:1812.06162, section 2.2 and appendix A.1.

    Args:
        every: Optimizer steps from one measurement to the next, at least 1.
        decay: Weight of earlier measurements in the moving averages of tr(Sigma) and |G|^2, in (0, 1): 0.99 averages
            over about 100.
        batch_size: Number of samples in a batch of one rank; tokens, where the loss is a mean over tokens. Default: the
            first axis of the first tensor in the batch.

    Attributes:
        running: For each optimizer its moving averages. `running[0].value` is the estimate with its standard error.

    Raises:
        OptionError: if an option is out of range; at the start of the fit, under a strategy whose gradients cannot be
            seen (DeepSpeed and others).

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> noise_scale = GradientNoiseScale(every=1)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(fast_dev_run=8, accumulate_grad_batches=4, callbacks=[noise_scale], **options)
        >>> trainer.fit(BoringModel())
        GradientNoiseScale: ... after 2 measurements...
        >>> noise_scale.running[0].count
        2

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.GradientNoiseScale
                  init_args: {every: 10}
    """

    def __init__(self, every: int = 10, decay: float = 0.99, batch_size: int | None = None) -> None:
        super().__init__()
        check = functools.partial(errors.check, NAME)
        check("every", every, is_whole(every), "an integer of at least 1")
        check("decay", decay, is_number(decay) and 0 < decay < 1, "in (0, 1)")
        whole = batch_size is None or is_whole(batch_size)
        check("batch_size", batch_size, whole, "an integer of at least 1, or None")
        self.every, self.decay = int(every), float(decay)
        self.batch_size = None if batch_size is None else int(batch_size)

    @override
    def forget(self) -> None:
        self.running: list[RunningNoiseScale] = []
        self.batch = math.nan  # samples in the last measured step
        self._steps: list[int] = []  # of each optimizer
        self._loaded: dict[str, Any] = {}
        self._parts: PartGradients | None = None
        self._sizes: list[int] = []  # of the batches since hooks are there; 0 where it is unknown
        self._halves: tuple[float, float] | None = None  # mean squared norm and size of the halves of this batch
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ hooks

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        served = is_a(trainer.strategy, SingleDeviceStrategy, DDPStrategy, FSDPStrategy, ModelParallelStrategy)
        if not served or is_a(trainer.strategy, DeepSpeedStrategy):
            raise OptionError(
                f"{NAME} cannot see the gradients of each rank under {type(trainer.strategy).__name__}. Use one "
                "device, 'ddp', FSDPStrategy or ModelParallelStrategy, or remove the callback."
            )
        self.running = [RunningNoiseScale(self.decay) for _ in trainer.optimizers]
        self._steps = [0 for _ in trainer.optimizers]
        self._restore()

    def _restore(self) -> None:
        if self._loaded and len(self._loaded["steps"]) == len(self._steps):
            self._steps = list(self._loaded["steps"])
            for running, state in zip(self.running, self._loaded["running"], strict=True):
                running.load(state)
        self._loaded = {}

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        automatic = pl_module.automatic_optimization
        if automatic and batch_idx % trainer.accumulate_grad_batches == 0:
            self._look_away()
        if self._parts is None:
            if not any(step % self.every == 0 for step in self._steps):
                return
            if automatic and batch_idx % trainer.accumulate_grad_batches:
                return
            if automatic and trainer.world_size * trainer.accumulate_grad_batches == 1:
                self._run_halves(trainer, pl_module, batch, batch_idx)
                return
            self._parts = PartGradients(trainer.strategy.model or pl_module, fresh=not automatic)
        self._sizes.append(samples_of(batch) if self.batch_size is None else self.batch_size)

    def _run_halves(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        params = [p for p in _params(trainer.optimizers[0]) if p.requires_grad]
        if any(map(is_sharded, params)):
            self._warn(
                "on one rank a sharded model shows no second batch size. Accumulate two batches or more "
                "(accumulate_grad_batches=2), or leave the model whole."
            )
            return
        found = halves(trainer, pl_module, params, batch, batch_idx)
        if isinstance(found, str):
            self._warn(found)
            return
        square, size = found
        self._halves = (square, size if self.batch_size is None else self.batch_size / 2)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        i = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
        due = self._steps[i] % self.every == 0
        self._steps[i] += 1
        if not due:
            return
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        unscaled = 1.0 if scaler is None or not getattr(optimizer, "_step_supports_amp_scaling", False) else scale
        if self._halves is not None:
            whole = over_ranks(None, _params(optimizer), [], 1.0, unscaled)
            square, size = self._halves
            self._halves = None  # an optimizer may go on with its closure at other weights
            self._take(trainer, i, whole.square, square, 2 * size, size)
        elif self._parts is not None:
            found = over_ranks(self._parts, _params(optimizer), self._sizes, scale, unscaled)
            self._parts.reset(_params(optimizer))
            normalize = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 0
            self._measure(trainer, i, found, normalize)

    def _measure(self, trainer: Trainer, i: int, found: Measurement, normalize: int) -> None:
        """Take in what parts and their mean say, or say why not."""
        if found.refusal:
            self._warn(found.refusal)
            return
        if found.parts < 2:
            if not normalize and trainer.world_size == 1:
                self._warn(
                    "under manual optimization on one rank, a step after each batch shows one batch size only. "
                    "Accumulate several batches before a step, or train on several ranks."
                )
            return
        of_rank = found.parts / trainer.world_size
        factor = normalize or of_rank  # the loss of a batch was divided by it
        mean = found.square * (factor / of_rank) ** 2
        small = found.small * factor**2 / found.parts
        self._take(trainer, i, mean, small, found.parts * found.size, found.size)

    def _take(self, trainer: Trainer, i: int, mean: float, small: float, batch: float, size: float) -> None:
        if not (math.isfinite(mean) and math.isfinite(small)):
            return  # an overflow, whose step a gradient scaler or NonFiniteGuard skips
        self.batch = batch
        self.running[i].add(*from_two_sizes(small, mean, size, batch))
        if trainer.loggers and trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._log(trainer, i)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._halves = None
        if pl_module.automatic_optimization:
            if trainer.fit_loop.epoch_loop._should_accumulate():
                return
            self._look_away()
        elif self._parts is not None and not any(step % self.every == 0 for step in self._steps):
            self._look_away()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for i, running in enumerate(self.running):
            owner = NAME if len(self.running) == 1 else f"{NAME}, optimizer {i}"
            _print(f"{owner}: {running.value} after {running.count} measurements{self._costs(running.value.estimate)}")

    def _costs(self, critical: float) -> str:
        if not (critical > 0 and self.batch > 0):
            return ""
        steps, samples = steps_and_samples(self.batch, critical)
        return (
            f". At {self.batch:g} samples in a step, training takes {steps:.3g} times the least number of steps, and "
            f"{samples:.3g} times the least number of samples"
        )

    def _look_away(self) -> None:
        if self._parts is not None:
            self._parts.detach()
        self._parts, self._sizes = None, []

    @override
    def release(self) -> None:
        super().release()
        if "_parts" in vars(self):
            self._look_away()

    # ------------------------------------------------------------------ what comes of it

    def _log(self, trainer: Trainer, i: int) -> None:
        prefix = "gradient_noise_scale" if len(self.running) == 1 else f"gradient_noise_scale/{i}"
        found = self.running[i].value
        values = {
            "critical_batch_size": found.estimate,
            "critical_batch_size_error": found.standard_error,
            "trace": found.trace,
            "signal": found.signal,
            "batch": self.batch,
        }
        known = {f"{prefix}/{name}": value for name, value in values.items() if math.isfinite(value)}
        for logger in trainer.loggers:
            logger.log_metrics(known, trainer.global_step)

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            rank_zero_warn(f"{NAME} measures nothing: {why[0].lower() + why[1:]}")

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._loaded:
            return self._loaded
        return {"steps": list(self._steps), "running": [running.state() for running in self.running]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)
        if self.running:  # a strategy that loads after the fit has started
            self._restore()


def _params(optimizer: Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


@rank_zero_only
def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, highlight=False)
