"""A shard: what one process holds of a tensor."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_optim.errors import OptionError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Shard:
    """What one process holds of a tensor.

    A shard is a rectangular block: of the tensor itself (DTensor), or of the flattened tensor (FSDP1). `view` is the
    shape in which it is one; `offsets` and `sizes` say which block of `view` it is.

    Attributes:
        shape: Shape of the whole tensor, as in the model before it was sharded.
        view: Either `shape`, or `(shape.numel(),)` for a flattened tensor.
        offsets: First index of the shard along each axis of `view`.
        sizes: Size of the shard along each axis of `view`; 0 where this process holds no element.
        splits: Pairs of an axis of `view` and the process group over which that axis is split. Groups of replicas
            (hybrid sharding) are not listed. Empty where this process holds the whole tensor.
        is_flat_parameter: Whether this is a shard of FSDP1's flat parameter (`use_orig_params=False`), which
            concatenates several tensors. `shape` is then the shape of the flat parameter.
        strided: Whether the shard is no rectangular block (tensor parallelism and FSDP2 split the same axis).
            `offsets` mean nothing then.
    """

    shape: torch.Size
    view: torch.Size
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    splits: tuple[tuple[int, ProcessGroup], ...] = ()
    is_flat_parameter: bool = False
    strided: bool = False

    @classmethod
    def whole(cls, shape: torch.Size) -> Shard:
        """The shard of a tensor that is not sharded."""
        return cls(shape, shape, (0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements of the whole tensor."""
        return self.shape.numel()

    @property
    def process_groups(self) -> tuple[ProcessGroup, ...]:
        """The process groups over which partial sums are all-reduced, one after the other."""
        return tuple(group for _, group in self.splits)

    def process_groups_along(self, axes: Collection[int]) -> tuple[ProcessGroup, ...]:
        """The process groups over which some axes of the tensor are split."""
        among = {axis % len(self.view) for axis in axes}
        return tuple(group for split, group in self.splits if split in among)

    @property
    def without_axes(self) -> bool:
        """Whether the shard has lost the axes of its tensor: FSDP1 splits flattened tensors."""
        return self.is_flat_parameter or len(self.view) != len(self.shape)

    def global_indices(self, device: torch.device | str = "cpu") -> Tensor:
        """The row-major index in the whole tensor of each element of the shard, (numel of the shard,) int64.

        Global indices do not depend on the number of ranks. So a counter-based random number that is computed from
        them is the same under every strategy.

        Raises:
            OptionError: where they are unknown (`is_flat_parameter`, `strided`).
        """
        self._check_known()
        found = torch.zeros(1, dtype=torch.int64, device=device)
        for total, offset, size in zip(self.view, self.offsets, self.sizes, strict=True):
            along = torch.arange(offset, offset + size, dtype=torch.int64, device=device)
            found = (found[:, None] * total + along).reshape(-1)
        return found

    def runs(self) -> tuple[int, int, int]:
        """The global indices as three numbers: `run` consecutive ones from `first` on, repeated every `stride`.

        Returns:
            first, run and stride. run equals stride where the shard is contiguous, and where it is empty.

        Raises:
            OptionError: where the indices are unknown, or cannot be written so (the tensor is split along three
                axes, or along two of which neither is the first).
        """
        self._check_known()
        split = [axis for axis, (size, total) in enumerate(zip(self.sizes, self.view, strict=True)) if size != total]
        if not split or 0 in self.sizes:
            return 0, 1, 1
        strides = [self.view[axis + 1 :].numel() for axis in range(len(self.view))]
        first = sum(offset * stride for offset, stride in zip(self.offsets, strides, strict=True))
        if len(split) > 2 or (len(split) == 2 and any(size != 1 for size in self.sizes[: split[0]])):
            raise OptionError(
                f"A tensor of shape {tuple(self.shape)} is split along the axes {split}; at most two can be served."
            )
        inner = strides[split[-1]]
        run, stride = self.sizes[split[-1]] * inner, self.view[split[-1]] * inner
        contiguous = all(size == 1 for size in self.sizes[: split[-1]])
        return first, run, run if contiguous else stride

    def _check_known(self) -> None:
        if self.is_flat_parameter:
            raise OptionError(
                "FSDP1 with use_orig_params=False shows flat parameters, in which tensors are not known. Set "
                "FSDPStrategy(use_orig_params=True), or use ModelParallelStrategy (FSDP2)."
            )
        if self.strided:
            raise OptionError(
                f"A tensor of shape {tuple(self.shape)} is split twice along one axis (tensor parallel and FSDP2), "
                "and which elements are here is not known. Split it along different axes."
            )
