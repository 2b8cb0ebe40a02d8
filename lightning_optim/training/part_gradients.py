"""The size of each rank's own gradient of each batch, before ranks are averaged and batches accumulated.

Tensor hooks see the gradient on its way: where autograd hands it to a parameter (one process, DDP), to FSDP1's flat
parameter, or to the gathered parameter of FSDP2. Nothing is copied or kept but two numbers for each parameter.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor, values_of

TENSOR_PARALLEL = "ranks share the samples of a batch (tensor parallel), so none has a gradient of its own"


class _Record:
    """What was seen of one parameter: sums over batches of the gradient's squared norm and of its elements."""

    def __init__(self) -> None:
        self.count = 0
        self.whole = True  # since the gradient was last removed
        self.sums: Tensor | None = None

    def add(self, gradient: Tensor) -> None:
        gradient = values_of(gradient)
        square = torch.linalg.vector_norm(gradient, dtype=torch.float64).square()
        sums = torch.stack([square, gradient.sum(dtype=torch.float64)])
        self.sums = sums if self.sums is None else self.sums + sums
        self.count += 1


class PartGradients:
    """Sums over the gradients that this rank computes for some parameters, until `detach`.

    Args:
        model: The outermost module, wrapped as the strategy does.
        fresh: Whether a parameter without `.grad` begins anew, as under manual optimization.

    Attributes:
        refusal: Why gradients of a rank cannot be seen, as a sentence; empty where they can.
    """

    def __init__(self, model: nn.Module, fresh: bool) -> None:
        self.fresh = fresh
        self.refusal = ""
        self._records: dict[Tensor, _Record] = {}
        self._handles: list[Any] = []
        self._gathered: dict[Tensor, Tensor] = {}
        self._attach(model)

    def reset(self, params: Iterable[Tensor]) -> None:
        """Forget what was seen of some parameters; a new accumulation begins."""
        for p in params:
            self._records.pop(p, None)

    def detach(self) -> None:
        """Remove all hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._gathered = [], {}

    def sums(self, params: Iterable[Tensor]) -> tuple[list[Tensor], int]:
        """The sums over batches of |g|^2 and of all elements of g, (2,) float64 for each parameter that had one.

        Returns:
            The sums, and the number of batches; 0 if gradients were there before the first that was seen.
        """
        found = [self._records[p] for p in params if p in self._records]
        whole = all(record.whole for record in found)
        counts = max((record.count for record in found), default=0)
        return [record.sums for record in found if record.sums is not None], counts if whole else 0

    # ------------------------------------------------------------------ hooks

    def _attach(self, model: nn.Module) -> None:
        fsdp = sys.modules.get("torch.distributed.fsdp")
        fsdp1: Any = getattr(fsdp, "FullyShardedDataParallel", ())
        fsdp2: Any = getattr(fsdp, "FSDPModule", ())
        units: list[Any] = [module for module in model.modules() if isinstance(module, fsdp2)]
        for unit in units:
            unit.reshard()  # modules then have the parameters that optimizers have
        module: Any
        for module in model.modules():
            handle = module._handle if isinstance(module, fsdp1) else None
            if handle is not None and handle.flat_param.requires_grad:
                self._hook(handle.flat_param, functools.partial(self._see_flat, handle.flat_param))
        owners = [(p, owner, name) for owner in model.modules() for name, p in owner._parameters.items()]
        for unit in units:
            inside = set(unit.modules())
            within = [(p, owner, name) for p, owner, name in owners if p is not None and owner in inside]
            self._handles.append(unit.register_forward_pre_hook(functools.partial(self._see_unit, within)))
        for p in dict.fromkeys(p for p, _, _ in owners if p is not None and p.requires_grad):
            if is_dtensor(p) and not units:
                self.refusal = TENSOR_PARALLEL
            elif not is_dtensor(p) and not is_flattened(p):
                self._hook(p, functools.partial(self._see, p))

    def _hook(self, tensor: Any, see: Callable[[Tensor], None]) -> None:
        self._handles.append(tensor.register_hook(see))

    def _see(self, p: Tensor, gradient: Tensor) -> None:
        """Take in the gradient of a batch with respect to `p`, as the parameter that the optimizer has."""
        if self.fresh and p.grad is None:
            self.reset([p])
        if p not in self._records:
            self._records[p] = _Record()
            self._records[p].whole = not self.fresh or p.grad is None or not bool(p.grad.any())
        self._records[p].add(gradient.detach())

    def _see_flat(self, flat: Any, gradient: Tensor) -> None:
        """Take in the gradient of FSDP1's flat parameter, tensor by tensor where these are known."""
        if flat._params is None:
            self._see(flat, gradient)
            return
        chunks = torch.split(gradient[: sum(flat._numels_with_padding)], list(flat._numels_with_padding))
        tensors = [chunk for chunk, padding in zip(chunks, flat._is_padding_mask, strict=True) if not padding]
        for p, chunk in zip(flat._params, tensors, strict=True):
            if p.requires_grad:
                self._see(p, chunk)

    def _see_unit(self, within: Sequence[tuple[Tensor, nn.Module, str]], unit: nn.Module, args: Any) -> None:
        """Put hooks on the parameters that FSDP2 has just gathered."""
        for p, now in _gathered(within):
            if is_dtensor(now):
                self.refusal = TENSOR_PARALLEL
            elif now not in self._gathered:
                self._gathered[now] = p
                self._hook(now, functools.partial(self._see, p))


def _gathered(within: Sequence[tuple[Tensor, nn.Module, str]]) -> Iterator[tuple[Tensor, Tensor]]:
    for p, owner, name in within:
        now = owner._parameters.get(name)
        if now is not None and now is not p and now.requires_grad:
            yield p, now
