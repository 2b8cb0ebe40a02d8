"""Gradients of a loss as vectors, under every strategy and without a trace in `.grad`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.analysis.vectors import Vectors
from lightning_optim.distributed.fsdp1 import flattened, is_flattened
from lightning_optim.distributed.placement import drop_gradients, gradient_of, is_sharded, reshard
from lightning_optim.errors import OptionError

USED_UP = (
    "The graph of the loss that the closure returned is used up. The closure must compute the loss anew in each call, "
    "and must not call backward()."
)


class Gradients:
    """Gradients with respect to the parameters of a space of vectors.

    FSDP hands out gradients only in `.grad`, by a backward pass of the whole model; these are means over the ranks. All
    others come from `torch.autograd.grad` and belong to this rank alone.

    Args:
        space: The space.

    Attributes:
        modules: The FSDP modules that hold parameters of the space.
        found: Whether a parameter has had a gradient, the last time.
    """

    def __init__(self, space: Vectors) -> None:
        self.space = space
        self.modules = _fully_sharded(space.params)
        self.found = False
        held = [p for module in self.modules for p in module.parameters() if p.requires_grad]
        self._held = list(dict.fromkeys([*space.params, *held]))

    def of(self, scalar: Tensor) -> Tensor:
        """The gradient of a scalar, which frees its graph.

        Raises:
            OptionError: where the graph is that of an earlier call, or was freed by a backward pass.
        """
        try:
            if not self.modules:
                return self._flat(torch.autograd.grad(scalar, self.space.params, allow_unused=True))
            with _without_gradients(self._held):
                scalar.backward()  # type: ignore[no-untyped-call]
                return self._flat([gradient_of(p) for p in self.space.params])
        except RuntimeError as error:
            if "backward through the graph a second time" not in str(error):
                raise
            raise OptionError(USED_UP) from error

    def _flat(self, grads: Sequence[Tensor | None]) -> Tensor:
        self.found = any(grad is not None for grad in grads)
        return self.space.flat(grads)

    def forget(self) -> None:
        """Let FSDP gather parameters again, after they were changed or after a forward pass alone."""
        for module in self.modules:
            reshard(module)


def _fully_sharded(params: list[Tensor]) -> list[nn.Module]:
    """The FSDP modules that hold some parameters. Nothing leads from a parameter to them (0.2 s, once for a call)."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not any(map(is_sharded, params)):
        return []
    wrappers = [getattr(fsdp, name, None) for name in ("FSDPModule", "FullyShardedDataParallel")]
    kinds = {kind for wrapper in wrappers if wrapper is not None for kind in _subclasses(wrapper)}
    sought = {id(p) for p in params}
    modules = [thing for thing in gc.get_objects() if type(thing) in kinds]
    return [module for module in modules if not sought.isdisjoint(map(id, module.parameters()))]


def _subclasses(kind: Any) -> Iterator[Any]:
    """A class and what derives from it: FSDP2 makes a class for each kind of module."""
    yield kind
    for derived in kind.__subclasses__():
        yield from _subclasses(derived)


@contextmanager
def _without_gradients(params: list[Tensor]) -> Iterator[None]:
    """Inside, parameters have no gradients; afterwards those that they had before."""
    handles = [flattened(p).handle() for p in params if is_flattened(p) and not p.numel()]
    flat = [(handle.flat_param, handle.flat_param.grad) for handle in handles if handle is not None]
    before = [p.grad for p in params]
    drop_gradients(params)
    try:
        yield
    finally:
        drop_gradients(params)
        for p, grad in [*zip(params, before, strict=True), *flat]:
            p.grad = grad
