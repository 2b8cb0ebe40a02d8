"""What a fit does, noted for a race."""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_optim.race.metric import TRAINING_LOSS
from lightning_optim.race.outcome import Curve, thinned
from lightning_optim.reports.memory import state_memory

FLUSH = 8  # steps whose losses are brought to the CPU together
HASHED = 2  # batches of an epoch whose digest is taken
LAST = 0.1  # the share of steps at the end over which the training loss is averaged


class Diverged(Exception):
    """The training loss is not finite."""


class Recorder(Callback):
    """Notes losses, metrics, times and state, and seeds each epoch.

    Random numbers that an optimizer or a callback takes would give the next epoch another order, so that candidates no
    longer see the same batches. So each epoch begins with a seed of its own.

    Args:
        seed: Of the run.
        tick: Called with the share of the run that is done.
    """

    def __init__(self, seed: int, tick: Callable[[float], None] | None = None) -> None:
        self.seed, self.tick = seed, tick
        self.losses: Curve = ([], [])
        self.curves: dict[str, Curve] = {}
        self.metrics: dict[str, float] = {}
        self.validated: list[str] = []  # the metrics of the validation
        self.validated_at = -1  # the step of the last validation
        self.planned = math.inf  # steps
        self.steps = 0
        self.state_bytes: int | None = None
        self.start = ""  # digest of the first weights
        self._times: list[float] = []
        self._waiting: list[tuple[int, Tensor]] = []  # losses by step that are still where they were computed
        self._before: set[str] = set()
        self._begun = 0.0
        self._batches = hashlib.blake2b(digest_size=8)

    @property
    def batches(self) -> str:
        """A digest of the first batches of each epoch."""
        return self._batches.hexdigest()

    @property
    def step_seconds(self) -> float | None:
        """The median; the first steps warm up and do not count where there are others."""
        times = self._times[3:] or self._times
        return statistics.median(times) if times else None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.planned = float(trainer.estimated_stepping_batches)
        self.start = _digest(hashlib.blake2b(digest_size=8), pl_module.parameters()).hexdigest()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seed_all(self.seed + 1000003 * (trainer.current_epoch + 1))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx < HASHED:
            _digest(self._batches, tree_leaves(batch))
        self._wait_for(pl_module)
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._wait_for(pl_module)
        self._times.append(time.perf_counter() - self._begun)
        self.steps = trainer.global_step
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor) and loss.numel() == 1:
            self._waiting.append((self.steps, loss.detach()))
        if len(self._waiting) >= FLUSH or pl_module.device.type == "cpu":
            self.flush()
        if self.tick is not None and math.isfinite(self.planned):
            self.tick(min(1.0, self.steps / max(1.0, self.planned)))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._before = set(trainer.callback_metrics)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        found = _numbers(trainer.callback_metrics)
        self.validated += [name for name in found if name not in self._before and name not in self.validated]
        self.validated_at = self.steps
        for name in (name for name in self.validated if name in found):
            steps, values = self.curves.setdefault(name, ([], []))
            steps.append(self.steps)
            values.append(found[name])
            self.metrics[name] = found[name]

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.flush()
        self._weigh(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(Exception):
            self._weigh(trainer)

    def finish(self, trainer: Trainer) -> None:
        """Take the metrics of the training too, and the mean loss of its last steps."""
        for name, value in _numbers(trainer.callback_metrics).items():
            self.metrics.setdefault(name, value)
        steps, values = self.losses
        if values:
            last = values[-max(1, round(LAST * len(values))) :]
            self.metrics[TRAINING_LOSS] = math.fsum(last) / len(last)
            self.curves[TRAINING_LOSS] = thinned((steps, values))
        self.curves = {name: thinned(curve) for name, curve in self.curves.items()}

    def flush(self) -> None:
        """Bring the losses to the CPU.

        Raises:
            Diverged: where one is not finite.
        """
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        found = torch.stack([loss.reshape(()).float() for _, loss in waiting]).tolist()
        for (step, _), value in zip(waiting, found, strict=True):
            if not math.isfinite(value):
                self.steps = step
                raise Diverged(f"the training loss is {value} at step {step}.")
            self.losses[0].append(step)
            self.losses[1].append(value)

    def _weigh(self, trainer: Trainer) -> None:
        self.state_bytes = sum(entry.bytes for optimizer in trainer.optimizers for entry in state_memory(optimizer))

    @staticmethod
    def _wait_for(module: LightningModule) -> None:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)


def seed_all(seed: int) -> None:
    """Seed torch, Python and, if it is there, numpy."""
    torch.manual_seed(seed % 2**63)
    random.seed(seed)
    with suppress(ImportError):
        import numpy

        numpy.random.seed(seed % 2**32)


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in metrics.items() if getattr(value, "numel", lambda: 1)() == 1}


def _digest(into: Any, values: Iterable[Any]) -> Any:
    for value in values:
        if isinstance(value, Tensor):
            with suppress(Exception):  # a wrapper without memory of its own
                flat = value.detach().cpu().contiguous().reshape(-1)
                into.update(flat.view(torch.uint8).numpy().tobytes())
        else:
            into.update(repr(value).encode())
    return into
