"""Checkpoints that are whole or not there: how one takes its place on a disk, and whether it is whole."""

from __future__ import annotations

import io
import os
import shutil
import zipfile
from pathlib import Path
from typing import IO

PICKLE = b"\x80"  # the first byte of the older form of torch.save; the newer one is a zip archive


def partial(path: Path) -> Path:
    """Where a checkpoint stands while it is written: beside its place, and found by nobody who looks for one."""
    return path.parent / ".partial" / path.name


def _replaced(path: Path) -> Path:
    return partial(path).with_name(f"{path.name}.replaced")


def begin(path: Path) -> Path:
    """Make room for a checkpoint that is to be written; returns where to write it."""
    place = partial(path)
    _remove(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    return place


def commit(path: Path) -> None:
    """Let the checkpoint that was written to `partial(path)` take its place.

    A file replaces a file in one rename. A directory cannot be replaced: the old one steps aside first, and whoever
    comes between the two renames finds both of them whole, and `recover` takes the new one.
    """
    place, aside = partial(path), _replaced(path)
    for written in [place, *place.rglob("*")]:
        _flush(written)
    if path.is_dir() or (path.exists() and place.is_dir()):
        _remove(aside)
        path.rename(aside)
        place.rename(path)
        _remove(aside)
    else:
        place.replace(path)
    _flush(path.parent)
    if not any(place.parent.iterdir()):
        place.parent.rmdir()


def recover(path: Path) -> None:
    """Finish a `commit` that was interrupted between its two renames."""
    if not path.exists() and _replaced(path).exists() and partial(path).exists():
        partial(path).rename(path)


def _flush(path: Path) -> None:
    """Have the disk hold what was written before something points to it."""
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
    """What is wrong with a checkpoint, in one sentence; empty where it is whole.

    `torch.save` writes a checksum beside every tensor and `torch.load` does not look at it. Here everything is read
    once and compared. A file of the form that torch wrote before its version 1.6 has none, and passes.

    Args:
        path: A file of `torch.save`, or a folder that FSDP1 or FSDP2 saved in parts.
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
        return f"{name} is cut off, or is no file of torch.save ({error})."
    return f"{name} was changed after it was written: the checksum of {wrong} does not fit." if wrong else ""


def _damage_of_folder(path: Path) -> str:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    for name in (".metadata", "meta.pt"):
        if not (path / name).is_file():
            return f"{path} has no {name}: its save was never finished."
    try:
        metadata = FileSystemReader(path).read_metadata()
    except Exception as error:  # whatever an unpickler says of bytes that are not what was written
        return f"{path / '.metadata'} cannot be read ({error!r})."
    parts = sorted((metadata.storage_data or {}).values(), key=lambda part: (part.relative_path, part.offset))
    for part in parts:
        file = path / part.relative_path
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            return f"{file} is missing or cut off."
        with file.open("rb") as whole:
            whole.seek(part.offset)
            data = io.BytesIO(whole.read(part.length))
        if found := _damage_of_archive(data, f"a tensor in {file}"):
            return found
    with (path / "meta.pt").open("rb") as rest:
        return _damage_of_archive(rest, f"{path / 'meta.pt'}")
