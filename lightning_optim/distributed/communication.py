"""What ranks send each other in a step: the words of a config, and torch's hooks for DDP with state that resumes.

bf16 and fp16 halve the gradients on their way. PowerSGD sends two thin factors of each matrix: Vogels, Karimireddy &
Jaggi 2019, arXiv:1905.13727. Post-local SGD sends gradients within a node and averages weights now and then: Lin,
Stich, Patel & Jaggi 2018, arXiv:1808.07217. The arithmetic is torch's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim.errors import OptionError, nearest

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

# The options of each word, with their defaults.
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {},
    "powersgd": {"rank": 1, "start": 1000},
    "post_local_sgd": {"period": 4, "start": 1000, "local_ranks": None},
}
LEAST = {"rank": 1, "start": 2, "period": 2, "local_ranks": 1}


def read(spec: Any) -> tuple[str, dict[str, Any]]:
    """The word and all its options, from a word or from a mapping with `kind` and options.

    Raises:
        OptionError: for an unknown word or option, or a value out of range.

    Example:
        >>> read({"kind": "powersgd", "rank": 4})
        ('powersgd', {'rank': 4, 'start': 1000})
    """
    given = {"kind": spec} if isinstance(spec, str) else spec
    if not isinstance(given, Mapping) or "kind" not in given:
        raise OptionError(
            f"communication={spec!r} must be one of {', '.join(KINDS)}, or a mapping with kind and options, such as "
            "{kind: powersgd, rank: 4}."
        )
    kind = given["kind"]
    if kind not in KINDS:
        raise OptionError(f"communication {kind!r} is not one of {', '.join(KINDS)}.{nearest(str(kind), KINDS)}")
    options = {name: value for name, value in given.items() if name != "kind"}
    for name, value in options.items():
        if name not in KINDS[kind]:
            has = f"its options are {', '.join(KINDS[kind])}" if KINDS[kind] else "it has none"
            raise OptionError(f"communication {kind!r} has no option {name!r}: {has}.{nearest(name, KINDS[kind])}")
        if type(value) is not int or value < LEAST[name]:
            raise OptionError(f"communication {kind!r}: {name}={value!r} must be an integer of at least {LEAST[name]}.")
    return kind, {**KINDS[kind], **options}


class Exchange(Protocol):
    """How ranks agree on a step. DDP calls `hook` with each bucket of gradients that is ready."""

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Send a bucket; the future holds what the gradients become."""
        ...

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; every rank calls it, and rank 0 gets all of it."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        ...


class HalfPrecision:
    """Gradients travel in 16 bits and are summed in them.

    Args:
        dtype: bfloat16 keeps the range and 8 bits of precision, float16 keeps 11 bits and turns what is above 65504
            to infinity.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        self._compress: Any = {
            torch.bfloat16: default_hooks.bf16_compress_hook,
            torch.float16: default_hooks.fp16_compress_hook,
        }[dtype]

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        sent: torch.futures.Future[Tensor] = self._compress(None, bucket)
        return sent

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        pass  # it keeps nothing


class PowerSGD:
    """torch's PowerSGD, with its state kept by parameter.

    torch keeps the error feedback and the factor Q of a whole bucket, and DDP composes its buckets anew after the
    first step of each process. So state that was saved by bucket does not fit the first step of a resumed run. Here it
    is taken apart by parameter whenever buckets change. For the same reason the first Q of a matrix is drawn from
    the number of its parameter.

    Args:
        rank: Columns of the two factors.
        start: Steps that send whole gradients first.
        params: The trainable parameters, in the same order on every rank.

    Raises:
        OptionError: for a parameter without an axis, which torch's hook cannot take.
    """

    def __init__(self, rank: int, start: int, params: Sequence[Tensor]) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

        if any(p.dim() == 0 for p in params):
            raise OptionError(
                "communication 'powersgd' cannot serve a parameter without an axis, and the model has one of shape (). "
                "Give it the shape (1,), or use 'bf16'."
            )
        # A matrix whose gradient is zero has a factor of zeros; without an epsilon its direction is 0 / 0.
        self._torch: Any = PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=start, orthogonalization_epsilon=1e-8
        )
        self._params = list(params)
        self._number = {p: i for i, p in enumerate(self._params)}
        self._buckets: dict[int, list[int]] = {}  # the parameters of each bucket that torch holds state of
        self._before: dict[int, list[int]] = {}  # and of the step before this one
        self._errors: dict[int, Tensor] = {}  # what torch does not hold now, by parameter
        self._factors: dict[int, Tensor] = {}

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook

        if self._torch.iter >= self._torch.start_powerSGD_iter:
            if bucket.index() == 0:  # the first of a step: everything of the last one has arrived
                self._take_apart()
            self._put_together(bucket)
        sent: torch.futures.Future[Tensor] = powerSGD_hook(self._torch, bucket)
        if bucket.buffer().device.type == "cpu":
            # The second and third message of a bucket leave from gloo's threads as its first arrives; those of two
            # buckets would cross, in another order on each rank.
            sent.wait()
        return sent

    def _take_apart(self) -> None:
        for index, numbers in self._buckets.items():
            errors = self._torch.error_dict[index].split([self._params[i].numel() for i in numbers])
            self._errors.update(zip(numbers, errors, strict=True))
            matrices = self._matrices(numbers)
            factors = self._torch.q_memory_dict[index].split([columns * rank for _, _, columns, rank in matrices])
            self._factors.update((i, q) for (i, *_), q in zip(matrices, factors, strict=True))
        if self._buckets:
            self._before, self._buckets = self._buckets, {}

    def _put_together(self, bucket: GradBucket) -> None:
        index, like = bucket.index(), bucket.buffer()
        numbers = [self._number[p] for p in bucket.parameters()]
        errors = [self._errors.pop(i, None) for i in numbers]
        matrices = self._matrices(numbers)
        factors = [self._factors.pop(i, None) for i, *_ in matrices]
        unchanged = self._before.get(index) == numbers and all(error is not None for error in errors)
        self._buckets[index] = numbers
        if unchanged:
            return  # torch holds them as they are
        held = self._torch
        held.error_dict[index] = torch.cat(
            [like.new_zeros(self._params[i].numel()) if e is None else e for i, e in zip(numbers, errors, strict=True)]
        )
        drawn = [
            _normal(columns * rank, i).to(like) if q is None else q.to(like)
            for (i, _, columns, rank), q in zip(matrices, factors, strict=True)
        ]
        held.q_memory_dict[index] = torch.cat(drawn) if drawn else like.new_empty(0)
        held.p_memory_dict[index] = like.new_empty(sum(rows * rank for _, rows, _, rank in matrices))

    def _matrices(self, numbers: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """Number, rows, columns and rank of those that torch sends as factors, in its order: equal shapes together."""
        by_shape: dict[tuple[int, int], list[tuple[int, int, int, int]]] = {}
        for i in numbers:
            rows = self._params[i].shape[0]
            columns = self._params[i].numel() // max(rows, 1)
            rank = min(rows, columns, self._torch.matrix_approximation_rank)
            if (rows + columns) * rank * self._torch.min_compression_rate < rows * columns:
                by_shape.setdefault((rows, columns), []).append((i, rows, columns, rank))
        return [matrix for same in by_shape.values() for matrix in same]

    def forget_if_spoilt(self) -> None:
        """Begin anew where a gradient that is not finite went into the error feedback: it would never leave it.

        All ranks see the same, since the sum that such a gradient enters is not finite on any of them.
        """
        errors = [error for error in self._torch.error_dict.values() if error.numel()]
        if errors and not torch.stack(torch._foreach_norm(errors, torch.inf)).isfinite().all():
            for held in (self._torch.error_dict, self._torch.p_memory_dict, self._torch.q_memory_dict):
                held.clear()
            for kept in (self._buckets, self._before, self._errors, self._factors):
                kept.clear()

    def state(self) -> dict[str, Any]:
        self._take_apart()
        every = range(len(self._params))
        errors = torch.cat([self._errors[i] for i in every]) if self._errors else None
        return {
            "iter": self._torch.iter,
            "errors": [] if errors is None else _of_all_ranks(errors),
            "factors": {i: q.cpu().clone() for i, q in self._factors.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """The ranks' own errors where their number is the same, else their mean, which adds up to the same gradient."""
        self._torch.iter = state["iter"]
        errors: list[Tensor] = state["errors"]
        if not errors:
            return
        ranks, sizes = dist.get_world_size(), [p.numel() for p in self._params]
        mine = errors[dist.get_rank()] if len(errors) == ranks else torch.stack(errors).mean(0)
        if len(mine) != sum(sizes):
            raise OptionError(
                f"communication 'powersgd': the checkpoint holds the errors of {len(mine)} values and the model has "
                f"{sum(sizes)} that are trained. Was it saved from another model?"
            )
        device = self._params[0].device
        self._errors = dict(enumerate(torch.split(mine.to(device), sizes)))
        self._factors = {int(i): q.to(device) for i, q in state["factors"].items()}


class PostLocalSGD:
    """torch's post-local SGD: after `start` steps gradients stay among `local_ranks` ranks, and weights are averaged.

    Args:
        period: Steps between two averagings of the weights over all ranks.
        start: Steps that send gradients to all ranks first.
        local_ranks: Ranks that go on sharing gradients in each step.
        optimizers: Those whose parameters are averaged.

    Raises:
        OptionError: where `local_ranks` does not divide the number of ranks, or is all of them.
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
        group, _ = dist.new_subgroups(group_size=local_ranks)  # type: ignore[no-untyped-call]
        self._torch: Any = PostLocalSGDState(None, group, start)  # type: ignore[no-untyped-call]
        self._averagers = {o: PeriodicModelAverager(period, warmup_steps=start) for o in optimizers}

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import post_localSGD_hook

        return post_localSGD_hook(self._torch, bucket)

    def after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        """Average the weights where it is time; a post-hook of the optimizer's step."""
        if not any(p.grad is not None for group in optimizer.param_groups for p in group["params"]):
            return  # a step that was skipped
        self._averagers[optimizer].average_parameters(optimizer.param_groups)
        self._torch.iter = max(averager.step for averager in self._averagers.values())

    @torch.no_grad()
    def synchronise(self) -> None:
        """Give all ranks the mean of their weights and optimizer states.

        A checkpoint holds one model, so a save does this first. The run that goes on and the one that resumes from
        the file then start from the same.
        """
        if self._torch.iter <= self._torch.start_localSGD_iter:
            return
        for optimizer in self._averagers:
            found = optimizer.state_dict()
            held = [*found["state"].values(), *found["param_groups"]]
            values = [value for one in held for name, value in one.items() if name != "step"]
            values += [p.data for group in optimizer.param_groups for p in group["params"]]
            for value in values:
                if isinstance(value, Tensor) and value.is_floating_point():
                    dist.all_reduce(value)
                    value /= dist.get_world_size()
            optimizer.load_state_dict(found)  # state in codes has left as tensors

    def state(self) -> dict[str, Any]:
        return {"steps": [averager.step for averager in self._averagers.values()]}

    def load(self, state: Mapping[str, Any]) -> None:
        for averager, steps in zip(self._averagers.values(), state["steps"], strict=True):
            averager.step = steps
        self._torch.iter = max(state["steps"], default=0)


def _normal(size: int, seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def _of_all_ranks(mine: Tensor) -> list[Tensor]:
    """The vectors of all ranks on the CPU of rank 0, and nothing on the others; one at a time."""
    if dist.get_rank() != 0:
        dist.send(mine, 0)
        return []
    found = [mine.cpu().clone()]
    for rank in range(1, dist.get_world_size()):
        theirs = torch.empty_like(mine)
        dist.recv(theirs, rank)
        found.append(theirs.cpu())
    return found
