"""A folder of shards that an earlier version wrote lacks the options that pages have got since."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_optim import create_optimizer
from lightning_optim.core.optimizer import Optimizer
from tests.harness.ranks import run_ranks


def made(cautious: bool) -> tuple[nn.Module, Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return model, create_optimizer({"name": "adamw", "cautious": cautious}, model)


def load(folder: Path, cautious: bool) -> tuple[bool, list[float]]:
    """Whether an optimizer is cautious that has loaded the folder, and its counters."""
    model, optimizer = made(cautious)
    state: dict[str, Any] = {"optimizer": get_optimizer_state_dict(model, optimizer)}
    state_dict_loader.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    return optimizer.param_groups[0]["cautious"], [float(slots["step"]) for slots in optimizer.state.values()]


def write_and_load(folder: Path) -> list[Any]:
    dist.init_process_group("gloo")
    for name, cautious in (("early", False), ("now", True)):
        model, optimizer = made(cautious)
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        state = get_optimizer_state_dict(model, optimizer)
        if name == "early":
            groups: Any = state["param_groups"]
            for group in groups:
                del group["cautious"], group["cautious_decay"]
        state_dict_saver.save({"optimizer": state}, checkpoint_id=folder / name)
    return [load(folder / "early", False), load(folder / "now", True)]


def test_a_folder_without_them_loads(tmp_path: Path) -> None:
    for found in run_ranks(write_and_load, tmp_path):
        assert found == [(False, [1.0, 1.0]), (True, [1.0, 1.0])]
