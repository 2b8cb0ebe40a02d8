"""A small folder of shards, as FSDP2 on one rank would write it, made without a process group."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_optim.checkpoints.shards import METADATA


def contents(value: float = 0.0) -> dict[str, Any]:
    """Keys as Lightning has them: of the model, and of an optimizer by the names of parameters."""
    weight = torch.arange(6.0).reshape(2, 3) + value
    slots = {"step": torch.tensor(3.0), "exp_avg": weight.bfloat16()}
    optimizer = {"state": {"net.weight": slots}, "param_groups": [{"lr": 0.1 + value, "betas": (0.9, 0.99)}]}
    return {"state_dict": {"net.weight": weight}, "optimizer_0": optimizer}


def write_folder(folder: Path, value: float = 0.0, **others: Any) -> Path:
    """Write `contents(value)` and whatever else to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    save({**contents(value), **others}, checkpoint_id=folder)  # in one process, where there is no group
    torch.save({"epoch": 1, "global_step": int(value), "state_dict": {}}, folder / METADATA)
    return folder
