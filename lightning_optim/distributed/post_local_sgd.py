"""Post-local SGD with state that resumes.  Lin, Stich, Patel & Jaggi 2018, arXiv:1808.07217."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import OptionError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


class PostLocalSGD:
    """torch's post-local SGD hook: after `start` steps only subgroups share gradients, and weights are averaged.

    Args:
        period: Steps between two averagings of the weights over all ranks.
        start: Number of steps that first share gradients over all ranks.
        local_ranks: Size of the subgroups, whose ranks share gradients in every step.
        optimizers: The optimizers whose parameters are averaged.

    Raises:
        OptionError: if `local_ranks` does not divide the number of ranks, or equals it.
    """

    def __init__(self, period: int, start: int, local_ranks: int, optimizers: Sequence[Optimizer]) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState
        from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

        ranks = dist.get_world_size()
        if ranks % local_ranks or local_ranks == ranks:
            raise OptionError(
                f"communication 'post_local_sgd': local_ranks={local_ranks} must divide the number of ranks, {ranks}, "
                "and be less: ranks that share gradients in every step have nothing to average."
            )
        subgroup, _ = dist.new_subgroups(group_size=local_ranks)  # type: ignore[no-untyped-call]
        self._torch: Any = PostLocalSGDState(None, subgroup, start)  # type: ignore[no-untyped-call]
        self._averagers = {o: PeriodicModelAverager(period, warmup_steps=start) for o in optimizers}

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import post_localSGD_hook

        return post_localSGD_hook(self._torch, bucket)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Average the weights if a period is over. To be registered as a step post-hook of each optimizer."""
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # a skipped step
        self._averagers[optimizer].average_parameters(optimizer.param_groups)
        self._torch.iter = max(averager.step for averager in self._averagers.values())

    @torch.no_grad()
    def synchronize(self) -> None:
        """Set weights and optimizer state to their mean over the ranks.

        A checkpoint holds one model, so this is called before a save. Then the run that goes on and a run that resumes
        from the file start from the same values.
        """
        if self._torch.iter <= self._torch.start_localSGD_iter:
            return
        for optimizer in self._averagers:
            state_dict = optimizer.state_dict()
            mappings = [*state_dict["state"].values(), *state_dict["param_groups"]]
            values = [value for mapping in mappings for name, value in mapping.items() if name != "step"]
            values += [p.data for group in optimizer.param_groups for p in group["params"]]
            for value in values:
                if isinstance(value, Tensor) and value.is_floating_point():
                    dist.all_reduce(value)
                    value /= dist.get_world_size()
            optimizer.load_state_dict(state_dict)  # quantized slots are copies in it

    def state(self) -> dict[str, Any]:
        return {"steps": [averager.step for averager in self._averagers.values()]}

    def load(self, state: Mapping[str, Any]) -> None:
        for averager, steps in zip(self._averagers.values(), state["steps"], strict=True):
            averager.step = steps
        self._torch.iter = max(state["steps"], default=0)
