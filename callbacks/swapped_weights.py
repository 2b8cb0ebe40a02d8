"""The base of callbacks that evaluate and save other weights than those of training: averages and slow weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_optim.callbacks.stage_callback import StageCallback
from lightning_optim.distributed.norms import norm
from lightning_optim.distributed.placement import reshard
from lightning_optim.errors import OptionError


class SwappedWeights(StageCallback):
    """Swaps the weights with a slot of the optimizer for validation, for checkpoints and at the end of the fit.

    The slot and the parameters exchange their values. So there is no second copy of the model, and whatever gathers or
    shards the weights of the model also works for the others.

    Attributes:
        slot: The key of the other weights in the optimizer's state.
        swaps: Whether weights are swapped at all.
        swapped: Whether the model has the other weights now.
    """

    slot: ClassVar[str]
    swaps: bool = True
    swapped: bool = False

    def ready(self, i: int) -> bool:
        """Whether the slot of optimizer `i` can be evaluated yet. The answer must not change while swapped."""
        raise NotImplementedError

    def after_swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change what else depends on the weights in the model, such as batch-norm statistics."""

    # ------------------------------------------------------------------ hooks

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare a fit. To be called in `on_fit_start` after `attach`.

        Raises:
            OptionError: if another callback swaps weights too.
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
        self.swap_out(trainer, pl_module)  # a checkpoint was loaded with the other weights in the model

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
        self.swap_out(trainer, pl_module)  # an exception during validation must leave the weights of training

    def _wrap_save(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Swap while a checkpoint is written. The trainer's method is wrapped: weights-only saves call no hook."""
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
        self._undo.append(lambda: setattr(trainer, "save_checkpoint", save))

    # ------------------------------------------------------------------ swapping

    def swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the other weights into the model, if any slot is ready."""
        if self.swaps and not self.swapped and any(map(self.ready, range(len(trainer.optimizers)))):
            self._swap(trainer)
            self.swapped = True
            self.after_swap(trainer, pl_module)

    def swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights of training back."""
        if self.swapped:
            self._swap(trainer)
            self.swapped = False
            self.after_swap(trainer, pl_module)

    @torch.no_grad()
    def _swap(self, trainer: Trainer) -> None:
        """Exchange parameters and slots of the optimizers that are ready; other slots have the initial weights.

        A parameter in 16 bits cannot store what is in the slot, which therefore keeps its value; the weights of
        training are in a slot `raw` until they are put back.
        """
        reshard(trainer.strategy.model)
        for p, state in self._parameters(trainer, [i for i in range(len(trainer.optimizers)) if self.ready(i)]):
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

    def _parameters(self, trainer: Trainer, optimizers: Iterable[int]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """The parameters that have the slot, with their state."""
        for i in optimizers:
            yield from ((p, state) for p, state in trainer.optimizers[i].state.items() if self.slot in state)

    @torch.no_grad()
    def distance(self, trainer: Trainer) -> float:
        """The norm of the difference between the weights of training and the others, divided by the weights' norm.

        It runs over all trainable parameters, in the same order on every rank: a rank without any element of a
        parameter may have no state for it.
        """
        optimizers = trainer.optimizers
        params = [p for o in optimizers for group in o.param_groups for p in group["params"] if p.requires_grad]
        slots = {p: state[self.slot] for p, state in self._parameters(trainer, range(len(optimizers)))}
        difference = norm((p.detach() - slots[p] if p in slots else None for p in params), params)
        size = norm(params, params)
        return difference / size if size else 0.0
