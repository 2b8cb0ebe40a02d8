"""PowerSGD with state that resumes.  Vogels, Karimireddy & Jaggi 2019, arXiv:1905.13727."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.errors import OptionError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket


class _Matrix(NamedTuple):
    """The parameter of index `number`, sent as two factors of shapes (rows, rank) and (columns, rank)."""

    number: int
    rows: int
    columns: int
    rank: int


class PowerSGD:
    """torch's PowerSGD hook with its state stored by parameter.

    torch stores the error feedback and the factor Q by bucket, and DDP composes its buckets anew after the first step
    of each process. So state saved by bucket would not fit the first step of a resumed run. Here it is split by
    parameter whenever the buckets change. For the same reason the initial Q of a matrix is seeded with the index of
    its parameter.

    Args:
        rank: Columns of the two factors.
        start: Number of steps that send whole gradients first.
        params: The trainable parameters, in the same order on every rank.

    Raises:
        OptionError: for a parameter of shape (), which torch's hook does not support.
    """

    def __init__(self, rank: int, start: int, params: Sequence[Tensor]) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

        if any(p.dim() == 0 for p in params):
            raise OptionError(
                "communication 'powersgd' cannot serve a parameter without an axis, and the model has one of shape (). "
                "Give it the shape (1,), or use 'bf16'."
            )
        # A matrix whose gradient is zero has a factor of zeros; without an epsilon its direction would be 0 / 0.
        options: dict[str, Any] = {"matrix_approximation_rank": rank, "start_powerSGD_iter": start}
        self._torch: Any = PowerSGDState(None, **options, orthogonalization_epsilon=1e-8)  # pyright: ignore[reportArgumentType]
        self._params = list(params)
        self._index = {p: i for i, p in enumerate(self._params)}
        self._buckets: dict[int, list[int]] = {}  # indices of the parameters in each bucket for which torch has state
        self._previous: dict[int, list[int]] = {}  # the same in the step before
        self._errors: dict[int, Tensor] = {}  # by parameter, while torch does not have them
        self._factors: dict[int, Tensor] = {}

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook

        if self._torch.iter >= self._torch.start_powerSGD_iter:
            if bucket.index() == 0:  # the first of a step; all buckets of the last step have been reduced
                self._split_by_parameter()
            self._assemble(bucket)
        future: torch.futures.Future[Tensor] = powerSGD_hook(self._torch, bucket)
        if bucket.buffer().device.type == "cpu":
            # A bucket needs three all-reduces, and gloo's threads start the second and third when the one before ends.
            # Those of two buckets would interleave, in another order on each rank.
            future.wait()
        return future

    def _split_by_parameter(self) -> None:
        for index, members in self._buckets.items():
            errors = self._torch.error_dict[index].split([self._params[i].numel() for i in members])
            self._errors.update(zip(members, errors, strict=True))
            matrices = self._matrices(members)
            factors = self._torch.q_memory_dict[index].split([matrix.columns * matrix.rank for matrix in matrices])
            self._factors.update((matrix.number, q) for matrix, q in zip(matrices, factors, strict=True))
        if self._buckets:
            self._previous, self._buckets = self._buckets, {}

    def _assemble(self, bucket: GradBucket) -> None:
        """Give torch the state of a bucket, composed of that of its parameters."""
        index, like = bucket.index(), bucket.buffer()
        members = [self._index[p] for p in bucket.parameters()]
        errors = [self._errors.pop(i, None) for i in members]
        matrices = self._matrices(members)
        factors = [self._factors.pop(matrix.number, None) for matrix in matrices]
        unchanged = self._previous.get(index) == members and all(error is not None for error in errors)
        self._buckets[index] = members
        if unchanged:
            return  # torch has them in this order
        self._torch.error_dict[index] = torch.cat(
            [like.new_zeros(self._params[i].numel()) if e is None else e for i, e in zip(members, errors, strict=True)]
        )
        flat = [
            _normal(matrix.columns * matrix.rank, matrix.number).to(like) if q is None else q.to(like)
            for matrix, q in zip(matrices, factors, strict=True)
        ]
        self._torch.q_memory_dict[index] = torch.cat(flat) if flat else like.new_empty(0)
        self._torch.p_memory_dict[index] = like.new_empty(sum(matrix.rows * matrix.rank for matrix in matrices))

    def _matrices(self, members: Sequence[int]) -> list[_Matrix]:
        """The parameters that torch sends as factors, in its order: those of equal shape together."""
        by_shape: dict[tuple[int, int], list[_Matrix]] = {}
        for i in members:
            rows = self._params[i].shape[0]
            columns = self._params[i].numel() // max(rows, 1)
            rank = min(rows, columns, self._torch.matrix_approximation_rank)
            if (rows + columns) * rank * self._torch.min_compression_rate < rows * columns:
                by_shape.setdefault((rows, columns), []).append(_Matrix(i, rows, columns, rank))
        return [matrix for same in by_shape.values() for matrix in same]

    def reset_if_not_finite(self) -> None:
        """Discard all state if the error feedback contains NaN or infinity, which would never leave it.

        All ranks come to the same result: the sum over ranks, of which each has its error, is not finite on any.
        """
        errors = [error for error in self._torch.error_dict.values() if error.numel()]
        if errors and not torch.stack([error.norm(torch.inf) for error in errors]).isfinite().all():
            for by_bucket in (self._torch.error_dict, self._torch.p_memory_dict, self._torch.q_memory_dict):
                by_bucket.clear()
            for mine in (self._buckets, self._previous, self._errors, self._factors):
                mine.clear()

    def state(self) -> dict[str, Any]:
        self._split_by_parameter()
        errors = torch.cat([self._errors[i] for i in range(len(self._params))]) if self._errors else None
        return {
            "iter": self._torch.iter,
            "errors": [] if errors is None else _gather_on_rank_0(errors),
            "factors": {i: q.cpu().clone() for i, q in self._factors.items()},
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the error of each rank; on another number of ranks their mean, which adds to the same gradient."""
        self._torch.iter = state["iter"]
        errors: list[Tensor] = state["errors"]
        if not errors:
            return
        ranks, sizes = dist.get_world_size(), [p.numel() for p in self._params]
        local = errors[dist.get_rank()] if len(errors) == ranks else torch.stack(errors).mean(0)
        if len(local) != sum(sizes):
            raise OptionError(
                f"communication 'powersgd': the checkpoint has the errors of {len(local)} values, and the model has "
                f"{sum(sizes)} trainable ones. Was it saved from another model?"
            )
        device = self._params[0].device
        self._errors = dict(enumerate(torch.split(local.to(device), sizes)))
        self._factors = {int(i): q.to(device) for i, q in state["factors"].items()}


def _normal(size: int, seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")


def _gather_on_rank_0(local: Tensor) -> list[Tensor]:
    """The vectors of all ranks in CPU memory on rank 0, an empty list on the others. One vector is sent at a time."""
    if dist.get_rank() != 0:
        dist.send(local, 0)
        return []
    vectors = [local.cpu().clone()]
    for rank in range(1, dist.get_world_size()):
        received = torch.empty_like(local)
        dist.recv(received, rank)
        vectors.append(received.cpu())
    return vectors
