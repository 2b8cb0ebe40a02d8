"""What a graph of autograd says about whether it can be differentiated once more."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

# Functions of torch that hand gradients through.
TRANSPARENT = ("_DDPSink",)
WRONG_TWICE = ("WeightNormInterfaceBackward",)


def nodes(tensors: Iterable[Tensor]) -> Iterator[Any]:
    """All nodes of the graphs of some tensors, each once."""
    waiting = [x.grad_fn for x in tensors if x.grad_fn is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        yield node
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)


def dead_end(tensors: Iterable[Tensor]) -> str:
    """Why derivatives of these tensors would be incomplete without an error; empty where nothing is known.

    A function marked `once_differentiable` leaves a node that raises when it is reached. But it is cut off from what
    it was computed from, so a backward pass to chosen inputs never comes there.
    """
    found = any(node.name() == "torch::autograd::Error" for node in nodes(tensors))
    return "A function of the model is marked once_differentiable." if found else ""


def has_functions_of_users(tensors: Iterable[Tensor]) -> bool:
    """Whether a function with a backward pass written in Python took part.

    Such a pass may call kernels that autograd does not see. A second one is then wrong without a word.
    """
    kind: Any = torch.autograd.function.BackwardCFunction
    return any(isinstance(node, kind) and not node.name().startswith(TRANSPARENT) for node in nodes(tensors))


def wrong_twice(loss: Tensor) -> str:
    """Why a second backward pass would be wrong without an error; empty where nothing is known."""
    found = any(node.name().startswith(WRONG_TWICE) for node in nodes([loss]))
    return "What torch computes as the second derivative of weight norm is wrong." if found else ""


def precision(tensors: Iterable[Tensor]) -> float:
    """The relative rounding of the coarsest type of number in which their gradients are computed."""
    kinds = {kind.dtype for node in nodes(tensors) for kind in getattr(node, "_input_metadata", ())}
    return max((torch.finfo(kind).eps for kind in kinds if kind.is_floating_point), default=0.0)
