"""The base of callbacks that evaluate and save other weights than those of training: averages and slow weights."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override

from lightning_optim.callbacks.stage_callback import StageCallback
from lightning_optim.core.swap import swap
from lightning_optim.distributed.norms import norm
from lightning_optim.distributed.placement import local, reshard
from lightning_optim.errors import OptionError

# Callbacks of Lightning that put other weights into the model.
AVERAGERS = {"WeightAveraging", "StochasticWeightAveraging"}


class SwappedWeights(StageCallback):
    """Swaps the weights with a slot of the optimizer for validation, for checkpoints and at the end of the fit.

    The slot and the parameters exchange their values. So there is no second copy of the model, and whatever gathers or
    shards the weights of the model also works for the others. The others are in the model from the first hook of a
    validation until after its last, of all callbacks, so whatever these evaluate or write there is of one model.

    Attributes:
        slot: The key of the other weights in the optimizer's state.
        swaps: Whether weights are swapped at all.
        swapped: Whether the model has the other weights now.
        interrupted: Whether an exception ends the run.
    """

    slot: ClassVar[str]
    swaps: bool = True
    swapped: bool = False
    interrupted: bool = False
    _found_swapped: bool = False  # before this validation

    @override
    def forget(self) -> None:
        super().forget()
        self._seal: dict[torch.device, Tensor] = {}  # norms of the parameters when they were swapped in

    @override
    def counters(self) -> dict[str, Any]:
        return {**super().counters(), "swapped": self.swapped}

    @override
    def set_counters(self, state: Mapping[str, Any]) -> None:
        super().set_counters(state)
        self.swapped, self._seal = state.get("swapped", False), {}

    @override
    def release(self) -> None:
        super().release()
        self._seal = {}

    def ready(self, i: int) -> bool:
        """Whether the slot of optimizer `i` can be evaluated yet. The answer must not change while swapped."""
        raise NotImplementedError

    def look(self, trainer: Trainer) -> None:
        """Set `swapped` where something else may have changed it. Called before it is read."""

    def after_swap(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Change what else depends on the weights in the model, such as batch-norm statistics."""

    # ------------------------------------------------------------------ hooks

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare a fit. To be called in `on_fit_start` after `attach`.

        Raises:
            OptionError: if another callback swaps weights too, or an optimizer averages its iterates itself.
        """
        self.swapped = self.interrupted = False
        self.refuse_own_average(trainer)
        if not self.swaps:
            return
        name = type(self).__name__
        for other in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(other, SwappedWeights) and other is not self and other.swaps:
                raise OptionError(
                    f"{name} and {type(other).__name__} both choose the weights that are evaluated and "
                    "saved. Keep one; with IterateAveraging, LookaheadSync(evaluate='fast')."
                )
            if {cls.__name__ for cls in type(other).__mro__} & AVERAGERS:
                rank_zero_warn(
                    f"{name} and {type(other).__name__} both put other weights into the model. It is evaluated, saved "
                    "and left with those of the one or of the other, as the order of their hooks has it. Keep one."
                )
        self.wrap(trainer, "save_checkpoint", functools.partial(self._save, trainer, pl_module))
        self.wrap(trainer.strategy, "on_validation_end", functools.partial(self._end_validation, trainer, pl_module))
        self.wrap(trainer._checkpoint_connector, "restore", functools.partial(self._restore, trainer, pl_module))

    def refuse_own_average(self, trainer: Trainer) -> None:
        """Refuse an optimizer that averages its iterates itself, such as Schedule-Free AdamW."""
        name = type(self).__name__
        for optimizer in trainer.optimizers:
            if getattr(optimizer, "own_average", False):
                title = type(optimizer).__name__
                raise OptionError(
                    f"{title} averages its weights itself, and evaluates and saves the average; {name} would average "
                    f"or move them once more. Leave {name} out, or take an optimizer without an average."
                )

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.swap_out(trainer, pl_module)  # a checkpoint was loaded with the other weights in the model

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.look(trainer)
            self._found_swapped = self.swapped
            self.swap_in(trainer, pl_module)

    @override
    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if batch_idx == 0 and dataloader_idx == 0:
            self._warn_if_written(trainer)

    def _end_validation(self, trainer: Trainer, pl_module: LightningModule, end: Callable[[], None]) -> None:
        """Swap after the hooks of all callbacks. What was swapped before stays so, for the fit may be over already."""
        end()
        if not self._found_swapped:
            self.swap_out(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.swap_in(trainer, pl_module)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.active:
            self.interrupted = True
            self.leave(trainer, pl_module)
        super().on_exception(trainer, pl_module, exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._warn_if_written(trainer)
        super().teardown(trainer, pl_module, stage)

    def leave(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights of training in the model when an exception ends a run, during validation too."""
        self.swap_out(trainer, pl_module)

    def _save(
        self, trainer: Trainer, pl_module: LightningModule, save: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """Swap while a checkpoint is written. The trainer's method is wrapped: weights-only saves call no hook."""
        self.look(trainer)
        was_swapped = self.swapped
        self.swap_in(trainer, pl_module)
        try:
            save(*args, **kwargs)
        finally:
            if not was_swapped:
                self.swap_out(trainer, pl_module)

    def _restore(
        self, trainer: Trainer, pl_module: LightningModule, restore: Callable[..., None], *args: Any, **kwargs: Any
    ) -> None:
        """Go on with the weights that were in the model, after a checkpoint is loaded in the middle of a fit."""
        self.look(trainer)
        swap = self.swap_in if self.swapped else self.swap_out
        restore(*args, **kwargs)
        swap(trainer, pl_module)

    # ------------------------------------------------------------------ swapping

    def swap_in(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the other weights into the model, if any slot is ready."""
        self.look(trainer)
        if self.swaps and not self.swapped and any(map(self.ready, range(len(trainer.optimizers)))):
            self._swap(trainer)
            self.swapped = True
            self.after_swap(trainer, pl_module)
            self._seal = self._sizes(trainer)

    def swap_out(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the weights of training back."""
        self.look(trainer)
        if self.swapped:
            self._warn_if_written(trainer)
            self._swap(trainer)
            self.swapped = False
            self._seal = {}
            self.after_swap(trainer, pl_module)

    def _swap(self, trainer: Trainer) -> None:
        """Exchange parameters and slots of the optimizers that are ready; other slots have the initial weights."""
        reshard(trainer.strategy.model)
        for p, state in self._swapped_parameters(trainer):
            swap(p, state, self.slot)

    def _sizes(self, trainer: Trainer) -> dict[torch.device, Tensor]:
        """The norms of the parameters that have the slot, on each device. Whoever writes other values changes them."""
        reshard(trainer.strategy.model)
        shards: dict[torch.device, list[Tensor]] = {}
        for p, _ in self._swapped_parameters(trainer):
            if (shard := local(p.detach())).numel():
                shards.setdefault(shard.device, []).append(shard)
        return {
            device: torch.stack([size.double() for size in torch._foreach_norm(those)])  # pyright: ignore[reportPrivateImportUsage]
            for device, those in shards.items()
        }

    def _warn_if_written(self, trainer: Trainer) -> None:
        """Warn where something has written parameters since they were swapped in."""
        if not self.swapped or not self._seal:
            return
        now = self._sizes(trainer)  # not on the same device if the fit is over
        if all(torch.allclose(now[d], size, 0, 0, True) for d, size in self._seal.items() if d in now):
            return
        self._seal = {}
        name = type(self).__name__
        rank_zero_warn(
            f"Something has written the weights of the model while they were those of {name}. Does another callback "
            f"swap or average weights too? Then the model is evaluated, saved and trained on with neither its weights "
            f"nor those of {name}. Keep one of the two."
        )

    def _swapped_parameters(self, trainer: Trainer) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        return self._parameters(trainer, [i for i in range(len(trainer.optimizers)) if self.ready(i)])

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
