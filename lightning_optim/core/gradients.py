"""The gradients of a step: which parameters have one, and which gradients are refused.

A step over many small tensors is short, so it looks at each gradient with a few calls that take no Python function, and
closer where something is different from the step before.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_optim.distributed.placement import gradient_of, has_gradient, is_dtensor
from lightning_optim.distributed.plain import is_pending, is_wrapper, resolve_gradients
from lightning_optim.engines.facts import Facts

GRAD, NONE = operator.attrgetter("grad"), type(None)
TRAINABLE = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
TRAINABLE |= {torch.complex32, torch.complex64, torch.complex128}
Parameters = Sequence[tuple[int, Tensor]]  # parameters, each with the index of its parameter group


@dataclass
class Seen:
    """The gradients of a step.

    Attributes:
        params: The parameters that take part, each with the index of its group: the same list as long as they do.
        facts: What launches depend on of their gradients; None where one is no plain tensor of real numbers.
    """

    params: Parameters
    facts: Facts | None = None

    @functools.cached_property
    def grads(self) -> list[Any]:
        """The gradient of each of them, a tensor whose memory holds its values."""
        return [gradient_of(p) for _, p in self.params]


class Look:
    """Looks at the gradients of each step, and remembers what it has found in the last one.

    Args:
        owner: The optimizer, for messages.
    """

    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.every: Parameters = ()
        self.params: list[Tensor] = []
        self.active: Parameters = ()
        self.trained: list[Tensor] = []  # those of `active`, and the others
        self.idle: list[Tensor] = []
        self.in_place = True  # whether `grad` of the parameters is torch's own, which C++ reads
        self.facts: Facts | None = None

    def at(self, every: Parameters) -> Seen:
        """The gradients of a step.

        Args:
            every: All parameters, each with the index of its group: the same list as long as they are.

        Raises:
            RuntimeError: for a gradient that does not fit. Nothing has changed then.
        """
        if every is self.every and (facts := self._facts_of_same()):
            self.facts = facts
            return Seen(self.active, facts)
        if every is not self.every:
            self.every, self.params = every, [p for _, p in every]
        grads = list(map(GRAD, self.params))
        types = set(map(type, grads))
        seen = Seen(every)
        if NONE in types:
            has = (grad is not None or has_gradient(p) for p, grad in zip(self.params, grads, strict=True))
            seen.params = list(itertools.compress(every, has))
            if len(seen.params) == len(self.active) and all(map(operator.is_, seen.params, self.active)):
                seen.params = self.active
        else:
            seen.grads = grads
        if seen.params is not self.active or not types <= {Tensor, NONE} or not self._is_as_before(seen):
            self._look_closer(seen)
        return seen

    def _facts_of_same(self) -> Facts | None:
        """The facts of the gradients, if one call can tell that the same parameters have such as before."""
        if self.facts is None or not self.in_place or any(map(has_gradient, self.idle)):
            return None
        return self.facts.followed_by(self.trained, of_gradients=True)

    def _is_as_before(self, seen: Seen) -> bool:
        """Whether the gradients are of the kinds of the step before. They may have moved."""
        before = self.facts
        if before is None:
            return False
        try:
            self.facts = seen.facts = Facts.of(seen.grads, before)
        except RuntimeError:  # a sparse one has no address
            return False
        return self.facts.kinds is before.kinds

    def _look_closer(self, seen: Seen) -> None:
        self.active, self.facts = (), None  # where one is refused, the next step looks as closely
        refuse_unfit(self.owner, seen)
        self.trained = [p for _, p in seen.params]
        resolve_gradients(self.trained, seen.grads)
        seen.grads = [gradient_of(p) for _, p in seen.params]
        if set(map(type, seen.grads)) <= {Tensor} and not any(map(Tensor.is_complex, seen.grads)):
            seen.facts = Facts.of(seen.grads)
        self.active, self.facts = seen.params, seen.facts
        self.in_place = all(GRAD(cls) is GRAD(Tensor) for cls in set(map(type, self.trained)))
        taking_part = set(map(id, self.trained))
        self.idle = [p for p in self.params if id(p) not in taking_part]


def refuse_unfit(owner: str, seen: Seen) -> None:
    """Refuse sparse gradients, those of another size than their parameters, and wrappers for a plain parameter.

    Integers and numbers of 8 bits are refused too. Without a gradient they may be there: quantized models hold them.

    Raises:
        RuntimeError: for them.
    """
    for (_, p), grad in zip(seen.params, seen.grads, strict=True):
        if p.dtype not in TRAINABLE:
            raise RuntimeError(
                f"{owner} cannot train a parameter of shape {tuple(p.shape)} in {str(p.dtype).removeprefix('torch.')}. "
                "Train it in float16, bfloat16, float32, float64 or complex, or leave it without a gradient."
            )
        if grad.is_sparse:
            raise RuntimeError(
                f"{owner} got a sparse gradient of shape {tuple(p.shape)}; its state is dense. Use "
                "torch.optim.SparseAdam or SGD for that parameter, or Embedding(sparse=False)."
            )
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{owner} got a gradient of shape {tuple(p.shape)} whose layout is "
                f"{str(grad.layout).removeprefix('torch.')}; its state is dense. Set p.grad = p.grad.to_dense() before "
                "the step."
            )
        if grad.numel() != p.numel():
            raise RuntimeError(
                f"{owner}: a gradient has the shape {tuple(grad.shape)}, and its parameter {tuple(p.shape)}. Did the "
                "parameter change after the backward pass?"
            )
        foreign = is_wrapper(grad) and not is_wrapper(p) and not is_pending(grad)
        if foreign or is_dtensor(grad) != is_dtensor(p):
            raise RuntimeError(
                f"{owner} got a gradient of the class {type(grad).__name__} for a {type(p).__name__} of shape "
                f"{tuple(p.shape)}. Set p.grad to a tensor of the parameter's kind before the step."
            )
