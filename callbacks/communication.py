"""Send gradients in fewer bytes, or less often, under DDP."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.distributed.communication import CommunicationHook, HalfPrecision, read
from lightning_optim.distributed.post_local_sgd import PostLocalSGD
from lightning_optim.distributed.powersgd import PowerSGD
from lightning_optim.errors import OptionError

ADVICE = (
    "FSDP sends gradients in fewer bits by itself: FSDPStrategy(mixed_precision=MixedPrecision(reduce_dtype="
    "torch.bfloat16)), or fully_shard(..., mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)). Use strategy "
    "'ddp', or remove the callback."
)


class Communication(FitCallback):
    """Set a communication hook of DDP, on any device, and save its state in checkpoints.

    In a single process the callback does nothing, except to pass on a state that it loaded to the next checkpoint.

    Sources: Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727 (PowerSGD); Lin, Stich, Patel & Jaggi 2018,
    arXiv:1808.07217 (post-local SGD). The arithmetic is that of torch's hooks.

    Args:
        kind: "bf16" and "fp16" send gradients in 16 bits. "powersgd" sends two thin factors of each matrix, and adds
            the rest to the next gradient. "post_local_sgd" stops sending gradients between nodes, and averages the
            weights of all ranks periodically.
        rank: For "powersgd": columns of the factors, at least 1. Default: 1.
        start: For "powersgd" and "post_local_sgd": steps of ordinary DDP before it begins, at least 2. Default: 1000.
        period: For "post_local_sgd": steps between two averagings of the weights, at least 2. Default: 4.
        local_ranks: For "post_local_sgd": number of ranks that share gradients in every step. Default: the ranks of a
            node, or 1 on a single node.

    Raises:
        OptionError: for an unknown kind, or an option that the kind does not have or that is out of range. At the start
            of the fit: under a strategy other than DDP, or if the strategy has a communication hook already.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> communication = Communication("powersgd", rank=2)
        >>> communication.options
        {'rank': 2, 'start': 1000}
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(fast_dev_run=1, callbacks=[communication], **options)
        >>> trainer.fit(BoringModel())  # one process sends nothing; two, with strategy="ddp", send factors

        In a config:

        .. code-block:: yaml

            trainer:
              strategy: ddp
              devices: 2
              callbacks:
                - class_path: lightning_optim.callbacks.Communication
                  init_args: {kind: powersgd, rank: 2}
    """

    def __init__(
        self,
        kind: Literal["bf16", "fp16", "powersgd", "post_local_sgd"],
        rank: int | None = None,
        start: int | None = None,
        period: int | None = None,
        local_ranks: int | None = None,
    ) -> None:
        super().__init__()
        given = {"rank": rank, "start": start, "period": period, "local_ranks": local_ranks}
        self.kind, self.options = read({"kind": kind, **{n: value for n, value in given.items() if value is not None}})

    @override
    def forget(self) -> None:
        self._hook: CommunicationHook | None = None
        self._state: Mapping[str, Any] = {}  # of a checkpoint, until there is a hook

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.world_size == 1:
            return
        model: Any = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            raise OptionError(
                f"Communication {self.kind!r} is for DDP, and the strategy is {type(trainer.strategy).__name__}. "
                f"{ADVICE}"
            )
        if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
            raise OptionError("Communication: the strategy has a ddp_comm_hook already. Use one of the two.")
        self._hook = hook = self._make(trainer, pl_module)
        if self._state:
            hook.load(self._state["exchange"])
            self._state = {}
        # In a lambda, since torch refuses its bf16 hook by name on machines without a GPU.
        model.register_comm_hook(None, lambda _, bucket: hook.hook(bucket))

    def _make(self, trainer: Trainer, pl_module: LightningModule) -> CommunicationHook:
        if self.kind == "powersgd":
            return PowerSGD(**self.options, params=[p for p in pl_module.parameters() if p.requires_grad])
        if self.kind == "post_local_sgd":
            for optimizer in trainer.optimizers:
                if getattr(optimizer, "own_average", False):
                    raise OptionError(
                        f"Communication 'post_local_sgd' averages the parameters of ranks alone, and in "
                        f"{type(optimizer).__name__} the average that is evaluated follows from them and from z. Use "
                        "'bf16', 'fp16' or 'powersgd'."
                    )
            per_node = trainer.world_size // trainer.num_nodes if trainer.num_nodes > 1 else 1
            options = {**self.options, "local_ranks": self.options["local_ranks"] or per_node}
            hook = PostLocalSGD(**options, optimizers=trainer.optimizers)
            for optimizer in trainer.optimizers:
                self.undo.append(optimizer.register_step_post_hook(hook.after_step).remove)
            self._synchronize_before_saves(trainer, hook)
            return hook
        return HalfPrecision({"bf16": torch.bfloat16, "fp16": torch.float16}[self.kind])

    def _synchronize_before_saves(self, trainer: Trainer, hook: PostLocalSGD) -> None:
        """Wrap the method of the trainer; no callback hook runs before the model's state is collected."""

        def save_checkpoint(save: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            hook.synchronize()
            save(*args, **kwargs)

        self.wrap(trainer, "save_checkpoint", save_checkpoint)

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if isinstance(self._hook, PowerSGD):
            self._hook.reset_if_not_finite()

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(self._hook, PostLocalSGD):
            self._hook.synchronize()

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._hook is not None:
            return {"kind": self.kind, "exchange": self._hook.state()}
        return dict(self._state)

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["kind"] == self.kind:  # otherwise start without state
            self._state = state_dict
