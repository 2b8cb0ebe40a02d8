"""Evaluate and save other weights than those of training: what averaging and Lookahead have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_optim.distributed.norms import norm
from lightning_optim.distributed.placement import reshard
from lightning_optim.errors import OptionError


class SwappedWeights(Callback):
    """Lets validation, checkpoints and the end of the fit have the weights in a slot of the optimizer.

    A base of callbacks. The slot and the parameters trade places, so nothing is copied twice, and everything that
    gathers or shards the model's weights serves these too.

    Attributes:
        slot: The slot that holds the other weights.
        swaps: Whether they are wanted at all.
        swapped: Whether they are in the model now.
    """

    slot: ClassVar[str]
    swaps: bool = True
    swapped: bool = False
    _detach: list[Callable[[], None]]

    def ready(self, i: int) -> bool:
        """Whether the slot of optimizer `i` holds something worth evaluating yet; not to change while swapped."""
        raise NotImplementedError

    def after_swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What else belongs to the weights that are in the model now."""

    # ------------------------------------------------------------------ when

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """To be called when the fit starts, with the stages attached.

        Raises:
            OptionError: where another callback wants other weights in the model at the same time.
        """
        self.swapped = False
        if not self.swaps:
            return
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, SwappedWeights) and other is not self and other.swaps:
                raise OptionError(
                    f"{type(self).__name__} and {type(other).__name__} both choose the weights that are evaluated and "
                    "saved. Keep one; with IterateAveraging, LookaheadSync(evaluate='fast')."
                )
        self._wrap_save(trainer, pl_module)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap_out(trainer, pl_module)  # a checkpoint resumes with the other weights in the model

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.swap_in(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.swap_out(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap_in(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.swap_out(trainer, pl_module)  # in the middle of validation: leave the weights that training had

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._detach:
            self._detach.pop()()

    def _wrap_save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let every checkpoint be written while the other weights are in the model.

        No hook of a callback is called for checkpoints of weights only, so the trainer's method itself is wrapped.
        """
        save = trainer.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            was_swapped = self.swapped
            self.swap_in(trainer, pl_module)
            try:
                save(*args, **kwargs)
            finally:
                if not was_swapped:
                    self.swap_out(trainer, pl_module)

        trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
        self._detach.append(lambda: setattr(trainer, "save_checkpoint", save))

    # ------------------------------------------------------------------ what

    def swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the other weights into the model, once there are some."""
        if self.swaps and not self.swapped and any(map(self.ready, range(len(trainer.optimizers)))):
            self._exchange(trainer)
            self.swapped = True
            self.after_swap(trainer, pl_module)

    def swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights of training back."""
        if self.swapped:
            self._exchange(trainer)
            self.swapped = False
            self.after_swap(trainer, pl_module)

    @torch.no_grad()
    def _exchange(self, trainer: Trainer) -> None:
        """Let parameters and slots trade places, without a second copy of the model.

        With several optimizers, only where a slot is ready: another one holds the weights that the fit began with.

        A parameter in 16 bits cannot hold what is in the slot, which therefore stays where it is; the weights of
        training go to a slot `raw` meanwhile.
        """
        reshard(trainer.strategy.model)
        for p, state in self._held(trainer, [i for i in range(len(trainer.optimizers)) if self.ready(i)]):
            other = state[self.slot]
            if other.dtype == p.dtype:
                raw = p.detach().clone()
                p.copy_(other)
                other.copy_(raw)
            elif "raw" in state:
                p.copy_(state.pop("raw"))
            else:
                state["raw"] = p.detach().to(other.dtype)
                p.copy_(other)

    def _held(self, trainer: Trainer, which: Iterable[int]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for i in which:
            yield from ((p, state) for p, state in trainer.optimizers[i].state.items() if self.slot in state)

    @torch.no_grad()
    def distance(self, trainer: Trainer) -> float:
        """How far the weights of training are from the others, as a share of their norm.

        Over all that is trained, in an order that is the same on every rank: one that holds no element of a parameter
        may have no state for it.
        """
        optimizers = trainer.optimizers
        params = [p for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad]
        slots = {p: state[self.slot] for p, state in self._held(trainer, range(len(optimizers)))}
        apart = norm((p.detach() - slots[p] if p in slots else None for p in params), params)
        size = norm(params, params)
        return apart / size if size else 0.0
