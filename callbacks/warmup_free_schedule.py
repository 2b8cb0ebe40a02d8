"""Warm up without a length to tune.

Liu et al. 2019, arXiv:1908.03265; Ma & Yarats 2019, arXiv:1910.04209; Xiong et al. 2020, arXiv:2002.04745.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.distributed.placement import has_gradient
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.training import second_moment
from lightning_optim.training.learning_rates import LearningRates, learning_rates_of
from lightning_optim.training.schedules import (
    SCHEDULES,
    Schedule,
    factor,
    flat_linear,
    inverse_sqrt,
    length_if_known,
    steps_before,
    total_steps,
)
from lightning_optim.training.warmups import WARMUPS, can_rectify, length

NAME = "WarmupFreeSchedule"
ENOUGH = 0.9  # a warm-up that gets to this factor does not need a warning


class WarmupFreeSchedule(FitCallback):
    """Multiply learning rates by a warm-up whose length follows from the optimizer's beta2, and by a decay.

    `param_groups` has the learning rate of a step before its batch starts, so LearningRateMonitor logs the rate that is
    applied. It is also logged as `warmup_free_schedule/lr`, with the factor as `warmup_free_schedule/factor`. A step
    counts if parameters moved: not if a gradient scaler skipped it or the batch had no loss. Each optimizer has its own
    step counter, and each parameter group its own beta2.

    Sources: Ma & Yarats 2019, arXiv:1910.04209, section 5 ("linear" and "exponential"); Liu et al. 2019,
    arXiv:1908.03265, equation 4 ("rectified"); Xiong et al. 2020, arXiv:2002.04745 ("none").

    Args:
        warmup: The factor at step t = 1, 2, ...: "linear" is min(1, t (1 - beta2) / 2), "exponential" is
            1 - exp(-(1 - beta2) t), "rectified" is RAdam's r_t from the first step at which it exists. "none" is for
            RAdam itself and for Pre-LN transformers.
        decay: "constant", "cosine", "linear", "inverse_sqrt" or "flat_linear" over all steps of training. The warm-up
            also works with a scheduler that the module returns; another decay than "constant" is refused with one.
        final: The last factor of a decay; the least factor of "inverse_sqrt". Default: 0.
        decay_fraction: For "flat_linear": the fraction of training, in (0, 1], at whose end the rate decays. Default:
            0.2.
        timescale: For "inverse_sqrt": the number of steps after which the factor is 1 / sqrt(2), or below 1 a fraction
            of training. Default: 0.01.
        beta2: The decay of the second moment, in [0, 1). Default: that of the optimizer.
        total_steps: Number of steps of each optimizer in the whole training. Default: the Trainer's estimate, which
            does not exist in manual optimization.

    Raises:
        OptionError: if an option is out of range or has no effect. At the start of the fit: for an optimizer without a
            known second moment, or one that the warm-up does not suit; for a decay together with a scheduler, or
            without a known length of training. During training: if something else changes the learning rates.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim import AdamW
        >>> class Model(BoringModel):
        ...     def configure_optimizers(self):
        ...         return AdamW(self.parameters(), lr=1.0, betas=(0.9, 0.5))
        ...
        ...     def training_step(self, batch, batch_idx):
        ...         print(self.optimizers().param_groups[0]["lr"])
        ...         return super().training_step(batch, batch_idx)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=5, callbacks=[WarmupFreeSchedule("linear")], **options).fit(Model())
        0.25
        0.5
        0.75
        1.0
        1.0

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.WarmupFreeSchedule
                  init_args: {warmup: linear, decay: cosine}
    """

    def __init__(
        self,
        warmup: Literal["linear", "exponential", "rectified", "none"] = "linear",
        decay: Literal["constant", "cosine", "linear", "inverse_sqrt", "flat_linear"] = "constant",
        final: float | None = None,
        decay_fraction: float | None = None,
        timescale: int | float | None = None,
        beta2: float | None = None,
        total_steps: int | None = None,
    ) -> None:
        super().__init__()
        check = functools.partial(errors.check, NAME)
        errors.check_choice(NAME, "warmup", warmup, [*WARMUPS, "none"])
        errors.check_choice(NAME, "decay", decay, list(SCHEDULES))
        check("final", final, final is None or (is_number(final) and 0 <= final < math.inf), "at least 0")
        fraction = is_number(decay_fraction) and 0 < decay_fraction <= 1
        check("decay_fraction", decay_fraction, decay_fraction is None or fraction, "in (0, 1]")
        steps = is_number(timescale) and 0 < timescale < math.inf and (timescale < 1 or float(timescale).is_integer())
        check(
            "timescale", timescale, timescale is None or steps, "a number of steps, or a fraction of training below 1"
        )
        check("beta2", beta2, beta2 is None or (is_number(beta2) and 0 <= beta2 < 1), "in [0, 1)")
        check("total_steps", total_steps, total_steps is None or is_whole(total_steps), "an integer of at least 1")
        if warmup == "none" and decay == "constant":
            raise OptionError(f"{NAME}: warmup='none' with decay='constant' does nothing. Choose a warm-up or a decay.")
        self.warmup, self.decay = warmup, decay
        self.beta2 = None if beta2 is None else float(beta2)
        self.total_steps = None if total_steps is None else int(total_steps)
        self.final = 0.0 if final is None else float(final)
        self.decay_fraction = 0.2 if decay_fraction is None else float(decay_fraction)
        self.timescale = 0.01 if timescale is None else float(timescale)
        self._needs_total = decay != "constant" and not (decay == "inverse_sqrt" and self.timescale >= 1)
        _refuse_unused("final", final, decay != "constant", "decay='constant'")
        _refuse_unused("decay_fraction", decay_fraction, decay == "flat_linear", f"decay={decay!r}")
        _refuse_unused("timescale", timescale, decay == "inverse_sqrt", f"decay={decay!r}")
        _refuse_unused("beta2", beta2, warmup != "none", "warmup='none'")
        _refuse_unused("total_steps", total_steps, self._needs_total, f"decay={decay!r}, which needs no length,")

    @override
    def forget(self) -> None:
        self._total = math.inf
        self._betas: list[list[float]] = []  # the beta2 of each group of each optimizer
        self._rates: list[LearningRates] = []
        self._steps: list[int] = []  # number of steps of each optimizer
        self._loaded: list[int] = []  # those of a checkpoint, until training starts

    # ------------------------------------------------------------------ hooks

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        if schedulers and self.decay != "constant":
            raise OptionError(
                f"{NAME}: decay={self.decay!r} meets a scheduler ({', '.join(schedulers)}) that the module returns. "
                "Two decays would multiply: leave the one or the other out. With decay='constant' the warm-up "
                "multiplies the scheduler's learning rates."
            )
        if self._needs_total and self.total_steps is None:
            if not pl_module.automatic_optimization:
                raise OptionError(
                    f"{NAME}: in manual optimization the Trainer does not know how many steps each optimizer will "
                    f"take, and decay={self.decay!r} needs that. Set total_steps."
                )
            if trainer.max_epochs == -1 and trainer.max_steps == -1:
                raise self._unknown_length()
        for optimizer in trainer.optimizers:
            if self.decay != "constant" and getattr(optimizer, "own_average", False):
                raise OptionError(
                    f"{NAME}: {type(optimizer).__name__} averages its iterates instead of a decay, which "
                    f"decay={self.decay!r} would undo. Leave it out; a warm-up alone is served."
                )
        if self.warmup != "none":
            self._betas = [[self._beta(o, group) for group in o.param_groups] for o in trainer.optimizers]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In this hook, since now the loader exists and the states of a checkpoint are loaded under every strategy.
        if self._needs_total:
            self._total = total_steps(trainer) if self.total_steps is None else self.total_steps
            if not math.isfinite(self._total):
                raise self._unknown_length()
        # A run without a checkpoint begins with fresh optimizers, which need a warm-up even if the Trainer goes on.
        resumed = trainer.ckpt_path is not None
        joined = [steps_before(trainer, optimizer) if resumed else 0 for optimizer in trainer.optimizers]
        self._steps, self._loaded = self._loaded or joined, []
        self._warn_if_too_short(trainer)
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for i, optimizer in enumerate(trainer.optimizers):
            self._rates.append(learning_rates_of(optimizer, schedulers))
            self._rates[i].scale(NAME, self._factors(i))
            self.undo.append(functools.partial(self._rates[i].release, NAME))
            self.undo.append(optimizer.register_step_post_hook(functools.partial(self._after_step, i)).remove)

    def _after_step(self, i: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Without a gradient nothing moved. A step at other rates is not one of training: some strategies take a step
        # with rate 0 to create state, and other changes of a rate raise an error before the next batch.
        moved = any(has_gradient(p) for group in optimizer.param_groups for p in group["params"])
        if moved and self._rates[i].untouched():
            self._steps[i] += 1
            self._rates[i].scale(NAME, self._factors(i))

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for rates in self._rates:
            rates.check()
        if trainer._logger_connector.should_update_logs:
            for name, value in self._scalars(trainer).items():
                pl_module.log(f"warmup_free_schedule/{name}", value, on_step=True, on_epoch=False)

    def _scalars(self, trainer: Trainer) -> dict[str, float]:
        values = {}
        for i, optimizer in enumerate(trainer.optimizers):
            groups = optimizer.param_groups
            for j, (group, multiplier) in enumerate(zip(groups, self._factors(i), strict=True)):
                suffix = f"/{i}" if len(trainer.optimizers) > 1 else ""
                suffix += f"/{group.get('name', j)}" if len(groups) > 1 else ""
                values[f"lr{suffix}"], values[f"factor{suffix}"] = float(group["lr"]), multiplier
        return values

    @override
    def release(self) -> None:
        super().release()
        self._rates = []

    # ------------------------------------------------------------------ factors

    def _factors(self, i: int) -> list[float]:
        """The factor of each group for the next step of optimizer `i`."""
        t, groups = self._steps[i], len(self._rates[i].scheduled)
        decay = self._decay(t)
        if self.warmup == "none":
            return [decay] * groups
        return [WARMUPS[self.warmup](t + 1, beta2) * decay for beta2 in self._betas[i]]

    def _decay(self, step: int) -> float:
        shape: Schedule = SCHEDULES[self.decay]
        if self.decay == "inverse_sqrt":
            if not self._needs_total:
                return inverse_sqrt(step, self.final, self.timescale)
            shape = functools.partial(inverse_sqrt, timescale=self.timescale)
        if self.decay == "flat_linear":
            shape = functools.partial(flat_linear, fraction=self.decay_fraction)
        return factor(shape, step, self._total, 0, self.final)

    def _beta(self, optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> float:
        name = type(optimizer).__name__
        if group.get("warmup_steps"):
            raise OptionError(
                f"{NAME}: {name} warms up itself, with warmup_steps={group['warmup_steps']}, and two warm-ups would "
                "multiply. Set warmup_steps=0, or leave this callback out."
            )
        if {"RAdam", "ScheduleFreeRAdam"} & _names(optimizer) or group.get("rectify"):
            raise OptionError(
                f"{NAME}: {name} rectifies its steps itself, and a second warm-up would delay it. Set warmup='none'."
            )
        beta2 = second_moment.decay(optimizer, group) if self.beta2 is None else self.beta2
        if beta2 is None or not 0 <= beta2 < 1:
            raise OptionError(
                f"{NAME}: warmup={self.warmup!r} follows the decay of the second moment, and {name} has none that is "
                "known. Set warmup='none', or beta2=... if it has one."
            )
        if self.warmup == "rectified":
            if group.get("amsgrad") or _names(optimizer) & {"AdaMax", "Adamax"}:
                raise OptionError(
                    f"{NAME}: warmup='rectified' is derived for a plain mean of squares, and {name} divides by a "
                    "maximum. Set warmup='linear' or 'exponential'."
                )
            if not can_rectify(beta2):
                raise OptionError(
                    f"{NAME}: warmup='rectified' needs a beta2 above 0.6, and {name} has {beta2}. Set warmup='linear'."
                )
        return beta2

    def _warn_if_too_short(self, trainer: Trainer) -> None:
        """Warn if training ends during the warm-up."""
        steps = length_if_known(trainer) if self.total_steps is None else self.total_steps
        every = [(beta2, o) for o, betas in zip(trainer.optimizers, self._betas, strict=False) for beta2 in betas]
        if not every or not math.isfinite(steps) or vars(trainer).get("fast_dev_run"):
            return
        beta2, optimizer = max(every, key=lambda pair: pair[0])
        reached = WARMUPS[self.warmup](max(int(steps), 1), beta2)
        if reached >= ENOUGH:
            return
        shorter = round(1 - 10 / max(steps, 1), 4)
        advice = ", or set warmup='none'."
        if shorter >= 0.9:
            took = length(self.warmup, shorter)
            advice = f"; set a smaller beta2 of the optimizer, or here: {shorter} takes {took} steps{advice}"
        rank_zero_warn(
            f"{NAME}: training has {int(steps)} steps, and warmup={self.warmup!r} takes "
            f"{length(self.warmup, beta2)} with beta2={beta2} of {type(optimizer).__name__}. So the learning rate ends "
            f"at {100 * reached:.2g} % of what was asked for. Train longer{advice}"
        )

    def _unknown_length(self) -> OptionError:
        return OptionError(
            f"{NAME}: decay={self.decay!r} needs to know how long training is, and the Trainer cannot tell: it has "
            "neither max_epochs nor max_steps (max_time is no number of steps), or an epoch has no length. Set "
            "max_steps of the Trainer, or total_steps here."
        )

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self._loaded or self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if not self._rates:
            self._loaded = list(state_dict["steps"])
            return
        self._steps = list(state_dict["steps"])  # in the middle of a fit
        for i, rates in enumerate(self._rates):
            rates.scale(NAME, self._factors(i))


def _names(optimizer: torch.optim.Optimizer) -> set[str]:
    return {cls.__name__ for cls in type(optimizer).__mro__}


def _refuse_unused(name: str, value: Any, used: bool, where: str) -> None:
    if value is not None and not used:
        raise OptionError(f"{NAME}: {name}={value!r} does nothing with {where}. Leave it out.")
