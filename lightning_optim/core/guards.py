"""Checks that raise an error where a step would give a wrong result without one."""

from __future__ import annotations

import gc
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim import storage
from lightning_optim.core.state_layout import WHOLE, StateLayout
from lightning_optim.distributed.agreement import difference, shared_training
from lightning_optim.distributed.fsdp1 import is_flat_parameter, is_flattened
from lightning_optim.distributed.placement import has_gradient, is_sharded, local, shard_of
from lightning_optim.distributed.ranks import is_alone
from lightning_optim.errors import OptionError
from lightning_optim.language.program import Program, namespace
from lightning_optim.language.slot import Slot


def refuse_nothing_to_quantize(owner: str, options: Mapping[str, Any], slots: Mapping[str, Slot]) -> None:
    """Refuse `state_bits=8` for an optimizer without a slot that can be quantized.

    Raises:
        OptionError: where no slot can be quantized.
    """
    if options["state_bits"] == 8 and not any(storage.can_be_quantized(slot) for slot in slots.values()):
        raise OptionError(
            f"{owner}: state_bits=8 has nothing to keep in 8 bits: its state is one number per tensor or less, or must "
            "stay exact. Leave it at 32."
        )


def refuse_parameters(owner: str, params: Iterable[Tensor]) -> None:
    """Refuse parameters that cannot be written as they are. Lazy ones are served once they are initialized.

    Raises:
        OptionError: for a sparse parameter, an inference tensor, a lazy conjugate and zeros without memory.
    """
    for p in (p for p in params if not is_lazy(p)):
        why = ""
        if p.layout != torch.strided:
            why = f"its layout is {str(p.layout).removeprefix('torch.')}. Give it as a dense tensor"
        elif p.is_inference():
            why = "it was made in inference mode, where nothing trains. Make the model outside of it, or clone it"
        elif p.is_conj():
            why = "it is a lazy conjugate. Make the parameter of x.resolve_conj()"
        elif p._is_zerotensor():
            why = "it is a tensor of zeros without memory. Make the parameter of x.clone()"
        if why:
            raise OptionError(f"{owner} cannot write a parameter of shape {tuple(p.shape)}: {why}.")


def refuse_uncapturable(layout: StateLayout) -> None:
    """Refuse `capturable=True` where a step needs the host.

    Raises:
        OptionError: for functions of whole matrices, and for stages, which count on the host.
    """
    owner = type(layout).__name__
    if layout.has_matrices():
        raise OptionError(
            f"{owner}: capturable=True cannot be served, for it computes functions of whole matrices, which the host "
            "takes together in new memory in each step. Leave it out."
        )
    if layout.stages:
        raise OptionError(
            f"{owner}: capturable=True and {layout.stages[0]!r} do not go together: what a callback adds to a step is "
            "counted on the host, which a graph leaves out. Leave out one of the two."
        )


def refuse_several_devices(owner: str, params: Iterable[Tensor]) -> None:
    """Refuse `capturable=True` for parameters on several devices, one of which a graph captures.

    Raises:
        OptionError: for such parameters.
    """
    devices = sorted({str(local(p).device) for p in params})
    if len(devices) > 1:
        raise OptionError(
            f"{owner}: capturable=True serves one device, and the parameters are on {' and '.join(devices)}. Make one "
            "optimizer for each, or leave it out."
        )


def refuse_unknown_length(layout: StateLayout) -> None:
    """Refuse a step whose schedule runs over a training of unknown length.

    Raises:
        OptionError: for an option that is "total" where the number of steps is not known.
    """
    for name in layout.lengths:
        if math.isinf(layout.total_steps) and any(group[name] == "total" for group in layout.param_groups):
            raise OptionError(
                f"{type(layout).__name__}: {name}='total' is the number of steps of the whole run, which is not known "
                "here. Give a number of steps; or configure it by ConfiguredOptimizer in a Trainer with max_epochs or "
                "max_steps."
            )


def refuse_stale_parameters(owner: str, params: Sequence[Tensor]) -> None:
    """Refuse to train nothing: FSDP2 replaces the parameters of a model, but not those in an existing optimizer.

    Args:
        owner: The optimizer, for the message.
        params: Its parameters, none of which has or ever had a gradient.

    Raises:
        RuntimeError: where this process has a model that FSDP2 sharded, and none of the parameters belongs to one.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not hasattr(module, "FSDPModule") or any(is_sharded(p) for p in params):
        return
    if any(issubclass(type(thing), module.FSDPModule) for thing in gc.get_objects()):
        raise RuntimeError(
            f"{owner} would train nothing: none of its {len(params)} parameters has a gradient, and FSDP2 has put "
            "sharded parameters into the model since it was built. Build it after fully_shard: in "
            "configure_optimizers, from self.parameters()."
        )


def refuse_disagreement(layout: StateLayout, engine: str) -> None:
    """Refuse to train what other ranks train in another way. Asked in the first step of an optimizer, once.

    Args:
        layout: The optimizer.
        engine: The engine that runs its steps on this rank.

    Raises:
        RuntimeError: where another rank trains the same parameters with another class, engine or options.
    """
    if is_alone():
        return
    layout.compared = True
    every = [p for _, p in layout.every_parameter()]
    training = shared_training(every)
    if training is None:
        return
    moving = shared_training([p for p in every if has_gradient(p)]) if layout.has_matrices() else None
    facts: dict[str, Any] = {
        "the class": type(layout).__name__,
        "the engine": engine,
        **({"owners": layout.defaults.get("owners")} if "owners" in layout.options else {}),
        **{f"the version of {name}": version(name) for name in ("torch", "lightning-optim")},
        "the number of groups": len(layout.param_groups),
        **({"the number of parameters with gradients": len(moving[1])} if moving and moving[0] == training[0] else {}),
    }
    for i, group in enumerate(layout.param_groups):
        of_group = f" of group {i}" if len(layout.param_groups) > 1 else ""
        options = {**group, **layout.options_of(group)}  # a tensor would name the device, which is another on each rank
        facts.update({f"{name}{of_group}": options[name] for name in layout.options if name not in WHOLE})
    facts["what callbacks add"] = layout.stages
    found = difference(facts, *training)
    if found:
        raise RuntimeError(
            f"the ranks of this run do not train alike, and would drift apart: in {type(layout).__name__}, {found}. "
            "Give all of them the same; engine='blocked' runs also where there is no compiler."
        )


def version(name: str) -> str:
    """The version of a package; empty where it is on the path and not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def refuse_matrices(layout: StateLayout, program: Program, params: Sequence[Tensor]) -> None:
    """Refuse functions of whole matrices where these are not known.

    Raises:
        OptionError: for a complex parameter.
        RuntimeError: for flat parameters, in whose place the update would see vectors, and for a tensor that is split
            along two dimensions of a device mesh.
    """
    owner = type(layout).__name__
    if layout.has_matrices() and any(map(is_flat_parameter, params)):
        raise _no_tensors(owner, "whole matrix")
    if not program.matrices:
        return
    for p in params:
        if p.is_complex():
            raise OptionError(
                f"{owner} cannot serve a complex parameter of shape {tuple(p.shape)}: its functions of whole matrices "
                "are those of real ones. Train it by another optimizer."
            )
        shard = shard_of(p)
        if program.of_matrices and is_flattened(p):
            raise RuntimeError(
                f"{owner} keeps matrices of other shapes than the parameter's, which the checkpoints of FSDP1 cannot "
                "hold. Use ModelParallelStrategy (FSDP2) or DDP."
            )
        if shard.strided or len(shard.splits) > 1:
            raise RuntimeError(
                f"{owner} needs whole matrices, and a parameter of shape {tuple(p.shape)} is split along two "
                "dimensions of a device mesh (tensor parallel and FSDP2). Use one of the two, or another optimizer."
            )


def _no_tensors(owner: str, needs: str) -> RuntimeError:
    return RuntimeError(
        f"{owner} needs a {needs}, and FSDP1 with use_orig_params=False shows flat parameters, in which tensors are "
        "not known. Set FSDPStrategy(use_orig_params=True), or use ModelParallelStrategy (FSDP2)."
    )


def refuse_flat(layout: StateLayout, group: int | None, params: Iterable[Tensor]) -> None:
    """Refuse flat parameters of FSDP1 for an update that treats tensors by their number of axes: all would be vectors.

    Raises:
        RuntimeError: for such a parameter.
    """
    flat = next((p for p in params if is_flattened(p) and shard_of(p).is_flat_parameter), None)
    if flat is None or group is None:
        return
    h, length, most = namespace(layout.options_of(layout.param_groups[group])), flat.numel(), layout.most_dims()
    vector, matrix = (layout.traits(h, torch.Size(shape), flat.dtype, most) for shape in ((length,), (length, 1)))
    if vector != matrix:
        raise _no_tensors(type(layout).__name__, "tensor's number of axes")


def refuse_unsummable(owner: str, program: Program, params: Iterable[Tensor]) -> None:
    """Refuse reductions over tensors or their axes where FSDP1 has flattened them.

    Raises:
        RuntimeError: for sums over each tensor of a flat parameter, and for means along an axis of a flattened shard.
    """
    of_tensors = any(symbol.args[1] == "tensor" for symbol in program.reductions)
    if not (program.statistics or of_tensors):
        return
    for shard in (shard_of(p) for p in params if is_flattened(p)):
        if shard.is_flat_parameter:
            raise _no_tensors(owner, " and a ".join(program.needs))
        if shard.without_axes and program.statistics:
            raise RuntimeError(
                f"{owner} needs row and column means, and FSDP1 splits tensors without regard to rows, nor can its "
                "checkpoints hold row and column statistics. Use ModelParallelStrategy (FSDP2) or DDP; for adafactor, "
                "factored=False does without."
            )
