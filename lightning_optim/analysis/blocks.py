"""The blocks of a network: modules of one kind that follow each other, found by themselves or by name."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.names import WRAPPERS, WRAPPING_CLASSES, plain_name
from lightning_optim.distributed.placement import logical_shape
from lightning_optim.errors import OptionError, nearest

# Blocks of transformers by the name of their class, whichever module holds them.
KNOWN = ("TransformerBlock", "TransformerEncoderLayer", "TransformerDecoderLayer")
# The last layers of a branch, as transformers in wide use name them.
OUTPUTS = frozenset([
    *("output", "out_proj", "o_proj", "c_proj", "proj", "wo", "o", "dense", "to_out", "linear2", "down_proj", "fc2"),
    *("w2", "lin2", "dense_4h_to_h", "fc_out", "out_lin"),
])  # fmt: skip
ATTENTION = ("attention", "attn")
PARTS = ("block", "attention_output", "feed_forward_output")


@dataclass(frozen=True)
class Stack:
    """Blocks in the order of depth.

    Attributes:
        name: What they have in common: the name of the module that holds them, or the pattern that found them.
        names: The plain name of each block.
        blocks: The modules, without what wraps them.
    """

    name: str
    names: tuple[str, ...]
    blocks: tuple[nn.Module, ...]

    def parameters(self, part: str) -> list[list[nn.Parameter]]:
        """The trainable parameters of a part of each block; an empty list where a block has none.

        Args:
            part: "block" for all of them, or the matrix with which a branch ends: "attention_output" or
                "feed_forward_output".
        """
        return [_part(block, part) for block in self.blocks]


def find_stacks(root: nn.Module) -> list[Stack]:
    """The stacks of a module, from the outside to the inside.

    These are the transformer blocks of this package and of torch. Where there are none, they are modules of one class
    that follow each other in a `ModuleList` or `Sequential`, two at least; of layers without submodules, those of
    equal shapes.

    Example:
        >>> [stack] = find_stacks(nn.Sequential(nn.Linear(3, 4), *(nn.Sequential(nn.Linear(4, 4)) for _ in range(3))))
        >>> stack.name, stack.names
        ('', ('1', '2', '3'))
    """
    return list(_search(root, "", _known)) or list(_search(root, "", _alike))


def named_stacks(root: nn.Module, patterns: Sequence[str], owner: str) -> list[Stack]:
    """The stack that each pattern finds.

    Args:
        root: The module.
        patterns: Names of modules, in which `*` stands for anything between two dots (`blocks.*`), or the name of a
            class. A list of modules (`blocks`) stands for the modules in it.
        owner: Who asks, for messages.

    Raises:
        OptionError: where a pattern finds nothing.
    """
    modules = [(name, module) for name, module in _walk(root, "") if name]
    stacks = []
    for pattern in patterns:
        found = [(n, m) for n, m in modules if _matches(n, plain_name(pattern))]
        found = found or [(n, m) for n, m in modules if type(m).__name__ == pattern]
        if len(found) == 1:
            inside = _children(found[0][1])
            if isinstance(found[0][1], nn.ModuleList | nn.Sequential | nn.ModuleDict):
                found = [(f"{found[0][0]}.{name}", child) for name, child in inside]
        found = [(name, module) for name, module in found if next(module.parameters(), None) is not None]
        if not found:
            known = dict.fromkeys([name for name, _ in modules] + [type(module).__name__ for _, module in modules])
            raise OptionError(
                f"{owner}: blocks={pattern!r} matches no module with parameters.{nearest(pattern, known)} Give the "
                "name of a list of blocks, a pattern of names such as 'blocks.*', or the name of a class."
            )
        stacks.append(Stack(pattern, tuple(name for name, _ in found), tuple(module for _, module in found)))
    return stacks


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of FSDP1, DDP, torch.compile and activation checkpointing."""
    inner: Any = next((module._modules[name] for name in WRAPPERS if name in module._modules), None)
    if inner is None and isinstance(module, WRAPPING_CLASSES):
        inner = module.module
    return module if inner is None else unwrapped(inner)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, unwrapped(child)) for name, child in module.named_children()]


def _walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    yield path, unwrapped(module)
    for name, child in _children(unwrapped(module)):
        yield from _walk(child, f"{path}.{name}" if path else name)


def _matches(name: str, pattern: str) -> bool:
    parts, words = name.split("."), pattern.split(".")
    return len(parts) == len(words) and all(map(fnmatch.fnmatchcase, parts, words))


Runs = Callable[[nn.Module], list[list[tuple[str, nn.Module]]]]


def _search(module: nn.Module, path: str, runs: Runs) -> Iterator[Stack]:
    module = unwrapped(module)
    found = runs(module)
    prefix = f"{path}." if path else ""
    for run in found:
        yield Stack(path, tuple(prefix + name for name, _ in run), tuple(child for _, child in run))
    taken = {child for run in found for _, child in run}
    for name, child in _children(module):
        if child not in taken:
            yield from _search(child, prefix + name, runs)


def _known(module: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The transformer blocks among the children of a module, by class."""
    runs: dict[type, list[tuple[str, nn.Module]]] = {}
    for name, child in _children(module):
        if any(base.__name__ in KNOWN for base in type(child).__mro__):
            runs.setdefault(type(child), []).append((name, child))
    return [run for run in runs.values() if len(run) > 1]


def _alike(module: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """The children of a list that follow each other and are alike."""
    if not isinstance(module, nn.ModuleList | nn.Sequential):
        return []
    runs: list[list[tuple[str, nn.Module]]] = []
    last: object = None
    for name, child in _children(module):
        kind = _kind(child)
        if kind is None or kind != last:
            runs.append([])
        runs[-1].append((name, child))
        last = kind
    return [run for run in runs if len(run) > 1]


def _kind(module: nn.Module) -> object:
    """What modules have in common that count as blocks of one stack; None for a module without parameters."""
    shapes = [None if is_lazy(p) else logical_shape(p) for p in module.parameters()]
    if not shapes:
        return None
    return type(module) if _children(module) else (type(module), tuple(shapes))


def _part(block: nn.Module, part: str) -> list[nn.Parameter]:
    named = [(plain_name(name, block), p) for name, p in block.named_parameters() if not is_lazy(p)]
    if part == "block":
        return [p for _, p in named if p.requires_grad]
    matrices = [(name.split(".")[:-1], p) for name, p in named if name.endswith("weight") and len(logical_shape(p)) > 1]
    attention = [(path, p) for path, p in matrices if _attends(path) and path[-1].lower() in OUTPUTS]
    if part == "attention_output":
        found = [p for _, p in attention[:1]]
    else:
        rest = [(path, p) for path, p in matrices if not _attends(path)]
        ends = [p for path, p in rest if path and path[-1].lower() in OUTPUTS]
        found = ends[-1:] or ([p for _, p in rest[-1:]] if attention else [])
    return [p for p in found if p.requires_grad]


def _attends(path: Sequence[str]) -> bool:
    return any(word in name.lower() for name in path for word in ATTENTION)
