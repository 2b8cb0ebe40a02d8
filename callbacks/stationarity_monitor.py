"""Tell whether training approaches a stationary point, or only the distribution of its iterates has settled.

Zhang, Li, Sra & Jadbabaie 2022, "Neural Network Weights Do Not Converge to Stationary Points: An Invariant Measure
Perspective", arXiv:2110.06256.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from torch import Tensor
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.block_means import LEVEL, Change, Window, merged
from lightning_optim.analysis.gradient_square import FullGradient
from lightning_optim.analysis.stationarity import Stationarity, Verdict, judge, too_short
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.errors import OptionError, is_whole
from lightning_optim.training import extra_pass
from lightning_optim.training.measured_gradient import measure
from lightning_optim.training.trajectory import Trajectory, from_state, to_state, without_loss

NAME = "StationarityMonitor"
SHORTEST = 128  # steps of a window by default
UNKNOWN_EPOCH = 1000  # steps of a window where an epoch has no length
MOST = 64  # windows that are kept
INVARIANT: Verdict = "invariant measure reached"
FROZEN = 1e-2  # of the highest learning rate


class StationarityMonitor(FitCallback):
    """Say "approaching a stationary point", "invariant measure reached" or "still moving", with the evidence.

    Training is divided into windows. After each, random projections of the weights, the loss and the length of steps
    are compared with the window before, by tests that take the correlation of successive steps into account; see
    `lightning_optim.analysis.stationarity`. The norm of the full gradient is measured at the start, when the verdict
    changes and every few windows, over batches that are run without a trace, and without the noise that makes such
    norms look larger than they are.

    `stationarity/verdict` is logged (0 still moving, 1 invariant measure, 2 approaching, -1 undecided), and with it
    `loss_slope`, `slowdown`, `level`, `displacement`, `straightness`, `gradient_square`, `noise_share` and more. A
    verdict that is another than before is printed.

    Source: Zhang, Li, Sra & Jadbabaie 2022, arXiv:2110.06256; the tests are our own.

    Args:
        window: Optimizer steps in a window, at least 64. Default: an epoch, and at least 128.
        samples: Steps of a window that are looked at, at least 32. Each costs about as much as reading the weights a
            few times.
        batches: Batches for the full gradient, at least 8; 0 never measures it.
        every: Windows from one measurement of the gradient to the next, at least 1.
        seed: Of the projections and of the choice of batches.

    Attributes:
        history: The verdicts so far in this fit, with the step at the end of the window.

    Raises:
        OptionError: if an option is out of range; at the start of the fit, under FSDP1 with `use_orig_params=False`.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> monitor = StationarityMonitor(window=64, samples=32, batches=8)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(max_epochs=3, logger=False, enable_checkpointing=False, callbacks=[monitor], **options)
        >>> trainer.fit(BoringModel())
        StationarityMonitor: step 128: ...
        >>> [step for step, found in monitor.history]
        [128, 192]

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.StationarityMonitor
                  init_args: {window: 1000}
    """

    def __init__(
        self, window: int | None = None, samples: int = 128, batches: int = 32, every: int = 8, seed: int = 0
    ) -> None:
        super().__init__()
        check = functools.partial(errors.check, NAME)
        check("window", window, window is None or is_whole(window, 64), "an integer of at least 64, or None")
        check("samples", samples, is_whole(samples, 32), "an integer of at least 32")
        some = is_whole(batches, 8) or (is_whole(batches, 0) and int(batches) == 0)
        check("batches", batches, some, "an integer of at least 8, or 0")
        check("every", every, is_whole(every), "an integer of at least 1")
        check("seed", seed, is_whole(seed, 0), "an integer of at least 0, below 2^64")
        self.window = None if window is None else int(window)
        self.samples, self.batches, self.every, self.seed = int(samples), int(batches), int(every), int(seed)

    @override
    def forget(self) -> None:
        self.history: list[tuple[int, Stationarity]] = []
        self._trajectory: Trajectory | None = None
        self._zero: Tensor | None = None
        self._first: Window | None = None
        self._windows: list[Window] = []  # the last so far
        self._gradients: list[FullGradient | None] = [None, None]
        self._measured = 0  # windows since the last measurement
        self._step, self._top_rate = 0, 0.0
        self._verdict, self._doubted = "", False
        self._loaded: dict[str, Any] = {}
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ hooks

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        every = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        params = [p for p in dict.fromkeys(every) if p.requires_grad and not is_lazy(p)]
        if not params:
            self._warn("no parameter is trained, so there is nothing to watch. Is the model frozen?")
            return
        self._trajectory = Trajectory(params, self._length(trainer), self.samples, self.seed)
        self._step = trainer.global_step
        self._restore()
        if self._gradients[0] is None and trainer.global_step == 0:
            self._gradients = [self._measure(trainer, pl_module, self._trajectory), None]

    def _length(self, trainer: Trainer) -> int:
        if self.window is not None:
            return self.window
        batches = trainer.num_training_batches
        steps = UNKNOWN_EPOCH if math.isinf(batches) else int(batches) // trainer.accumulate_grad_batches
        return max(SHORTEST, steps)

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._trajectory is not None:
            self._trajectory.before_step()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._trajectory is None:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        self._trajectory.add_loss(loss if isinstance(loss, Tensor) and loss.numel() == 1 else None)
        if trainer.global_step == self._step:
            return
        self._step = trainer.global_step
        self._top_rate = max(self._top_rate, _rate(trainer))
        found = self._trajectory.after_step()
        if found is not None:
            self._close(trainer, pl_module, self._trajectory, *found)

    def _close(
        self, trainer: Trainer, module: LightningModule, trajectory: Trajectory, window: Window, drift: list[Change]
    ) -> None:
        """Judge a window that is over."""
        self._zero = trajectory.zero
        if not all(bool(x.isfinite().all()) for x in (window.means[:, :-1], window.movement)):
            self._warn("weights are not finite, so windows with such weights are left out.")
            self._windows = []
            return
        self._first = self._first or window
        self._windows = [*self._windows[1 - MOST :], window]
        self._measured += 1
        if len(self._windows) < 2:
            return
        found = self._confirmed(self._judge(trainer, trajectory, drift))
        settled = found.verdict != "still moving" and found.verdict != self._verdict
        if settled or self._measured >= self.every:
            now = self._measure(trainer, module, trajectory)
            self._measured, self._gradients[1] = 0, now
            found = self._confirmed(self._judge(trainer, trajectory, drift))
        self._doubted = found.verdict == INVARIANT and bool(found.changed)
        self.history.append((trainer.global_step, found))
        if found.verdict != self._verdict:
            _print(f"{NAME}: step {trainer.global_step}: {found}")
        self._verdict = found.verdict
        self._log(trainer, found)

    def _confirmed(self, found: Stationarity) -> Stationarity:
        """Leave an invariant measure only if two windows in a row say so: one in a hundred says so by chance."""
        steady = 0.9 <= found.slowdown <= 1.1
        if self._verdict != INVARIANT or self._doubted or found.verdict != "still moving" or not steady:
            return found
        return replace(found, verdict=INVARIANT, evidence=f"as before, though {found.evidence}")

    def _judge(self, trainer: Trainer, trajectory: Trajectory, drift: list[Change]) -> Stationarity:
        """Compare the last window with that before; and twice as many with those before, where these are too short."""
        found = self._compare(trainer, trajectory, drift, 1)
        length = 2
        while too_short(found) and 2 * length <= len(self._windows):
            longer = self._compare(trainer, trajectory, drift, length)
            if not too_short(longer):
                return longer
            length *= 2
        return found

    def _compare(self, trainer: Trainer, trajectory: Trajectory, drift: list[Change], length: int) -> Stationarity:
        previous, last = merged(self._windows[-2 * length : -length]), merged(self._windows[-length:])
        has_loss = all(bool(window.means[:, -1].isfinite().all()) for window in (previous, last))
        pair = (previous, last) if has_loss else (without_loss(previous), without_loss(last))
        assert self._first is not None
        start, end = self._gradients
        known = None if start is None or end is None or self._measured else (start, end)
        eps = max(torch.finfo(p.dtype).eps for p in trajectory.space.params)
        frozen = self._top_rate > 0 and _rate(trainer) < FROZEN * self._top_rate
        sure = tuple(change for change in drift if change.p < LEVEL / 100)
        found = judge(
            self._first,
            *pair,
            gradients=known,
            has_loss=has_loss,
            eps=eps,
            frozen=frozen,
            penalized=_decays(trainer),
            also=sure,
        )
        assert trajectory.zero is not None
        return replace(found, loss=found.loss + float(trajectory.zero[-1]))  # series are counted from it

    def _measure(self, trainer: Trainer, module: LightningModule, trajectory: Trajectory) -> FullGradient | None:
        if not self.batches:
            return None
        try:
            extra_pass.check(trainer, module, self.batches, NAME, "Or set batches=0.")
            found = measure(trainer, module, trajectory.space, self.batches, self.seed, NAME)
        except OptionError as error:
            found = str(error).removeprefix(f"{NAME}: ").rstrip(".")
        if isinstance(found, str):
            self._warn(f"the full gradient is not measured: {found}.")
            return None
        return found

    # ------------------------------------------------------------------ what comes of it

    def _log(self, trainer: Trainer, found: Stationarity) -> None:
        order = {"undecided": -1.0, "still moving": 0.0, INVARIANT: 1.0}
        values = {"verdict": order.get(found.verdict, 2.0), "changed": float(len(found.changed))}
        for name in ("slowdown", "level", "displacement", "straightness", "loss_slope", "loss_slope_error"):
            values[name] = float(getattr(found, name))
        if found.gradient is not None:
            values["gradient_square"], values["gradient_square_error"] = found.gradient.square, found.gradient.error
            values["gradient_square_with_noise"] = found.gradient.plug_in
            values["noise_share"] = found.gradient.noise_share
        finite = {f"stationarity/{name}": value for name, value in values.items() if math.isfinite(value)}
        for logger in trainer.loggers if trainer.log_every_n_steps else ():  # type: ignore[attr-defined]
            logger.log_metrics(finite, trainer.global_step)

    def _warn(self, why: str) -> None:
        if why not in self._warned:
            self._warned.add(why)
            rank_zero_warn(f"{NAME}: {why}")

    @override
    def release(self) -> None:
        super().release()
        self._trajectory = None

    # ------------------------------------------------------------------ checkpoints

    @override
    def state_dict(self) -> dict[str, Any]:
        """Finished windows; one that is not over begins again after a resume."""
        if self._loaded:
            return self._loaded
        return {
            "zero": self._zero,
            "first": to_state(self._first),
            "windows": [to_state(window) for window in self._windows],
            "gradients": [None if gradient is None else asdict(gradient) for gradient in self._gradients],
            "measured": self._measured,
            "top_rate": self._top_rate,
            "verdict": self._verdict,
            "doubted": self._doubted,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = dict(state_dict)

    def _restore(self) -> None:
        if not self._loaded:
            return
        state, self._loaded = self._loaded, {}
        self._zero = state["zero"]
        if self._trajectory is not None:
            self._trajectory.zero = self._zero
        self._first = from_state(state["first"])
        self._windows = [window for one in state["windows"] if (window := from_state(one)) is not None]
        self._gradients = [None if gradient is None else FullGradient(**gradient) for gradient in state["gradients"]]
        self._measured, self._top_rate = state["measured"], state["top_rate"]
        self._verdict, self._doubted = state["verdict"], state["doubted"]


def _decays(trainer: Trainer) -> bool:
    groups = (group for optimizer in trainer.optimizers for group in optimizer.param_groups)
    return any(float(group.get("weight_decay") or 0.0) != 0 for group in groups)


def _rate(trainer: Trainer) -> float:
    rates = [group.get("lr", 0.0) for optimizer in trainer.optimizers for group in optimizer.param_groups]
    return max((float(rate) for rate in rates), default=0.0)


@rank_zero_only
def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, highlight=False)
