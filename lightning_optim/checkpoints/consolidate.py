"""Convert a folder of shards that FSDP saved to one checkpoint file, which every strategy can load.

    python -m lightning_optim.checkpoints.consolidate step=1000.ckpt step=1000.full.ckpt

Lightning's own command does the same for folders of FSDP1, and does not support those of FSDP2.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

import torch

from lightning_optim.checkpoints.integrity import METADATA
from lightning_optim.errors import OptionError


def consolidate(folder: Path | str, file: Path | str) -> None:
    """Read a folder of shards and write the file that a run with full checkpoints would have written.

    This needs one process with memory for the whole checkpoint, and no process group.

    Args:
        folder: A checkpoint of `FSDPStrategy(state_dict_type="sharded")` or
            `ModelParallelStrategy(save_distributed_checkpoint=True)`.
        file: Path to write to.

    Raises:
        OptionError: if the folder is not such a checkpoint.
    """
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    folder = Path(folder)
    if not (folder / METADATA).is_file() or not (folder / ".metadata").is_file():
        raise OptionError(
            f"{folder} is not a folder of shards that Lightning saved: it must contain .metadata and {METADATA}."
        )
    with tempfile.TemporaryDirectory(dir=Path(file).parent) as temporary:
        dcp_to_torch_save(folder, Path(temporary) / "all")
        checkpoint: dict[str, Any] = torch.load(Path(temporary) / "all", weights_only=True)
    checkpoint.update(torch.load(folder / METADATA, weights_only=True))
    if "model" in checkpoint:  # the key of FSDP1
        checkpoint["state_dict"] = checkpoint.pop("model")
    numbers = sorted(int(key.split("_")[1]) for key in checkpoint if re.fullmatch(r"optimizer_\d+", key))
    checkpoint["optimizer_states"] = [checkpoint.pop(f"optimizer_{number}") for number in numbers]
    torch.save(checkpoint, file)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a folder of shards that FSDP saved to one checkpoint file.")
    parser.add_argument("folder", help="the checkpoint to read")
    parser.add_argument("file", help="the file to write")
    given = parser.parse_args()
    consolidate(given.folder, given.file)
