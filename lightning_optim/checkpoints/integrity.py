"""Replace a checkpoint on disk atomically, and verify that one is complete and unchanged."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import IO

METADATA = "meta.pt"  # the file beside the shards with what else Lightning saves: loops, callbacks, hyper-parameters
PICKLE = b"\x80"  # the first byte in the format of torch.save before version 1.6; since then it is a zip archive


def partial(path: Path) -> Path:
    """The path to write a checkpoint to before it is moved to `path`: in a folder that no search for checkpoints sees.

    Example:
        >>> partial(Path("runs/last.ckpt")).as_posix()
        'runs/.partial/last.ckpt'
    """
    return path.parent / ".partial" / path.name


def _replaced(path: Path) -> Path:
    return partial(path).with_name(f"{path.name}.replaced")


def begin(path: Path) -> Path:
    """Create the folder for `partial(path)`, remove what is left of an earlier save there, and return that path."""
    written = partial(path)
    _remove(written)
    written.parent.mkdir(parents=True, exist_ok=True)
    return written


def commit(path: Path) -> None:
    """Move the checkpoint at `partial(path)` to `path`.

    A file replaces a file in one rename. A directory cannot be replaced, so the old one is renamed first. If the
    process dies between the two renames, both are intact, and `recover` finishes the move.
    """
    written, old = partial(path), _replaced(path)
    for file in [written, *written.rglob("*")]:
        _flush(file)
    if path.is_dir() or (path.exists() and written.is_dir()):
        _remove(old)
        path.rename(old)
        written.rename(path)
        _remove(old)
    else:
        written.replace(path)
    _flush(path.parent)
    if not any(written.parent.iterdir()):
        written.parent.rmdir()


def recover(path: Path) -> None:
    """Finish a `commit` that was interrupted between its two renames."""
    if not path.exists() and _replaced(path).exists() and partial(path).exists():
        partial(path).rename(path)


def _flush(path: Path) -> None:
    """Flush a file or directory to disk, so that a rename never becomes durable before its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damage(path: Path) -> str:
    """Find out what is wrong with a checkpoint.

    `torch.save` writes a checksum for every tensor, and `torch.load` does not verify it. Here everything is read once
    and compared. A file in the format before torch 1.6 has no checksums and passes.

    Args:
        path: A file of `torch.save`, or a folder of shards saved by FSDP1 or FSDP2.

    Returns:
        What is wrong, in one sentence, or "" if the checkpoint is intact.
    """
    if path.is_dir():
        return _damage_of_folder(path)
    with path.open("rb") as file:
        if file.read(1) == PICKLE:
            return ""
        return _damage_of_archive(file, f"{path}")


def _damage_of_archive(file: IO[bytes], name: str) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            wrong = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError) as error:
        return f"{name} is truncated, or not a file of torch.save ({error})."
    return f"{name} was changed after it was written: the checksum of {wrong} does not match." if wrong else ""


def _damage_of_folder(path: Path) -> str:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for name in (".metadata", METADATA):
        if not (path / name).is_file():
            return f"{path} has no {name}: its save was never finished."
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:  # an unpickler may raise anything on changed bytes
        return f"{path / '.metadata'} cannot be read ({error!r})."
    shards = sorted((metadata.storage_data or {}).values(), key=lambda shard: (shard.relative_path, shard.offset))
    for shard in shards:
        file = path / shard.relative_path
        if not file.is_file() or file.stat().st_size < shard.offset + shard.length:
            return f"{file} is missing or truncated."
        with file.open("rb") as all_shards:
            all_shards.seek(shard.offset)
            data = io.BytesIO(all_shards.read(shard.length))
        if wrong := _damage_of_archive(data, f"a tensor in {file}"):
            return wrong
    with (path / METADATA).open("rb") as other:
        return _damage_of_archive(other, f"{path / METADATA}")
