"""Trains on two ranks and compares with one process: `python -m benchmarks.two_ranks [cpu|cuda]`.

Both ranks may share one GPU: they talk over gloo, since NCCL refuses two ranks on one device. Each case trains a small
network under DDP or FSDP2 for 8 steps, by when RAdam has changed its form, with half of every batch on each rank. The
process that it is compared with sees whole batches.

A case that fails, or hangs, costs only itself: it has a process group of its own with a short time limit, and a rank
begins the next case when the other one has ended this one too.
"""

from __future__ import annotations

import argparse
import datetime
import faulthandler
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.ranks import on_ranks
from lightning_optim import create_optimizer

STEPS, ROWS = 8, 16
LEARNING_RATE = 1e-3
PATIENCE = datetime.timedelta(seconds=20)


@dataclass(frozen=True)
class Case:
    """An optimizer and what wraps the network.

    Attributes:
        wrapper: "ddp" or "fsdp2".
        optimizer: A word such as adamw.
        options: Its options beside the learning rate.
        allowed: The largest difference of a parameter from that of one process. Gradients are sums in another order,
            which moves a step of 0.001 by some millionths; codes of 8 bits may become their neighbours.
    """

    wrapper: str
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    allowed: float = 2e-5

    def __str__(self) -> str:
        options = ", ".join(f"{word}={value}" for word, value in self.options.items())
        return f"{self.wrapper}, {self.optimizer}" + (f", {options}" if options else "")


def cases() -> list[Case]:
    """Every case, those that are used most first."""
    found = []
    for wrapper in ("ddp", "fsdp2"):
        found += [
            Case(wrapper, "adamw"),
            Case(wrapper, "adamw", {"state_bits": 8}, allowed=4e-4),
            Case(wrapper, "lamb"),
            Case(wrapper, "radam"),
            Case(wrapper, "adan", {"max_grad_norm": 1.0}),
            Case(wrapper, "muon", allowed=2e-4),  # its products are in bfloat16 on a GPU
        ]
    return sorted(found, key=lambda case: case.optimizer == "muon")


def two_ranks(device: str, engine: str = "auto", seconds: float = math.inf) -> dict[str, dict[str, Any]]:
    """What came of every case, by its name: whether it agrees, and by how much it differs, or how it failed.

    Args:
        device: "cuda" for both ranks on the first GPU, or "cpu".
        engine: The engine that runs the steps.
        seconds: The time after which no case begins.
    """
    found: dict[str, dict[str, Any]] = {}
    end = time.time() + seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "found")
        while len(found) < len(cases()):  # a process that crashes costs the case that it was at
            file.write_text("{}")
            crashed = ""
            try:
                on_ranks(2, train_cases, device, engine, len(found), end, file)
            except torch.multiprocessing.ProcessExitedException as error:  # type: ignore[attr-defined]
                crashed = str(error)
            found |= json.loads(file.read_text())
            if crashed and len(found) < len(cases()):
                found[str(cases()[len(found)])] = {"agrees": False, "failed": crashed}
    return found


def train_cases(device: str, engine: str, first: int, end: float, file: Path) -> None:
    """Run the cases from one on, and write what rank 0 found to a file after each.

    Args:
        device: As above.
        engine: As above.
        first: The number of the first case.
        end: The time of `time.time()` after which no case begins.
        file: Receives what was found, by case.
    """
    faulthandler.enable()
    rank = int(os.environ["RANK"])
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the name of the host need not have an address
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, rank == 0, timeout=5 * PATIENCE)
    if device == "cuda":
        torch.cuda.set_device(0)
    found: dict[str, dict[str, Any]] = {}
    for number, case in list(enumerate(cases()))[first:]:
        begin = time.perf_counter()
        if not _goes_on(store, rank, number, time.time() < end):
            if rank == 0:
                _note(found, case, {"agrees": False, "failed": "the time was over"}, file)
            continue
        said: dict[str, Any] = {}
        try:
            dist.init_process_group(
                "gloo", store=dist.PrefixStore(str(number), store), rank=rank, world_size=2, timeout=PATIENCE
            )
            worst = difference(case, rank, device, engine)
            said = {"differs": worst, "allowed": case.allowed, "agrees": worst <= case.allowed}
        except Exception as error:  # the other cases go on
            said = {"agrees": False, "failed": f"{type(error).__name__}: {str(error)[:300]}"}
        said["seconds"] = round(time.perf_counter() - begin, 1)
        _both_have_ended(store, rank, number, said)
        if rank == 0:
            _note(found, case, said, file)
        if dist.is_initialized():
            dist.destroy_process_group()


def _note(found: dict[str, dict[str, Any]], case: Case, said: dict[str, Any], file: Path) -> None:
    """Keep what came of a case, whatever becomes of this process."""
    found[str(case)] = said
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    part.replace(file)


def _goes_on(store: dist.Store, rank: int, number: int, in_time: bool) -> bool:
    """What rank 0 says of its own time."""
    if rank == 0:
        store.set(f"goes on/{number}", str(in_time))
    return store.get(f"goes on/{number}").decode() == "True"


def _both_have_ended(store: dist.Store, rank: int, number: int, said: dict[str, Any]) -> None:
    """Wait for the other rank, and note what failed there: rank 0 answers for both."""
    store.set(f"failed/{number}/{rank}", said.get("failed", ""))
    other = store.get(f"failed/{number}/{1 - rank}").decode()
    if other:
        said.update({"agrees": False, "failed on the other rank": other})


def difference(case: Case, rank: int, device: str, engine: str) -> float:
    """The largest difference of a parameter between training on two ranks and in one process."""
    options = {"lr": LEARNING_RATE, "engine": engine, **case.options}
    alone, net = network(device), network(device)
    train(alone, create_optimizer(case.optimizer, alone, **options), slice(0, ROWS), device)
    wrapped = wrap(case.wrapper, net, device)
    half = ROWS // 2
    train(wrapped, create_optimizer(case.optimizer, wrapped, **options), slice(half * rank, half * (rank + 1)), device)
    pairs = zip(whole(wrapped.parameters()), whole(alone.parameters()), strict=True)
    worst = torch.stack([(ours - theirs).abs().max() for ours, theirs in pairs]).max().item()
    if not math.isfinite(worst):
        raise FloatingPointError("a parameter is not finite")
    return worst


def network(device: str) -> nn.Sequential:
    """A network with matrices that are kept in codes at 8 bits, and with sizes that two ranks cannot share evenly."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Sequential(nn.Linear(64, 129), nn.GELU(), nn.Linear(129, 33))
    return layers.to(device)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, rows: slice, device: str) -> None:
    """Some steps on some rows of every batch."""
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(100 + step)
        inputs, targets = (torch.randn(ROWS, width, generator=generator)[rows].to(device) for width in (64, 33))
        optimizer.zero_grad()
        nn.functional.mse_loss(net(inputs), targets).backward()
        optimizer.step()


def wrap(wrapper: str, net: nn.Sequential, device: str) -> nn.Module:
    """The network under DDP or FSDP2 on both ranks."""
    if wrapper == "ddp":
        return nn.parallel.DistributedDataParallel(net)
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import fully_shard

    mesh = DeviceMesh(device, [0, 1])
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=mesh)
        layer.set_force_sum_reduction_for_comms(True)  # type: ignore[operator]  # gloo knows no averages
    return net


def whole(params: Any) -> list[Tensor]:
    """Parameters, on the CPU, with the shards of both ranks.

    `full_tensor` crashes where it gathers CUDA tensors over gloo (torch 2.11).
    """
    found: list[Tensor] = []
    for p in (p.detach() for p in params):
        if not hasattr(p, "to_local"):
            found.append(p.cpu())
            continue
        shards: list[Any] = [None, None]
        dist.all_gather_object(shards, p.to_local().cpu())
        found.append(torch.cat(shards))
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Print what came of every case, in the last line as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device", nargs="?", choices=("cpu", "cuda"), default="cuda")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    parser.add_argument("--engine", default="triton" if interpreted else "auto")
    parser.add_argument("--seconds", type=float, default=70.0, help="after which no case begins")
    given = parser.parse_args(args)
    found = two_ranks(given.device, given.engine, given.seconds)
    for name, result in found.items():
        print(f"{name}: {'agrees' if result['agrees'] else result.get('failed') or 'differs too much'}")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
