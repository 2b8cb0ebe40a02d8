"""Which rule each parameter follows, in an optimizer that has one for matrices and one for everything else, and why."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.parameter import is_lazy

from lightning_optim.core.checkpoint_source import subclasses
from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.placement import logical_shape
from lightning_optim.errors import OptionError
from lightning_optim.language.program import namespace

_by_role: ContextVar[bool] = ContextVar("by_role", default=False)


@dataclass(frozen=True)
class Route:
    """The rule that one parameter follows.

    Attributes:
        name: The name of the parameter; without a module its index, or the name that the user has given.
        shape: Its logical shape.
        rule: The rule: "muon" or "adamw".
        reason: Why it follows this rule.
    """

    name: str
    shape: tuple[int, ...]
    rule: str
    reason: str

    @property
    def is_special(self) -> bool:
        """Whether a report names it: a tensor of two axes or more that is no matrix, or is one by a rule of its own."""
        return len(self.shape) > 1 and self.reason not in ("weight", "by its shape")

    @property
    def elements(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()


@contextlib.contextmanager
def by_role() -> Iterator[None]:
    """Make optimizers whose parameters are sorted by their role in a module, not by shape."""
    token = _by_role.set(True)
    try:
        yield
    finally:
        _by_role.reset(token)


def routes(optimizer: StateLayout) -> list[Route]:
    """The rule of each parameter, in the order of the parameter groups; empty for an optimizer with one rule."""
    if not optimizer.matrix_options:
        return []
    names = {
        p: name for group in optimizer.param_groups for name, p in zip(_names(group), group["params"], strict=True)
    }
    found = []
    for i, p in optimizer.initialized():
        group, shape = optimizer.param_groups[i], logical_shape(p)
        rule, view = optimizer.traits_of(i, p)["rule"], optimizer.view_of(i, p)
        default = f"{i}.{next(k for k, q in enumerate(group['params']) if q is p)}"
        name, reason = optimizer.reasons.get(p, (names[p] or default, ""))
        if view is None:
            told = reason or ("matrix=False" if group["matrix"] is False else "")
            reason = told or (f"{len(shape)} axes" if len(shape) != 1 else "1 axis")
            reason = reason if told or len(shape) < 2 else _too_small(shape, group)
        else:
            told = "matrix=True" if group["matrix"] else "weight" if p in optimizer.reasons else "by its shape"
            sizes = dict.fromkeys(f"{rows} x {view.columns}" for rows in view.rows)
            reason = told + (f", {len(view.rows)} matrices of {' and '.join(sizes)}" if len(view.rows) > 1 else "")
        found.append(Route(name, tuple(shape), rule, reason))
    return found


def _names(group: dict[str, object]) -> Iterable[str]:
    names, params = group.get("param_names"), group["params"]
    assert isinstance(params, list)
    return names if isinstance(names, list) else [""] * len(params)


def _too_small(shape: torch.Size, group: dict[str, Any]) -> str:
    """Why a tensor of two axes or more is no matrix: a side of one element, or none."""
    rows, columns = shape[0], shape[1:].numel()
    blocks = group["heads"] or group["blocks"]
    if group["experts"]:
        rows, columns = shape[1], shape[2:].numel()
    if blocks and rows and columns > 1:
        return f"{'heads' if group['heads'] else 'blocks'} of 1 row"
    side, size = ("row", rows) if rows <= columns else ("column", columns)
    return f"{size} {side}{'' if size == 1 else 's'}"


def report(optimizer: StateLayout) -> list[str]:
    """The routing report in lines: each rule with its share, and every tensor of two axes or more that is no matrix."""
    every = routes(optimizer)
    total = sum(route.elements for route in every)
    lines = []
    for rule, mine in by_rule(every).items():
        elements = sum(route.elements for route in mine)
        share = f"{100 * elements / total:.1f} %" if total else "none"
        tensors = f"{len(mine)} tensor{'' if len(mine) == 1 else 's'}"
        lines.append(f"{rule}: {tensors}, {elements:,} elements ({share})")
        lines += [f"    {route.name} {[*route.shape]}: {route.reason}" for route in mine if route.is_special]
    return lines


def by_rule(every: Sequence[Route]) -> dict[str, list[Route]]:
    """The routes by rule, that of matrices first, also where it has none."""
    rules = dict.fromkeys(("muon", *(route.rule for route in every))) if every else {}
    return {rule: [route for route in every if route.rule == rule] for rule in rules}


def check_shapes(optimizer: StateLayout) -> None:
    """Say once that shapes decide where roles are unknown, and where no matrix is."""
    if not optimizer.matrix_options or _by_role.get():
        return
    unknown = [(i, p) for i, p in optimizer.initialized() if optimizer.param_groups[i]["matrix"] is None]
    rules = {optimizer.traits_of(i, p)["rule"] for i, p in unknown}
    owner = type(optimizer).__name__
    if "muon" in rules:
        warnings.warn(
            f"{owner} got parameters without their module, so shapes decide: embeddings and heads are taken for "
            f"matrices. Use create_optimizer({optimizer.name!r}, module), or say matrix=True or False in each group.",
            stacklevel=5,
        )
    elif rules and not any(route.rule == "muon" for route in routes(optimizer)):
        warnings.warn(
            f"{owner} got parameters without their module, and no matrix among them: all of them follow AdamW. Use "
            f"create_optimizer({optimizer.name!r}, module), or AdamW.",
            stacklevel=5,
        )


def check_group(optimizer: StateLayout, group: dict[str, Any]) -> None:
    """Refuse a new parameter group that does not go with the others, or whose tensors cannot be taken as matrices.

    Args:
        optimizer: The optimizer.
        group: The group, with all options.

    Raises:
        OptionError: with the name of the parameter, or its index.
    """
    optimizer.check_groups([optimizer.options_of(each) for each in (*optimizer.param_groups, group)])
    if not optimizer.has_matrices():
        return
    owner, h = type(optimizer).__name__, namespace(optimizer.options_of(group))
    for other in (cls for cls in subclasses(StateLayout) if cls.has_matrices() and "options" in vars(cls)):
        if strange := [key for key in group if key in other.options and key not in optimizer.options]:
            raise OptionError(
                f"{owner} has no option {strange[0]!r}, which is one of {other.__name__}. Its options are "
                f"{', '.join(optimizer.options)}."
            )
    for k, p in enumerate(group["params"]):
        if is_lazy(p):
            continue
        try:
            optimizer.matrices(h, logical_shape(p))
        except OptionError as error:
            name = f"parameter {k} of group {len(optimizer.param_groups)}"
            name = group["param_names"][k] if "param_names" in group else name
            raise OptionError(f"{owner}: {name}: {error}") from None
