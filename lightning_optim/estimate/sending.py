"""Buffers for what ranks send each other. Apart from DDP's buckets these are estimates of what is held at once.

DDP keeps its gradients a second time, in buckets, unless they are views of these. A sharded training gathers the
parameters of a unit before it computes with them, and reduces whole gradients after it. Updates of whole matrices
bring these to their owners.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_optim.callbacks.communication import ADVICE, Communication
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.exchange import ROUND
from lightning_optim.distributed.placement import is_dtensor, local
from lightning_optim.errors import OptionError
from lightning_optim.estimate.spread import Spread
from lightning_optim.language.program import namespace
from lightning_optim.reports.memory import Entry

AT_ONCE = 2  # units whose parameters are gathered at a time: one in use, and the next one


def sent(module: nn.Module, spread: Spread, callbacks: Iterable[Any]) -> list[Entry]:
    """The buffers for gradients and parameters."""
    hooks = [callback for callback in callbacks if isinstance(callback, Communication)]
    if spread.kind == "ddp":
        return _ddp(module, spread, hooks)
    if hooks and spread.ranks > 1:
        raise OptionError(f"Communication {hooks[0].kind!r} is for DDP, and this is {spread.title}. {ADVICE}")
    if spread.kind in ("fsdp1", "fsdp2") and spread.ranks > 1:
        return _sharded(_units1(module) if spread.kind == "fsdp1" else _units2(module, spread.mesh[0]))
    return []


def exchanged(optimizers: Iterable[torch.optim.Optimizer], spread: Spread) -> list[Entry]:
    """What a step holds beside the state where the update needs whole matrices: their arguments, and messages."""
    arguments = here = 0
    for optimizer in (one for one in optimizers if isinstance(one, Optimizer) and one.has_matrices()):
        for i, p in optimizer.every_parameter():
            options = optimizer.options_of(optimizer.param_groups[i])
            scalars = {**optimizer.scalars(namespace(options), 1), **dict.fromkeys(optimizer.inputs, 0.0)}
            program = optimizer.program("update", {**options, **optimizer.traits_of(i, p), **scalars})
            size = local(p).numel() * max(4, p.element_size())
            arguments += len(program.buffers) * size
            here += size if program.buffers else 0
    found = [_entry("exchange", "arguments and results", arguments)] if arguments else []
    if here and spread.kind in ("fsdp1", "fsdp2") and spread.ranks > 1:
        found.append(_entry("exchange", "messages", 3 * min(ROUND, here)))  # sent, received, and put together
    return found


def _entry(kind: Any, slot: str, size: int) -> Entry:
    return Entry(-1, slot, "bytes", size, size, kind)


def _ddp(module: nn.Module, spread: Spread, hooks: Iterable[Communication]) -> list[Entry]:
    trained = [p for p in module.parameters() if p.requires_grad]
    size = sum(p.numel() * p.element_size() for p in trained)
    options = getattr(spread.strategy, "_ddp_kwargs", {})
    found = [] if options.get("gradient_as_bucket_view") else [_entry("communication", "DDP's buckets", size)]
    for hook in hooks if spread.ranks > 1 else ():
        found += _compressed(hook, trained, size)
    return found


def _compressed(callback: Communication, trained: Sequence[nn.Parameter], size: int) -> list[Entry]:
    """What a communication hook holds: a smaller copy of the buckets, or PowerSGD's errors and factors."""
    kind, options = callback.kind, callback.options
    if kind in ("bf16", "fp16"):
        return [_entry("communication", f"buckets in {kind}", sum(2 * p.numel() for p in trained))]
    if kind == "powersgd":
        sides = [(p.shape[0], p.numel() // max(1, p.shape[0])) for p in trained if p.dim() > 1]
        factors = sum((m + n) * min(m, n, options["rank"]) * 4 for m, n in sides)
        return [
            _entry("communication", "PowerSGD's errors", size),
            _entry("communication", "PowerSGD's factors", factors),
        ]
    return []


class _Unit:
    """What is gathered together.

    Attributes:
        gathered: Bytes of its whole parameters, in the dtype in which they are gathered.
        gradient: Bytes of its whole gradients.
        keeps: Whether it stays gathered from its forward pass to its backward pass.
    """

    def __init__(self, elements: int, trained: int, item: int, reduced: int, keeps: bool) -> None:
        self.gathered, self.keeps = elements * item, keeps
        self.gradient = trained * item + trained * reduced  # and a copy in which they are sent


def _sharded(units: Sequence[_Unit]) -> list[Entry]:
    """Units that stay gathered, the largest of the others, and the largest gradients."""
    if not units:
        return []
    kept = sum(unit.gathered for unit in units if unit.keeps)
    passing = sorted((unit.gathered for unit in units if not unit.keeps), reverse=True)
    found = [_entry("communication", "gathered parameters", kept + sum(passing[:AT_ONCE]))]
    return [*found, _entry("communication", "whole gradients", max(unit.gradient for unit in units))]


def _units1(module: nn.Module) -> list[_Unit]:
    from torch.distributed.fsdp import FullyShardedDataParallel

    roots = [vars(module)["_estimate_wrapper"]] if "_estimate_wrapper" in vars(module) else []
    found = []
    for wrapper in [*roots, *(child for child in module.modules() if isinstance(child, FullyShardedDataParallel))]:
        handle: Any = wrapper._handle
        if handle is None or not handle.uses_sharded_strategy:
            continue
        flat = handle.flat_param
        elements = sum(flat._numels)
        trained = elements if flat.requires_grad else 0
        item = torch.empty(0, dtype=handle._fwd_bwd_param_dtype or flat.dtype, device="meta").element_size()
        reduced = torch.empty(0, dtype=handle._reduce_dtype or flat.dtype, device="meta").element_size()
        keeps = wrapper in roots or not handle._sharding_strategy.name.startswith(("FULL", "HYBRID_SHARD"))
        found.append(_Unit(elements, trained, item, reduced, keeps))
    return found


def _units2(module: nn.Module, ranks: int) -> list[_Unit]:
    from torch.distributed.fsdp import FSDPModule

    found: list[_Unit] = []
    if ranks == 1:
        return found
    seen: set[int] = set()
    for child in reversed([child for child in module.modules() if isinstance(child, FSDPModule)]):  # inner ones first
        assert isinstance(child, nn.Module)
        own = [p for p in child.parameters() if id(p) not in seen and is_dtensor(p)]
        seen.update(map(id, own))
        if not own:
            continue
        group: Any = getattr(child._get_fsdp_state(), "_fsdp_param_group", None)
        policy = getattr(group, "mp_policy", None)
        item = (getattr(policy, "param_dtype", None) or own[0].dtype).itemsize
        reduced = (getattr(policy, "reduce_dtype", None) or own[0].dtype).itemsize
        elements = sum(p.numel() for p in own)
        trained = sum(p.numel() for p in own if p.requires_grad)
        keeps = child is module or getattr(group, "post_forward_mesh_info", True) is None
        found.append(_Unit(elements, trained, item, reduced, keeps))
    return found
