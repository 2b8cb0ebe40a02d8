"""Add noise to the gradients.  Neelakantan et al. 2015, arXiv:1511.06807."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.stage_callback import StageCallback
from lightning_optim.core.foreign_stages import on_gradients
from lightning_optim.core.standalone_stages import OnGradients
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.distributed.names import named_parameters
from lightning_optim.distributed.norms import count, norm
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.stages.noise import Kind, Noise
from lightning_optim.training import second_moment
from lightning_optim.training.clipping import GradientClipping
from lightning_optim.training.lightning_names import overrides
from lightning_optim.training.second_moment import SecondMoment


class GradientNoise(StageCallback):
    """Add normal noise of variance eta / (1 + t)^gamma to the gradients of step t = 0, 1, ...

    The noise of an element is a function of the seed, the step, the name of the tensor and the index in it. So it is
    the same on all replicas, for any number of ranks, under any strategy and after a resume, and it changes no other
    random numbers. Skipped steps do not count.

    Source: Neelakantan et al. 2015, arXiv:1511.06807, equation 1.

    Args:
        eta: Variance at t = 0, at least 0, in the squared units of `kind`. With `gamma=0` and a `kind` other than
            "isotropic", B / B' - 1 makes batches of B samples as noisy as batches of B'.
        gamma: Exponent of the decrease; 0 keeps the variance constant.
        kind: The units: "isotropic" is the paper's, the gradient itself. "second_moment" is the root of the
            optimizer's mean squared gradient of each element (such as `exp_avg_sq`). "moments" is the standard
            deviation of each element of the gradient, from two running means that are kept for it.
        clipping: "before" adds the noise before the Trainer or the module clips gradients, so that clipping bounds it;
            "after" adds it to the clipped ones. Without clipping they are the same.
        start: Number of steps without noise at the beginning.
        decay: Decay of the two running means of "moments", in (0, 1).
        seed: Seed of the noise, below 2^64. Default: that of `seed_everything`, or 0.

    Raises:
        OptionError: if an option is out of range. At the start of the fit: for "second_moment", if the optimizer has no
            such mean; for "after", if the optimizer clips in its own update; and for a fused optimizer under a
            gradient scaler.

    Example:
        >>> from lightning.pytorch import Trainer, seed_everything
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> def train(*callbacks):
        ...     seed_everything(0, verbose=False)
        ...     model = BoringModel()
        ...     Trainer(fast_dev_run=2, callbacks=list(callbacks), **options).fit(model)
        ...     return model.layer.weight
        >>> torch.equal(train(), train(GradientNoise(eta=0.01)))
        False
        >>> torch.equal(train(GradientNoise(eta=0.01)), train(GradientNoise(eta=0.01)))
        True

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.GradientNoise
                  init_args: {eta: 0.01, gamma: 0.55}
    """

    _stages: list[Noise]

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
        super().__init__()
        check = functools.partial(errors.check, "GradientNoise")
        for name, value in (("eta", eta), ("gamma", gamma)):
            check(name, value, is_number(value) and 0 <= value < math.inf, "a finite number of at least 0")
        errors.check_choice("GradientNoise", "kind", kind, get_args(Kind))
        errors.check_choice("GradientNoise", "clipping", clipping, ["before", "after"])
        check("start", start, is_whole(start, 0), "an integer of at least 0")
        check("decay", decay, is_number(decay) and 0 < decay < 1, "in (0, 1)")
        check("seed", seed, seed is None or (is_whole(seed, 0) and seed < 2**64), "an integer of 64 bits")
        self.eta, self.gamma, self.clipping = float(eta), float(gamma), clipping
        self.kind: Kind = kind
        self.start, self.decay, self.seed = int(start), float(decay), None if seed is None else int(seed)

    @override
    def forget(self) -> None:
        super().forget()
        self._before_clipping: dict[int, OnGradients] = {}  # by id of the optimizer; runs a stage outside of a step

    # ------------------------------------------------------------------ hooks

    @override
    def stages_for(self, optimizers: Sequence[torch.optim.Optimizer]) -> Sequence[Noise]:
        return [Noise({}, self.kind) for _ in optimizers]

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        before_clipping = self.clipping == "before" and clips(trainer, pl_module)
        seed = trainer.strategy.broadcast(self._seed())
        for optimizer in trainer.optimizers:
            self._check_optimizer(trainer, optimizer)
        stages = [
            Noise(
                global_indices(named_parameters(pl_module), optimizer),
                self.kind,
                self.eta,
                self.gamma,
                seed,
                self.decay,
                self.start,
                in_pass=not before_clipping,
                second_moment=_mean_square(optimizer) if self.kind == "second_moment" else ("", "", ""),
            )
            for optimizer in trainer.optimizers
        ]
        self.attach(trainer, stages)
        if before_clipping:
            pairs = zip(stages, trainer.optimizers, strict=True)
            self._before_clipping = {id(optimizer): on_gradients(stage, optimizer) for stage, optimizer in pairs}
        self.restore_counters()

    def _seed(self) -> int:
        return int(os.environ.get("PL_GLOBAL_SEED", 0)) if self.seed is None else self.seed

    def _check_optimizer(self, trainer: Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Refuse an optimizer that would not apply the noise as documented."""
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
        self._number_new_parameters(pl_module, i, optimizer)
        # By the steps of this optimizer, since global_step counts those of all together.
        if trainer.loggers and every and self._stages[i].steps % every == 0:
            self._log(trainer, i)
        if id(optimizer) in self._before_clipping:
            self._before_clipping[id(optimizer)].run()

    def _number_new_parameters(self, pl_module: LightningModule, i: int, optimizer: torch.optim.Optimizer) -> None:
        """Find the global indices of parameters that have joined the optimizer since."""
        stage = self._stages[i]
        if any(p not in stage.indices for group in optimizer.param_groups for p in group["params"]):
            stage.indices = global_indices(named_parameters(pl_module), optimizer)

    @override
    def release(self) -> None:
        super().release()
        self._before_clipping = {}

    # ------------------------------------------------------------------ logging

    def _log(self, trainer: Trainer, i: int) -> None:
        """Log the standard deviation of the noise, and its norm divided by the gradient's."""
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
    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "seed": self._stages[0].seed}

    @override
    def set_counters(self, state: Mapping[str, Any]) -> None:
        super().set_counters(state)
        if self.seed is None:
            for stage in self._stages:
                stage.seed = state["seed"]


def clips(trainer: Trainer, module: LightningModule) -> bool:
    """Whether Lightning or the module clips gradients between the backward pass and the step."""
    overridden = overrides(module, "configure_gradient_clipping", LightningModule)
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
