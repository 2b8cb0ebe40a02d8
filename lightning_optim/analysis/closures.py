"""What is asked of parameters and of the closure that computes their loss, each in a sentence."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.placement import local, logical_shape
from lightning_optim.errors import OptionError, shown

Closure = Callable[[], Any]
ALLOWED = "Return the mean loss of fixed batches as a scalar tensor, computed from the parameters."


def checked(owner: str, params: Iterable[Tensor]) -> list[Tensor]:
    """The parameters as a list.

    Args:
        owner: The function whose argument they are, for the message.
        params: The parameters.

    Raises:
        OptionError: if there are none; if one is no leaf, is frozen, complex, an integer or not initialized; if one is
            there twice.
    """
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise OptionError(f"{owner}: params={shown(params)} must be a list of tensors.")
    found = list(params)
    if not found:
        raise OptionError(f"{owner}: params is empty. Pass the parameters, as list(model.parameters()).")
    for i, p in enumerate(found):
        if not isinstance(p, Tensor):
            raise OptionError(f"{owner}: params[{i}]={shown(p)} must be a tensor.")
        if is_lazy(p):
            raise OptionError(f"{owner}: params[{i}] is not initialized. Call the model once before.")
        if not p.is_floating_point():
            raise OptionError(f"{owner}: params[{i}] is of {p.dtype}; parameters must be real floating point numbers.")
    frozen = [i for i, p in enumerate(found) if not p.requires_grad]
    if len(frozen) == len(found):
        raise OptionError(f"{owner}: all {len(found)} parameters are frozen (requires_grad=False), so none can move.")
    if frozen:
        i = frozen[0]
        raise OptionError(
            f"{owner}: params[{i}] of shape {tuple(logical_shape(found[i]))} is frozen (requires_grad=False). Pass "
            "only [p for p in params if p.requires_grad]."
        )
    if any(not p.is_leaf for p in found):
        raise OptionError(f"{owner}: params must be leaves, not results of other tensors.")
    if len({id(p) for p in found}) < len(found):
        raise OptionError(f"{owner}: a parameter is in params twice. Pass a tied parameter once.")
    if not sum(logical_shape(p).numel() for p in found):
        raise OptionError(f"{owner}: params have no elements.")
    return found


def problem_of_outputs(found: Any, by_function: bool) -> str:
    """What is wrong with what a closure returned for the Gauss-Newton matrix; empty where nothing is.

    Args:
        found: What it returned.
        by_function: Whether the loss must be a function.
    """
    if not isinstance(found, tuple | list) or len(found) != 2 or not isinstance(found[0], Tensor):
        return (
            f"With operator='ggn' the closure must return a pair: the outputs, a tensor, and a function that computes "
            f"the scalar loss from them. It returned {shown(found)}."
        )
    if not found[0].is_floating_point():
        return (
            f"With operator='ggn' outputs must be real floating point numbers; the closure returned {found[0].dtype}."
        )
    if by_function and not callable(found[1]):
        return (
            "Under FSDP a closure for operator='ggn' must return a function that computes the loss from the outputs, "
            "and not its value."
        )
    return ""


def problem_of_loss(loss: Any, graph: bool = True) -> str:
    """What is wrong with what a closure returned as its loss; empty where nothing is.

    Args:
        loss: What it returned.
        graph: Whether it must have one.
    """
    if not isinstance(loss, Tensor):
        return f"The closure returned {shown(loss)}, which is no tensor. {ALLOWED}"
    if loss.numel() != 1:
        return f"The closure returned a loss of shape {tuple(loss.shape)}, which is no scalar. {ALLOWED}"
    if loss.is_complex() or (graph and not loss.requires_grad):
        why = "is complex" if loss.is_complex() else "has no graph: no gradient path leads to a parameter"
        return f"The loss that the closure returned {why}. {ALLOWED}"
    value = float(local(loss.detach()))
    return "" if np.isfinite(value) else f"The loss that the closure returned is {value}. {ALLOWED}"


def problem_of_repetition(first: float, second: float, dtype: torch.dtype) -> str:
    """What is wrong where a closure called twice returns two losses; empty where they agree up to rounding."""
    tolerance = min(64 * torch.finfo(dtype).eps, 0.01) * max(abs(first), abs(second))
    if abs(first - second) <= tolerance:
        return ""
    return (
        f"The closure is stochastic: called twice, it returned the losses {first:.9g} and {second:.9g}. Let it use the "
        "same batches each time, and switch dropout off (model.eval())."
    )


def check_finite(owner: str, value: float) -> None:
    """Refuse products that are NaN or infinite.

    Args:
        owner: The function that the user called, for the message.
        value: A number that depends on them, the same on every rank.

    Raises:
        OptionError: if it is NaN or infinite.
    """
    if not abs(value) < float("inf"):
        raise OptionError(
            f"{owner}: a product of the matrix of second derivatives with a vector is not finite. Is the loss "
            "differentiable twice at these parameters? The square root of 0 is not."
        )


@contextmanager
def generators_kept() -> Iterator[None]:
    """Afterwards the global generators of random numbers (Python, numpy, torch) are where they were."""
    own, arrays, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        random.setstate(own)
        np.random.set_state(arrays)
        torch.set_rng_state(cpu)
        if gpus:
            torch.cuda.set_rng_state_all(gpus)
