"""Replace a checkpoint on disk so that a whole one is always there, and verify that one is complete and unchanged."""

from __future__ import annotations

import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_optim.checkpoints import archive, shards
from lightning_optim.checkpoints.archive import Damaged
from lightning_optim.errors import OptionError

if sys.platform != "win32":
    import fcntl

EXCHANGE = ".exchange"
REPLACED = ".replaced"
ATTEMPTS = 3


def partial(path: Path) -> Path:
    """The path to write a checkpoint to before it is moved to `path`: in a folder that no search for checkpoints sees.

    Example:
        >>> partial(Path("runs/last.ckpt")).as_posix()
        'runs/.partial/last.ckpt'
    """
    return path.parent / ".partial" / path.name


def _exchange(path: Path) -> Path:
    """Where a whole new folder stands until the old one has left `path`: `ckpt_path="last"` finds it there."""
    return path.with_name(f"{path.stem}{EXCHANGE}{path.suffix}")


def _replaced(path: Path) -> Path:
    return partial(path).with_name(f"{path.name}{REPLACED}")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a checkpoint that takes the place of `path` when the block ends, and only if it ends without an error.

    What is at `path` stays there until the new one is whole and on the disk. Processes of one machine that save to the
    same folder wait for each other.

    Yields:
        The path to write to.

    Raises:
        OptionError: if `path` is a folder that holds something else than a checkpoint.
    """
    if path.is_dir() and not _is_checkpoint(path):
        raise OptionError(f"{path} is a folder that is no checkpoint, and is not written over. Save to another name.")
    with _lock(partial(path).parent):
        _finish(path)
        written = partial(path)
        _remove(written)
        try:
            yield written
        except BaseException:
            with suppress(OSError):  # the error that led here says more
                _remove(written)
            raise
        _commit(path)


def _is_checkpoint(folder: Path) -> bool:
    """Whether a folder is one of shards, perhaps unfinished, or empty."""
    names = {path.name for path in folder.iterdir()}
    return not names.isdisjoint({shards.TABLE, shards.METADATA}) or all(name.endswith(".distcp") for name in names)


def _commit(path: Path) -> None:
    """Move the checkpoint at `partial(path)` to `path`.

    A file replaces a file in one rename. A folder cannot be replaced, so it first gets a name beside the old one. At
    each moment a name that `ckpt_path="last"` finds belongs to a whole checkpoint, and `recover` finishes the exchange.
    """
    written = partial(path)
    for file in [written, *written.rglob("*")]:
        _flush(file)
    if os.path.lexists(path) and (path.is_dir() or written.is_dir()):
        written.rename(_exchange(path))
        _flush(path.parent)
        _finish(path)
    else:
        written.replace(path)
        _flush(path.parent)


def _finish(path: Path) -> None:
    """Finish what a killed process left of an exchange. Nothing whole goes before something newer is whole."""
    new, old = _exchange(path), _replaced(path)
    if os.path.exists(new):  # Path.exists raises where a name is too long
        if os.path.lexists(path):
            _remove(old)
            path.rename(old)
        new.rename(path)
        _flush(path.parent)
        _remove(old)
    elif not os.path.lexists(path):  # earlier versions left the new one hidden beside the old one
        for candidate in (partial(path), old):
            if os.path.exists(old) and candidate.exists() and not damage(candidate):
                candidate.rename(path)
                break
    if os.path.lexists(path) and os.path.lexists(old) and not damage(path):
        _remove(old)


def recover(path: Path) -> Path:
    """Finish an exchange of folders that was interrupted.

    Args:
        path: The checkpoint, or the name that a new one has during an exchange.

    Returns:
        Where the checkpoint is now.
    """
    if path.stem.endswith(EXCHANGE):
        final = path.with_name(path.stem.removesuffix(EXCHANGE) + path.suffix)
        path = final if path.exists() or final.exists() else path
    if os.path.exists(_exchange(path)) or (os.path.exists(_replaced(path)) and not os.path.lexists(path)):
        try:
            with _lock(partial(path).parent):
                _finish(path)
        except OSError:  # it may be read but not changed
            return _exchange(path) if _exchange(path).exists() else path
    return path


def tidy(folder: Path) -> list[Path]:
    """Finish all exchanges in a folder that were interrupted, and remove what was never finished.

    Where another process is saving now, nothing is done.

    Returns:
        The checkpoints that had no name and have one now.
    """
    hidden = folder / ".partial"
    exchanged = [path.with_name(path.name.replace(EXCHANGE, "")) for path in folder.glob(f"*{EXCHANGE}*")]
    if not hidden.is_dir() and not exchanged:
        return []
    missing: list[Path] = []
    with suppress(OSError), _lock(hidden, wait=False) as alone:  # it may be read but not changed
        if not alone:
            return []
        replaced = [folder / path.name.removesuffix(REPLACED) for path in hidden.glob(f"*{REPLACED}")]
        missing = [path for path in {*exchanged, *replaced} if not os.path.lexists(path)]
        for path in {*exchanged, *replaced}:
            _finish(path)
        for path in hidden.iterdir():
            if not path.name.endswith(REPLACED):  # one that is still there is the only one, or the only whole one
                _remove(path)
    return sorted(path for path in missing if path.exists())


@contextmanager
def _lock(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock of a `.partial` folder, which is made for that time. The kernel releases it if the process dies.

    Yields:
        Whether it is held; it always is where `wait` is true or the file system has no locks.
    """
    if sys.platform == "win32":
        folder.mkdir(parents=True, exist_ok=True)
        yield True
        return
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(folder, os.O_RDONLY)
        except (FileExistsError, FileNotFoundError):  # whoever held the lock has just removed the folder
            if folder.exists() and not folder.is_dir():
                raise
            continue
        try:
            held = _take(handle, folder, wait)
            if not held or os.path.samestat(os.fstat(handle), os.stat(folder)):
                break
        except FileNotFoundError:
            pass  # as above: make another
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield held
    finally:
        if held:
            with suppress(OSError):
                folder.rmdir()  # unless it holds something
            if sys.platform != "win32":
                with suppress(OSError):
                    fcntl.flock(handle, fcntl.LOCK_UN)  # for children too, that have inherited it
        os.close(handle)


def _take(handle: int, folder: Path, wait: bool) -> bool:
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not wait:
            return False
        warnings.warn(f"Another process is saving to {folder.parent}. Waiting for it.", stacklevel=6)
        fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
    return True


def _flush(path: Path) -> None:
    """Flush a file or directory to disk, so that a rename never becomes durable before its contents."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damage(path: Path, trusted: bool = False) -> str:
    """Find out what is wrong with a checkpoint. Everything is read once, and nothing that is in it runs.

    `torch.save` writes a checksum for every record, and `torch.load` does not verify it. What has no checksum has only
    one form, and is compared with that. A file in the format before torch 1.6 has neither, and passes; so do the
    records of a file that was written with `torch.serialization.set_crc32_options(False)`.

    Args:
        path: A file of `torch.save`, or a folder of shards saved by FSDP1 or FSDP2.
        trusted: Objects in a folder, which torch unpickles without restrictions, may be of any class.

    Returns:
        What is wrong, in one sentence, or "" if the checkpoint is intact.
    """
    for _ in range(ATTEMPTS):
        before = _stamp(path)
        wrong = _damage(path, trusted)
        if before == _stamp(path):
            return wrong
    return f"{path} is being written: it changed while it was read."


def _damage(path: Path, trusted: bool) -> str:
    try:
        if path.is_dir():
            shards.check(path, trusted)
        else:
            with path.open("rb") as file:
                if file.read(len(archive.LEGACY)) != archive.LEGACY:
                    archive.check(file, f"{path}")
    except Damaged as error:
        return str(error)
    except OSError as error:
        return f"{path} cannot be read ({error})."
    return ""


def _stamp(path: Path) -> list[tuple[int, ...]]:
    """What changes when somebody writes to a file or folder, or puts another in its place."""
    stamps: list[tuple[int, ...]] = []
    with suppress(OSError):
        for file in [path, *(sorted(path.iterdir()) if path.is_dir() else [])]:
            found = file.stat()
            stamps.append((found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns))
    return stamps
