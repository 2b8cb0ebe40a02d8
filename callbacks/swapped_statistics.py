"""The base of callbacks that also give batch normalizations the statistics of the weights that they swap in."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.swapped_weights import SwappedWeights
from lightning_optim.errors import is_whole
from lightning_optim.training import extra_pass
from lightning_optim.training.batch_norm import batch_norm_buffers, copy_buffers, norms_of, recompute

LIBRARIES = ("lightning.", "pytorch_lightning.", "lightning_optim.", "callbacks.")  # none of whose hooks change a batch


class SwappedStatistics(SwappedWeights):
    """Recomputes the running statistics of batch normalizations before the other weights are used.

    Args:
        batch_norm: "recompute" runs `training_step` over training batches, "keep" does not.
        batch_norm_batches: Number of training batches for that. Default: as many as the longest epoch so far has had.

    Raises:
        OptionError: if an option is out of range; at the start of training, if the training loader cannot give batches.
    """

    def __init__(
        self, batch_norm: Literal["recompute", "keep"] = "recompute", batch_norm_batches: int | None = None
    ) -> None:
        super().__init__()
        name, limit = type(self).__name__, batch_norm_batches
        errors.check_choice(name, "batch_norm", batch_norm, ["recompute", "keep"])
        errors.check(name, "batch_norm_batches", limit, limit is None or is_whole(limit), "an integer of at least 1")
        self.batch_norm, self.batch_norm_batches = batch_norm, None if limit is None else int(limit)

    @override
    def forget(self) -> None:
        super().forget()
        self._raw_buffers: dict[str, Tensor] = {}  # the statistics of the weights of training, while swapped
        self._other_buffers: tuple[int, dict[str, Tensor]] | None = None  # of the others, with their version
        self._members: list[tuple[str, nn.Module]] = []  # all submodules, if there are statistics to recompute
        self._modes: dict[str, bool] = {}  # whether each is in training mode during training
        self._longest_epoch = 0  # in batches
        self._changing: list[Callback] = []  # whose on_train_batch_start has changed a batch

    def version(self, trainer: Trainer) -> int:
        """A number that changes whenever the other weights do, the same on all ranks."""
        raise NotImplementedError

    @override
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._note_modes(pl_module)
        super().begin(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.active and self.batch_norm == "recompute" and any(x.training for x in norms_of(pl_module).values()):
            advice = "Or set batch_norm='keep'."
            extra_pass.check(trainer, pl_module, self.batch_norm_batches, type(self).__name__, advice)
            for other in trainer.callbacks:  # type: ignore[attr-defined]
                if not str(getattr(type(other).on_train_batch_start, "__module__", "")).startswith(LIBRARIES):
                    self.wrap(other, "on_train_batch_start", functools.partial(self._note_change, other))
        self._note_modes(pl_module)

    def _note_change(self, other: Callback, hook: Callable[..., None], *args: Any) -> None:
        """Note a callback that changes a batch, since the batches of the extra pass need that too."""
        if extra_pass.changes(args[2], functools.partial(hook, *args)) and other not in self._changing:
            self._changing.append(other)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._longest_epoch = max(self._longest_epoch, batch_idx + 1)
        self._modes = {name: part.training for name, part in self._members}

    def _note_modes(self, pl_module: LightningModule) -> None:
        """Note which submodules are in training mode, since Lightning sets all to evaluation before validation."""
        recomputed = self.batch_norm == "recompute" and batch_norm_buffers(pl_module)
        self._members = list(pl_module.named_modules()) if recomputed else []
        self._modes = {name: part.training for name, part in self._members}

    @override
    @torch.no_grad()
    def after_swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give batch normalizations the running statistics of the weights in the model."""
        if not self.swapped:
            copy_buffers(pl_module, self._raw_buffers)
            self._raw_buffers = {}
        elif self.batch_norm == "recompute" and batch_norm_buffers(pl_module):
            self._raw_buffers = {n: b.clone() for n, b in batch_norm_buffers(pl_module).items()}
            version = self.version(trainer)
            if self._other_buffers is None or self._other_buffers[0] != version:
                if self.interrupted:  # other ranks may not be here, and the loader may be what has failed
                    return
                if trainer.sanity_checking:  # of a second fit: there is no loader of training yet
                    return
                batches = min(self.batch_norm_batches or math.inf, max(self._longest_epoch, 1))
                recompute(trainer, pl_module, self._modes, int(batches), self._changing, type(self).__name__)
                found = {n: b.clone() for n, b in batch_norm_buffers(pl_module).items()}
                self._other_buffers = (version, found)
            copy_buffers(pl_module, self._other_buffers[1])

    @override
    def release(self) -> None:
        super().release()
        self._raw_buffers, self._other_buffers = {}, None
        self._members, self._modes, self._changing = [], {}, []

    @override
    def counters(self) -> dict[str, Any]:
        return {
            **super().counters(),
            "raw_buffers": dict(self._raw_buffers),
            "longest_epoch": self._longest_epoch,
        }

    @override
    def set_counters(self, state: Mapping[str, Any]) -> None:
        super().set_counters(state)
        self._raw_buffers = dict(state["raw_buffers"])
        self._other_buffers = None
        self._longest_epoch = state.get("longest_epoch", 0)
