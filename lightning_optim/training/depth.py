"""The layers of a network by depth, for learning rates that fall towards its input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from lightning_optim.analysis.blocks import Stack, find_stacks, named_stacks
from lightning_optim.distributed.names import owned_parameters, plain_name

JOINS = 99999.0  # the last number of a layer that belongs to the one before it, as timm writes that


class Layer(NamedTuple):
    """Where a parameter lies.

    Attributes:
        number: Its layer, from 0 at the input.
        from_top: Number of layers between it and the head; 0 for the head.
    """

    number: int
    from_top: int


def layers(module: nn.Module, roles: Mapping[str, str], blocks: Sequence[str] = ()) -> dict[str, Layer]:
    """The layer of each parameter.

    A module with `group_matcher` (timm) says so itself. Else layer 0 is what comes before the first block, each block
    is a layer, norms behind the last block belong to it, and what follows is the top. Where there are no blocks, each
    module with parameters is a layer, with the norm that follows it. Embeddings are in layer 0.

    Args:
        module: The model.
        roles: The role of each parameter by its name; that of the head is "head".
        blocks: Names, patterns of names or classes of blocks, from the input on. Default: found by themselves.

    Raises:
        OptionError: where such a pattern finds nothing.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 4), *(nn.Sequential(nn.Linear(4, 4)) for _ in range(2)), nn.Linear(4, 1))
        >>> found = layers(net, {"0.weight": "weight", "1.0.weight": "weight", "3.weight": "head"})
        >>> found["0.weight"], found["1.0.weight"], found["3.weight"]
        (Layer(number=0, from_top=3), Layer(number=1, from_top=2), Layer(number=3, from_top=0))
    """
    names = [name for name, *_ in owned_parameters(module) if name in roles]
    said = [] if blocks else [_said(module, prefix, matcher, names) for prefix, matcher in _matchers(module)]
    if said:
        found = {name: layer for numbers in said for name, layer in _from_top(numbers).items()}
        top = max(layer.number for layer in found.values())
        return {**dict.fromkeys(names, Layer(top, 0)), **found}
    stacks = named_stacks(module, blocks, "layer_decay") if blocks else find_stacks(module)
    of_block = {name: i for i, name in enumerate(name for stack in stacks for name in _finest(stack))}
    return _from_top(_by_blocks(names, roles, of_block) if of_block else _by_modules(names, roles))


def _finest(stack: Stack) -> Iterator[str]:
    """The names of the blocks of a stack, or of those inside where they are stages."""
    for name, block in zip(stack.names, stack.blocks, strict=True):
        inside = find_stacks(block) if isinstance(block, nn.Sequential | nn.ModuleList) else []
        if inside and all(next(part.children(), None) is not None for other in inside for part in other.blocks):
            yield from (f"{name}.{part}" for other in inside for part in _finest(other))
        else:
            yield name


def _from_top(numbers: Mapping[str, int]) -> dict[str, Layer]:
    top = max(numbers.values(), default=0)
    return {name: Layer(number, top - number) for name, number in numbers.items()}


def _by_blocks(names: Sequence[str], roles: Mapping[str, str], of_block: Mapping[str, int]) -> dict[str, int]:
    head = {name.rpartition(".")[0] for name in names if roles[name] == "head"}
    found, last, count = dict[str, int](), 0, len(of_block)
    for name in names:
        parts = name.split(".")
        block = next((of_block[path] for i in range(len(parts)) if (path := ".".join(parts[:i])) in of_block), None)
        if block is not None:
            found[name] = last = block + 1
        elif roles[name] == "embedding":
            found[name] = 0
        elif name.rpartition(".")[0] in head or (last == count and roles[name] != "norm"):
            found[name] = count + 1
        else:
            found[name] = last
    return found


def _by_modules(names: Sequence[str], roles: Mapping[str, str]) -> dict[str, int]:
    found, owners = dict[str, int](), dict[str, int]()
    last = -1
    for name in names:
        owner = name.rpartition(".")[0]
        if owner not in owners:
            last = max(last + (roles[name] != "norm"), 0)
            owners[owner] = last
        found[name] = 0 if roles[name] == "embedding" else owners[owner]
    return found


def _matchers(module: nn.Module) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The outermost modules that say which layers they have, with the plain names of these modules."""
    outer: list[str] = []
    for name, child in module.named_modules():
        prefix, matcher = plain_name(name, module) if name else "", getattr(child, "group_matcher", None)
        inside = any(not other or prefix == other or prefix.startswith(f"{other}.") for other in outer)
        if callable(matcher) and not inside:
            outer.append(prefix)
            yield prefix, matcher


def _said(module: nn.Module, prefix: str, matcher: Callable[..., Any], names: Sequence[str]) -> dict[str, int]:
    """The layers that a module of timm says its parameters have."""
    start, rules = f"{prefix}." if prefix else "", matcher(coarse=False)
    ordinals = {name: _ordinal(rules, name.removeprefix(start)) for name in names if name.startswith(start)}
    numbers, last = dict[tuple[float, ...], int](), -1
    for ordinal in sorted(set(ordinals.values())):
        last += last < 0 or ordinal[-1] != JOINS
        numbers[ordinal] = last
    return {name: numbers[ordinal] for name, ordinal in ordinals.items()}


def _ordinal(rules: Any, name: str) -> tuple[float, ...]:
    """Numbers that sort layers by depth: those of the first rule that matches a name, else the largest."""
    if callable(rules):
        found = rules(name)
        return tuple(map(float, found if isinstance(found, Iterable) else (found,)))
    for position, rule in enumerate(rules.values()):
        for expression, suffix in rule if isinstance(rule, list | tuple) else [(rule, None)]:
            if expression is not None and (match := re.match(expression, name)):
                inside = (part for part in match.groups() if part is not None)
                return tuple(map(float, (position, *inside, *(suffix or ()))))
    return (math.inf,)
