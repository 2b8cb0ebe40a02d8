"""Make one file of a checkpoint that FSDP saved as a folder of shards, so that every strategy can load it.

    python -m lightning_optim.checkpoints.consolidate step=1000.ckpt step=1000.full.ckpt

Lightning's own command does the same for FSDP1 and does not know the folders of FSDP2.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_optim.errors import OptionError

METADATA = "meta.pt"  # what Lightning keeps beside the shards: loops, callbacks, hyper-parameters


def consolidate(folder: Path | str, file: Path | str) -> None:
    """Read a folder of shards and write the file that a run with full checkpoints would have written.

    Needs one process and memory for the whole checkpoint, and no process group.

    Args:
        folder: Written under `FSDPStrategy(state_dict_type="sharded")` or
            `ModelParallelStrategy(save_distributed_checkpoint=True)`.
        file: Where to write; any strategy resumes from it.

    Raises:
        OptionError: where the folder is no such checkpoint.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = Path(folder)
    if not (folder / METADATA).is_file() or not (folder / ".metadata").is_file():
        raise OptionError(
            f"{folder} is no folder of shards that Lightning saved: it must hold .metadata and {METADATA}."
        )
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as place:
        dcp_to_torch_save(folder, Path(place) / "all")
        found: dict[str, Any] = torch.load(Path(place) / "all", weights_only=True)
    found.update(torch.load(folder / METADATA, weights_only=True))
    if "model" in found:  # FSDP1's word
        found["state_dict"] = found.pop("model")
    numbers = sorted(int(key.split("_")[1]) for key in found if re.fullmatch(r"optimizer_\d+", key))
    found["optimizer_states"] = [found.pop(f"optimizer_{number}") for number in numbers]
    torch.save(found, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make one file of a checkpoint that FSDP saved as a folder of shards.")
    parser.add_argument("folder", help="the checkpoint")
    parser.add_argument("file", help="what to write")
    given = parser.parse_args()
    consolidate(given.folder, given.file)
