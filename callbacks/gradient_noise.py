"""Noise on the gradients.  Neelakantan et al. 2015, arXiv:1511.06807."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.core.foreign_stages import attach, on_gradients
from lightning_optim.core.standalone_stages import OnGradients
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.distributed.norms import count, norm
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.stages.noise import Kind, Noise
from lightning_optim.training import second_moment
from lightning_optim.training.clipping import GradientClipping
from lightning_optim.training.second_moment import SecondMoment


class GradientNoise(Callback):
    """Add normal noise of variance eta / (1 + t)^gamma to the gradients of the t-th real step, t = 0, 1, ...

    What is drawn for an element is a function of the seed, the step, the name of the tensor and the place in it alone.
    So replicas draw the same, shards draw their parts of the same, any number of ranks under any strategy sees the same
    noise, a resumed run goes on with it, and no other random number changes.

    Args:
        eta: Variance at t = 0, at least 0, in the square of the units of `kind`. With `gamma=0` and a shaped kind it is
            B / B' - 1, to make batches of B as noisy as batches of B'.
        gamma: How fast the variance falls; 0 keeps it.
        kind: "isotropic" is the paper's, in the units of the gradient. "second_moment" is in units of the root of the
            optimizer's mean squared gradient for each element (`exp_avg_sq`), "moments" of the standard deviation of
            the gradient for each element, from two running means that it keeps itself.
        clipping: "before" adds the noise before the Trainer or the module clips gradients, so that clipping bounds it;
            "after" adds it to the clipped ones. Without clipping they are the same. See the documentation.
        start: Real steps without noise at the beginning.
        decay: Decay of the two running means of "moments", in (0, 1).
        seed: Chooses the noise. By default that of `seed_everything`, or 0.

    Raises:
        OptionError: where an option is out of range, where "second_moment" finds none, and where "after" cannot be kept
            since the optimizer clips in its own update.
    """

    def __init__(
        self,
        eta: float = 0.01,
        gamma: float = 0.55,
        kind: Kind = "isotropic",
        clipping: Literal["before", "after"] = "before",
        start: int = 0,
        decay: float = 0.99,
        seed: int | None = None,
    ) -> None:
        check = functools.partial(errors.check, "GradientNoise")
        for name, value in (("eta", eta), ("gamma", gamma)):
            check(name, value, is_number(value) and 0 <= value < math.inf, "a finite number of at least 0")
        kinds = ("isotropic", "second_moment", "moments")
        check("kind", kind, kind in kinds, "'isotropic', 'second_moment' or 'moments'")
        check("clipping", clipping, clipping in ("before", "after"), "'before' or 'after'")
        check("start", start, is_whole(start, 0), "an integer of at least 0")
        check("decay", decay, is_number(decay) and 0 < decay < 1, "in (0, 1)")
        check("seed", seed, seed is None or (is_whole(seed, 0) and seed < 2**64), "an integer of 64 bits")
        self.eta, self.gamma, self.kind, self.clipping = float(eta), float(gamma), kind, clipping
        self.start, self.decay, self.seed = start, float(decay), seed
        self._stages: list[Noise] = []
        self._by_hand: dict[int, OnGradients] = {}  # where the noise comes before clipping, by the optimizer's id
        self._detach: list[Callable[[], None]] = []
        self._loaded: dict[str, Any] | None = None

    # ------------------------------------------------------------------ when

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        by_hand = self.clipping == "before" and clips(trainer, pl_module)
        seed = trainer.strategy.broadcast(self._seed())
        self._stages, self._by_hand = [], {}
        for optimizer in trainer.optimizers:
            self._refuse(trainer, optimizer)
            named = pl_module.named_parameters()
            moment = _mean_square(optimizer) if self.kind == "second_moment" else ("", "", "")
            stage = Noise(
                global_indices(named, optimizer),
                self.kind,
                self.eta,
                self.gamma,
                seed,
                self.decay,
                self.start,
                in_pass=not by_hand,
                second_moment=moment,
            )
            self._stages.append(stage)
            self._detach.append(attach(stage, optimizer))
            if by_hand:
                self._by_hand[id(optimizer)] = on_gradients(stage, optimizer)
        self._take_loaded()

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _refuse(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Refuse what would be something else than was asked for."""
        owner = type(optimizer).__name__
        if self.clipping == "after" and any(group.get("max_grad_norm") for group in optimizer.param_groups):
            raise OptionError(
                f"GradientNoise: clipping='after' is not possible with max_grad_norm of {owner}, which clips in its "
                "update, after the noise. Set gradient_clip_val of the Trainer instead, or clipping='before'."
            )
        scaled = isinstance(getattr(trainer.precision_plugin, "scaler", None), torch.amp.GradScaler)
        if scaled and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise OptionError(
                f"GradientNoise cannot serve {owner} with fused=True under a gradient scaler: its gradients are "
                "unscaled inside the step, after the noise. Set fused=False, or precision='bf16-mixed'."
            )

    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        i = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if trainer.loggers and self._stages[i].steps % every == 0:  # global_step counts all optimizers together
            self._log(trainer, i)
        if id(optimizer) in self._by_hand:
            self._by_hand[id(optimizer)].run()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._detach:
            self._detach.pop()()
        self._by_hand.clear()

    # ------------------------------------------------------------------ what a person would look at

    def _log(self, trainer: Trainer, i: int) -> None:
        """The size of the noise, and its norm as a multiple of the gradient's."""
        prefix = "gradient_noise" if len(trainer.optimizers) == 1 else f"gradient_noise/{i}"
        values = {f"{prefix}/sigma": self._stages[i].sigma}
        if self.kind == "isotropic":
            params = [p for group in trainer.optimizers[i].param_groups for p in group["params"]]
            size = norm([p.grad for p in params], params)
            if size > 0:
                values[f"{prefix}/ratio"] = values[f"{prefix}/sigma"] * count(params) ** 0.5 / size
        for logger in trainer.loggers:
            logger.log_metrics(values, trainer.global_step)

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        seed = self._stages[0].seed if self._stages else self._seed()
        return {"seed": seed, "steps": [stage.steps for stage in self._stages]}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self._take_loaded()

    def _take_loaded(self) -> None:
        """Counters arrive before the optimizers exist in one process and under DDP, and after that when sharded."""
        if self._loaded is None or not self._stages:
            return
        for stage, steps in zip(self._stages, self._loaded["steps"], strict=True):
            stage.steps = steps
            if self.seed is None:
                stage.seed = self._loaded["seed"]
        self._loaded = None


def clips(trainer: Trainer, module: LightningModule) -> bool:
    """Whether gradients are clipped between the backward pass and the step, other than by hand."""
    overridden = is_overridden("configure_gradient_clipping", module, LightningModule)
    ours = getattr(type(module), "configure_gradient_clipping", None) is GradientClipping.configure_gradient_clipping
    return module.automatic_optimization and (bool(trainer.gradient_clip_val) or (overridden and not ours))


def _mean_square(optimizer: torch.optim.Optimizer) -> SecondMoment:
    found = second_moment.mean_square(optimizer)
    if found is None:
        raise OptionError(
            "GradientNoise: kind='second_moment' needs an optimizer with a running mean of squared gradients for each "
            f"element, from zero on, such as adamw; {type(optimizer).__name__} has none here. Use kind='moments'."
        )
    return found
