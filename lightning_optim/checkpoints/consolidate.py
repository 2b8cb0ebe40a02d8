"""Convert a folder of shards that FSDP saved to one checkpoint file, which every strategy can load.

    python -m lightning_optim.checkpoints.consolidate step=1000.ckpt step=1000.full.ckpt

Lightning's own command does the same for folders of FSDP1, and does not support those of FSDP2.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from lightning_optim.checkpoints import archive, integrity, shards
from lightning_optim.checkpoints.archive import Damaged
from lightning_optim.errors import OptionError


def consolidate(folder: Path | str, file: Path | str) -> None:
    """Read a folder of shards and write the file that a run with full checkpoints would have written.

    This needs one process with memory for the whole checkpoint, and no process group. The folder is verified, and
    nothing that is in it runs. The file replaces an earlier one when it is complete.

    Args:
        folder: A checkpoint of `FSDPStrategy(state_dict_type="sharded")` or
            `ModelParallelStrategy(save_distributed_checkpoint=True)`.
        file: Path to write to.

    Raises:
        OptionError: if the folder is not such a checkpoint, is damaged, or holds more than plain data; and if `file` is
            a folder.
    """
    folder = Path(folder)
    if not (folder / shards.METADATA).is_file() or not (folder / shards.TABLE).is_file():
        raise OptionError(
            f"{folder} is not a folder of shards that Lightning saved: it must contain {shards.TABLE} and "
            f"{shards.METADATA}."
        )
    if Path(file).is_dir():
        raise OptionError(f"{file} is a folder, and is not written over. Give the name of the file to write.")
    try:
        checkpoint = _read(folder)
    except Damaged as error:
        raise OptionError(f"The checkpoint cannot be converted: {error}") from None
    if "model" in checkpoint:  # the key of FSDP1
        checkpoint["state_dict"] = checkpoint.pop("model")
    numbers = sorted(int(key.split("_")[1]) for key in checkpoint if re.fullmatch(r"optimizer_\d+", key))
    checkpoint["optimizer_states"] = [checkpoint.pop(f"optimizer_{number}") for number in numbers]
    with integrity.replacing(Path(file)) as written:
        torch.save(checkpoint, written)


def _read(folder: Path) -> dict[str, Any]:
    nested = _Node()
    for entry in shards.read(folder):
        holder = nested
        for key in entry.path[:-1]:
            holder = holder.setdefault(key, _Node())
        holder[entry.path[-1]] = _value(entry)
    metadata = folder / shards.METADATA
    with metadata.open("rb") as file:
        archive.check(file, f"{metadata}")
    return {**_plain(nested), **shards.load_plain(metadata, f"{metadata}")}


def _value(entry: shards.Entry) -> Any:
    parts = [shards.load(entry, shard) for shard in entry.shards]
    if len(parts) == 1:
        return parts[0]
    whole = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
    for shard, part in zip(entry.shards, parts, strict=True):
        whole[tuple(slice(o, o + n) for o, n in zip(shard.offset, shard.shape, strict=True))] = part
    return whole


class _Node(dict[Any, Any]):
    """A dict or a list of the checkpoint, while it is put together."""


def _plain(value: Any) -> Any:
    """The same with dicts and lists. What has numbers for keys was a list: keys of dicts are strings in a folder."""
    if not isinstance(value, _Node):
        return value
    values = {key: _plain(held) for key, held in value.items()}
    if all(isinstance(key, int) for key in values):
        return [values[number] for number in sorted(values)]
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Convert a folder of shards that FSDP saved to one checkpoint file.")
    parser.add_argument("folder", help="the checkpoint to read")
    parser.add_argument("file", help="the file to write")
    given = parser.parse_args()
    consolidate(given.folder, given.file)
