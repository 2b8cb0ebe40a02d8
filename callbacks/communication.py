"""Say by a word what the ranks of DDP send each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim.distributed.communication import Exchange, HalfPrecision, PostLocalSGD, PowerSGD, read
from lightning_optim.errors import OptionError


class Communication(Callback):
    """Gradients in fewer bytes, or fewer exchanges, under DDP on any device, with state that resumes.

    In one process nothing is sent and nothing happens; a state that was loaded is kept for the next checkpoint.

    Args:
        kind: "bf16" and "fp16" send gradients in 16 bits; "powersgd" sends two thin factors of each matrix and
            remembers what they leave out; "post_local_sgd" stops sending gradients between nodes and averages the
            weights now and then.
        rank: Columns of PowerSGD's factors, at least 1; by default 1.
        start: Steps of ordinary DDP before PowerSGD or post-local SGD begins, at least 2; by default 1000.
        period: Steps between two averagings of post-local SGD, at least 2; by default 4.
        local_ranks: Ranks that share gradients in every step of post-local SGD; by default those of a node, or 1
            where all are on one node.

    Raises:
        OptionError: for an unknown kind, an option that the kind does not have or that is out of range; when the fit
            starts, under a strategy that is not DDP, or where the strategy has a hook already.
    """

    def __init__(
        self,
        kind: Literal["bf16", "fp16", "powersgd", "post_local_sgd"],
        rank: int | None = None,
        start: int | None = None,
        period: int | None = None,
        local_ranks: int | None = None,
    ) -> None:
        given = {"rank": rank, "start": start, "period": period, "local_ranks": local_ranks}
        self.kind, self.options = read({"kind": kind, **{n: value for n, value in given.items() if value is not None}})
        self._exchange: Exchange | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._undo: list[Callable[[], None]] = []

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.teardown(trainer, pl_module, "fit")  # of a run that an exception ended
        self._exchange = None
        if trainer.world_size == 1:
            return
        model: Any = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            raise OptionError(
                f"Communication {self.kind!r} is for DDP, and the strategy is {_name(trainer)}. {_ADVICE}"
            )
        if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
            raise OptionError("Communication: the strategy has a ddp_comm_hook already. Use one of the two.")
        self._exchange = exchange = self._make(trainer, pl_module)
        if self._loaded is not None:
            exchange.load(self._loaded["exchange"])
            self._loaded = None
        # A function of its own: torch looks at the name of its bf16 hook and refuses it without a GPU.
        model.register_comm_hook(None, lambda _, bucket: exchange.hook(bucket))

    def _make(self, trainer: Trainer, pl_module: LightningModule) -> Exchange:
        if self.kind == "powersgd":
            return PowerSGD(**self.options, params=[p for p in pl_module.parameters() if p.requires_grad])
        if self.kind == "post_local_sgd":
            here = trainer.world_size // trainer.num_nodes if trainer.num_nodes > 1 else 1
            options = {**self.options, "local_ranks": self.options["local_ranks"] or here}
            exchange = PostLocalSGD(**options, optimizers=trainer.optimizers)
            for optimizer in trainer.optimizers:
                self._undo.append(optimizer.register_step_post_hook(exchange.after_step).remove)
            self._synchronise_before_saves(trainer, exchange)
            return exchange
        return HalfPrecision({"bf16": torch.bfloat16, "fp16": torch.float16}[self.kind])

    def _synchronise_before_saves(self, trainer: Trainer, exchange: PostLocalSGD) -> None:
        """Wrap the trainer's method: no hook of a callback comes before the model's state is taken."""
        save = trainer.save_checkpoint

        def save_checkpoint(*args: Any, **kwargs: Any) -> None:
            exchange.synchronise()
            save(*args, **kwargs)

        trainer.save_checkpoint = save_checkpoint  # type: ignore[method-assign]
        self._undo.append(lambda: setattr(trainer, "save_checkpoint", save))

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if isinstance(self._exchange, PowerSGD):
            self._exchange.forget_if_spoilt()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self._exchange, PostLocalSGD):
            self._exchange.synchronise()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        while self._undo:
            self._undo.pop()()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._exchange is not None:
            return {"kind": self.kind, "exchange": self._exchange.state()}
        return dict(self._loaded or {})

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["kind"] == self.kind:  # another kind begins anew
            self._loaded = state_dict


_ADVICE = (
    "FSDP sends gradients in fewer bits by itself: FSDPStrategy(mixed_precision=MixedPrecision(reduce_dtype="
    "torch.bfloat16)), or fully_shard(..., mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)). Use strategy "
    "'ddp', or remove the callback."
)


def _name(trainer: Trainer) -> str:
    return type(trainer.strategy).__name__
