"""Counts the memory that a save takes in addition to the state, under every strategy: `python -m
benchmarks.save_memory`.

Bytes are counted, not sampled: every storage that an operation of torch creates while the optimizer's state is
collected, and when it is freed. On a machine without a GPU, moves between device and host are simulated. `.cpu()` and
`.to(...)` make a copy, and what is computed from a copy "on the host" counts as host memory. For each strategy the
target of every `.to` is known. Allocations below torch's operators (buffers of gloo or NCCL) are not counted.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullOptimStateDictConfig,
    FullStateDictConfig,
    FullyShardedDataParallel,
    ShardedOptimStateDictConfig,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.ranks import on_ranks
from lightning_optim import create_optimizer
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.placement import local

LAYERS, WIDTH, RANKS = 16, 256, 2
KINDS = ("single", "ddp", "fsdp1 full", "fsdp1 sharded", "fsdp1 fused", "fsdp2 full", "fsdp2 sharded")
RESULT = Path(__file__).parent / "results" / "save_memory.json"


class Watch(TorchDispatchMode):
    """Counts the bytes of storages that are made meanwhile, by place, and keeps the most that there were at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int, str]] = {}
        self.most = {"device": 0, "host": 0}

    def place(self, tensor: Tensor) -> str:
        known = self.alive.get(local(tensor).untyped_storage()._cdata)
        return known[2] if known else "device"

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        place = "host" if any(self.place(x) == "host" for x in given) else "device"
        self.note(found, given, place)
        return found

    def note(self, found: Any, given: list[Tensor], place: str) -> None:
        self.alive = {key: one for key, one in self.alive.items() if not one[0].expired()}
        old = {local(x).untyped_storage()._cdata for x in given}
        for made in (x for x in tree_leaves(found) if isinstance(x, Tensor)):
            storage = local(made).untyped_storage()
            if storage._cdata not in old and storage._cdata not in self.alive:
                self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes(), place
        for where in self.most:
            now = sum(size for _, size, there in self.alive.values() if there == where)
            self.most[where] = max(self.most[where], now)

    def moved(self, tensor: Tensor, place: str) -> Tensor:
        """The tensor itself where it is there already, and else a copy there."""
        if self.place(tensor) == place:
            return tensor
        copy = tensor.clone()
        key = local(copy).untyped_storage()._cdata
        reference, size, _ = self.alive.pop(key)  # it was counted at its source, and never was there
        self.alive[key] = reference, size, place
        self.note(copy, [], place)
        return copy


@contextmanager
def watched(kind: str) -> Iterator[Watch]:
    watch, to = Watch(), Tensor.to

    def moving(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not (len(args) == 1 and isinstance(args[0], str | torch.device)) or kwargs:
            return to(self, *args, **kwargs)
        # FSDP2 names the type of its mesh to go there, and a torch.device to come back; FSDP1 comes back by .cpu().
        return watch.moved(self, "host" if kind.startswith("fsdp2") and isinstance(args[0], torch.device) else "device")

    def offloaded(self: ShardedTensor) -> ShardedTensor:
        for shard in self.local_shards():
            shard.tensor = watch.moved(shard.tensor, "host")
        return self

    with (
        mock.patch.object(Tensor, "cpu", lambda self: watch.moved(self, "host")),
        mock.patch.object(ShardedTensor, "cpu", offloaded),
        mock.patch.object(Tensor, "to", moving),
        watch,
    ):
        yield watch


def collect(kind: str, model: nn.Module, optimizer: Optimizer) -> Any:
    """The state as Lightning's strategies ask for it in a save."""
    if kind.startswith("fsdp1"):
        form, weights, state = (
            StateDictType.SHARDED_STATE_DICT,
            ShardedStateDictConfig(),
            ShardedOptimStateDictConfig(True),
        )
        if kind == "fsdp1 full":
            form, weights, state = (
                StateDictType.FULL_STATE_DICT,
                FullStateDictConfig(),
                FullOptimStateDictConfig(True, True),
            )
        with FullyShardedDataParallel.state_dict_type(model, form, weights, state):
            return FullyShardedDataParallel.optim_state_dict(model, optimizer)
    if kind.startswith("fsdp2"):
        options = StateDictOptions(full_state_dict=kind == "fsdp2 full", cpu_offload=True)
        return get_optimizer_state_dict(model, optimizer, options=options)
    optimizer.consolidate_state_dict()
    return optimizer.state_dict()


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind.startswith("fsdp1"):
        policy, original = ModuleWrapPolicy({nn.Linear}), kind != "fsdp1 fused"
        device = torch.device("cpu")
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=original, device_id=device)
    if kind.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


def measure(kind: str, bits: int) -> dict[str, Any]:
    """Peaks of a save and of a step on this rank, in bytes, beside what the state would take in float32 here."""
    if kind != "single" and not dist.is_initialized():
        dist.init_process_group("gloo")
    model = build(kind)
    optimizer = create_optimizer({"name": "adamw", "state_bits": bits, "no_decay": [], "full_precision": []}, model)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.randn(4, WIDTH)).square().mean().backward()
        with Watch() as watch:
            optimizer.step()
        steps.append(watch.most["device"])

    steps: list[int] = []
    for _ in range(3):
        step()
    with watched(kind) as watch:
        found = collect(kind, model, optimizer)
    assert found or int(os.environ.get("RANK", 0))
    own = sum(local(p).numel() for p in model.parameters())
    return {
        "full precision": 8 * own,
        "save, device": watch.most["device"],
        "save, host": watch.most["host"],
        "step": steps[-1],
    }


def measure_all(kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    return [{"kind": kind, "bits": bits, **measure(kind, bits)} for kind in kinds for bits in (8, 32)]


def main() -> None:
    rows = measure_all(KINDS[:1]) + on_ranks(RANKS, measure_all, KINDS[1:])
    print("| strategy | bits | float32 state on this rank | save, device | save, host | step, device |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        numbers = [f"{row[key] / 2**20:.2f}" for key in ("full precision", "save, device", "save, host", "step")]
        print(f"| {row['kind']} | {row['bits']} | " + " | ".join(numbers) + " |")
    about = {"torch": torch.__version__, "layers": LAYERS, "width": WIDTH, "ranks": RANKS, "optimizer": "adamw"}
    RESULT.write_text(json.dumps({"about": about, "rank 0": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
