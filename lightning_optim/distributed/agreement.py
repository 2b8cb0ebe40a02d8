"""Whether all ranks that train the same parameters do so in the same way, asked once and without waiting.

Replicas whose optimizers differ drift apart without a word. Each rank leaves a record of its optimizer in the store of
the process group, under a name that all ranks find by themselves, and reads what the first of them has left. Nothing
waits for another rank, so that a job in which some ranks do something else goes on as without the question.
"""

from __future__ import annotations

import gc
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from lightning_optim.distributed.placement import is_dtensor, is_sharded, logical_shape, shard_of

_records = itertools.count()  # ranks that train together come to their optimizers in the same order


def shared_training(params: Sequence[Tensor]) -> tuple[list[int], list[Any]] | None:
    """The ranks that train some parameters together, and a name for each parameter that is the same on all of them.

    It is known of shards (FSDP1, FSDP2) and of the parameters of a living `DistributedDataParallel`. It is not known of
    other plain tensors: each rank may have its own, as in a pipeline or in a model that one rank alone evaluates. Where
    there are shards, only those count that lie on the ranks of the first one.

    Returns:
        The ranks and the names; None where it is not known, or where there is one rank.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1 or not params:
        return None
    first = next((p for p in params if is_sharded(p)), None)
    if first is None:
        return _replicas(params)
    ranks = _ranks_of_shards(first)
    together = [p for p in params if is_sharded(p) and _ranks_of_shards(p) == ranks]
    return (ranks, [tuple(logical_shape(p)) for p in together]) if len(ranks) > 1 else None


def _ranks_of_shards(p: Tensor) -> list[int]:
    if is_dtensor(p):
        return p.device_mesh.mesh.flatten().tolist()
    groups = shard_of(p).process_groups
    return dist.get_process_group_ranks(groups[0]) if groups else []


def _replicas(params: Sequence[Tensor]) -> tuple[list[int], list[Any]] | None:
    """As `shared_training`, for parameters that one DDP module averages. Nothing leads from a parameter to it."""
    module = data_parallel(params)
    if module is None:
        return None
    position = {id(p): (i, tuple(p.shape)) for i, p in enumerate(module._module_parameters)}
    ranks = dist.get_process_group_ranks(module.process_group)
    return (ranks, [position[id(p)] for p in params]) if len(ranks) > 1 else None


def data_parallel(params: Sequence[Tensor]) -> Any:
    """The `DistributedDataParallel` that averages the gradients of all these parameters, or None."""
    from torch.nn.parallel import DistributedDataParallel

    for module in (thing for thing in gc.get_objects() if issubclass(type(thing), DistributedDataParallel)):
        held = {id(p) for p in vars(module).get("_module_parameters", [])}
        if vars(module).get("process_group") is not None and all(id(p) in held for p in params):
            return module
    return None


def difference(record: Mapping[str, Any], ranks: Sequence[int], names: Sequence[Any]) -> str:
    """What differs between this rank and the first that came here, in words; empty where nothing is known to differ.

    Args:
        record: Short facts by name, which are the same on all ranks of a sound run.
        ranks: The ranks that train the same parameters.
        names: A name for each parameter, the same on all of them.
    """
    shapes = hashlib.sha256(repr(names).encode()).hexdigest()
    own = {"rank": dist.get_rank(), "facts": {**record, "number of parameters": len(names)}, "names": shapes}
    # Optimizers that hold other parts of a model (ZeroRedundancyOptimizer) have another first parameter.
    key = f"lightning_optim/{next(_records)}/{ranks}/{names[0]}"
    try:
        store = dist.distributed_c10d._get_default_store()
        other = json.loads(store.compare_set(key, "", json.dumps(own, default=repr)))
    except (RuntimeError, ValueError, TypeError, AttributeError):
        return ""  # a backend without a store, or a store that cannot do this
    facts: dict[str, tuple[Any, Any]] = {
        name: (other["facts"].get(name), value)
        for name, value in json.loads(json.dumps(own["facts"], default=repr)).items()
        if other["facts"].get(name) != value
    }
    between = [
        f"{name} is {theirs} on rank {other['rank']} and {ours} on rank {own['rank']}"
        for name, (theirs, ours) in facts.items()
    ]
    if not between and other["names"] != own["names"]:
        between = [
            f"the order or the shapes of parameters are others on rank {other['rank']} than on rank {own['rank']}"
        ]
    return "; ".join(between[:8])
