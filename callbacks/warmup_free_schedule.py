"""Train without a tuned warm-up stage.

Liu et al. 2019, arXiv:1908.03265; Ma & Yarats 2019, arXiv:1910.04209; Xiong et al. 2020, arXiv:2002.04745.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.distributed.placement import has_gradient
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.training import second_moment
from lightning_optim.training.learning_rates import LearningRates, learning_rates_of
from lightning_optim.training.schedules import SCHEDULES, Schedule, factor, flat_linear, inverse_sqrt, total_steps
from lightning_optim.training.warmups import WARMUPS, can_rectify

NAME = "WarmupFreeSchedule"


class WarmupFreeSchedule(Callback):
    """Multiplies learning rates by a warm-up that the optimizer's own beta2 determines, and by a decay.

    The learning rate that each step applies is in `param_groups` before its batch starts, so LearningRateMonitor logs
    what is applied; it is logged as `warmup_free_schedule/lr` as well, with the factor. Steps are counted when
    parameters moved: one that a gradient scaler skipped, or a batch without a loss, does not count. Each optimizer has
    its own counter and each parameter group its own beta2.

    Args:
        warmup: "linear" is min(1, t (1 - beta2) / 2), "exponential" 1 - exp(-(1 - beta2) t), "rectified" RAdam's r_t
            from the first step at which it exists; "none" for RAdam itself and for Pre-LN transformers.
        decay: "constant", "cosine", "linear", "inverse_sqrt" or "flat_linear" over all steps of the training. The
            warm-up multiplies the rates of a scheduler that the module returns; a decay beside one is refused.
        final: The last factor of a decay; 0 by default. For "inverse_sqrt" the least factor.
        decay_fraction: For "flat_linear": the last part of training, in (0, 1], in which the rate falls; default 0.2.
        timescale: For "inverse_sqrt": the steps after which the factor is 1 / sqrt(2); a number below 1 is a fraction
            of training. 0.01 by default.
        beta2: The decay of the second moment, in [0, 1), where it cannot be found in the optimizer's options.
        total_steps: Steps of each optimizer in the whole training; by default what the Trainer says. In manual
            optimization it cannot know.

    Raises:
        OptionError: where an option is out of range or would do nothing; for an optimizer without a second moment, or
            one for which the warm-up is not made; where a decay meets a scheduler, or needs a length that is unknown.
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
        check = functools.partial(errors.check, NAME)
        check("warmup", warmup, warmup in [*WARMUPS, "none"], f"one of {', '.join(WARMUPS)}, none")
        check("decay", decay, decay in list(SCHEDULES), f"one of {', '.join(SCHEDULES)}")
        check("final", final, final is None or (is_number(final) and 0 <= final < math.inf), "at least 0")
        share = is_number(decay_fraction) and 0 < decay_fraction <= 1
        check("decay_fraction", decay_fraction, decay_fraction is None or share, "in (0, 1]")
        steps = is_number(timescale) and 0 < timescale < math.inf and (timescale < 1 or float(timescale).is_integer())
        check(
            "timescale", timescale, timescale is None or steps, "a number of steps, or a fraction of training below 1"
        )
        check("beta2", beta2, beta2 is None or (is_number(beta2) and 0 <= beta2 < 1), "in [0, 1)")
        check("total_steps", total_steps, total_steps is None or is_whole(total_steps), "an integer of at least 1")
        if warmup == "none" and decay == "constant":
            raise OptionError(f"{NAME}: warmup='none' with decay='constant' does nothing. Choose a warm-up or a decay.")
        self.warmup, self.decay, self.beta2, self.total_steps = warmup, decay, beta2, total_steps
        self.final = 0.0 if final is None else float(final)
        self.decay_fraction = 0.2 if decay_fraction is None else float(decay_fraction)
        self.timescale = 0.01 if timescale is None else timescale
        self._needs_total = decay != "constant" and not (decay == "inverse_sqrt" and self.timescale >= 1)
        _only("final", final, decay != "constant", "decay='constant'")
        _only("decay_fraction", decay_fraction, decay == "flat_linear", f"decay={decay!r}")
        _only("timescale", timescale, decay == "inverse_sqrt", f"decay={decay!r}")
        _only("beta2", beta2, warmup != "none", "warmup='none'")
        _only("total_steps", total_steps, self._needs_total, f"decay={decay!r}, which needs no length,")
        self._total = math.inf
        self._betas: list[list[float]] = []  # of each optimizer's groups
        self._rates: list[LearningRates] = []
        self._steps: list[int] = []  # that each optimizer has taken
        self._undo: list[Callable[[], None]] = []
        self._loaded: list[int] | None = None

    # ------------------------------------------------------------------ when

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
                raise self._endless()
        if self.warmup != "none":
            self._betas = [[self._beta(o, group) for group in o.param_groups] for o in trainer.optimizers]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: now the states of a checkpoint are in place, whatever the strategy, and the loader is made.
        if self._needs_total:
            self._total = total_steps(trainer) if self.total_steps is None else self.total_steps
            if not math.isfinite(self._total):
                raise self._endless()
        self._steps = self._loaded or [_steps_before(trainer, optimizer) for optimizer in trainer.optimizers]
        self._loaded = None
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        for i, optimizer in enumerate(trainer.optimizers):
            self._rates.append(learning_rates_of(optimizer, schedulers))
            self._rates[i].scale(NAME, self._factors(i))
            self._undo.append(functools.partial(self._rates[i].release, NAME))
            self._undo.append(optimizer.register_step_post_hook(functools.partial(self._after_step, i)).remove)

    def _after_step(self, i: int, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # Without a gradient nothing moved. A step at other rates is no step of the training: a strategy takes one at 0
        # to have some state to save, and what else changed them is found before the next batch.
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
        found = {}
        for i, optimizer in enumerate(trainer.optimizers):
            groups = optimizer.param_groups
            for j, (group, multiplier) in enumerate(zip(groups, self._factors(i), strict=True)):
                where = f"/{i}" if len(trainer.optimizers) > 1 else ""
                where += f"/{group.get('name', j)}" if len(groups) > 1 else ""
                found[f"lr{where}"], found[f"factor{where}"] = float(group["lr"]), multiplier
        return found

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        while self._undo:
            self._undo.pop()()
        self._rates.clear()

    # ------------------------------------------------------------------ what

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
        if "RAdam" in _names(optimizer) or group.get("rectify"):
            raise OptionError(
                f"{NAME}: {name} rectifies its steps itself, and a second warm-up would delay it. Set warmup='none'."
            )
        beta2 = second_moment.decay(optimizer, group) if self.beta2 is None else self.beta2
        if beta2 is None or not 0 <= beta2 < 1:
            raise OptionError(
                f"{NAME}: warmup={self.warmup!r} follows the decay of the second moment, and {name} has none that is "
                "known. Set warmup='none', or say beta2=... if there is one."
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

    def _endless(self) -> OptionError:
        return OptionError(
            f"{NAME}: decay={self.decay!r} needs to know how long training is, and the Trainer cannot tell: it has "
            "neither max_epochs nor max_steps (max_time is no number of steps), or an epoch has no length. Set "
            "max_steps of the Trainer, or total_steps here."
        )

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": list(self._steps)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = list(state_dict["steps"])


def _steps_before(trainer: Trainer, optimizer: torch.optim.Optimizer) -> int:
    """The steps that an optimizer took in a run that this callback joins when it resumes."""
    if trainer.ckpt_path is None:
        return 0
    counters = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
    return max(counters, default=trainer.global_step)


def _names(optimizer: torch.optim.Optimizer) -> set[str]:
    return {cls.__name__ for cls in type(optimizer).__mro__}


def _only(name: str, value: Any, used: bool, where: str) -> None:
    if value is not None and not used:
        raise OptionError(f"{NAME}: {name}={value!r} does nothing with {where}. Leave it out.")
