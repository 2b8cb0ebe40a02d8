"""Folders that kernels are stored and made in: what may be trusted, locks, and what is left behind.

A path says little: others may put another folder or file in its place at any time. So a folder is opened, what was
opened is checked, and names are looked up in what was opened. Who can write to a parent of the cache folder can hide it
that way, but not slip in a folder or a file of this user.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass

if sys.platform != "win32":  # where `compiler.without_compiler` says that this engine cannot serve
    import fcntl
    import pwd

HOUR, SEASON = 3600.0, 90 * 24 * 3600.0
LARGEST = 1 << 26  # bytes of a kernel; a thousand times of what is usual
PREFIX, PARTIAL, LOCK, KERNEL = "lightning_optim.", ".partial", ".lock", ".so"

_told: set[str] = set()


@dataclass(frozen=True)
class Folder:
    """An open folder.

    Attributes:
        path: Its path when it was opened.
        descriptor: The open folder.
    """

    path: str
    descriptor: int

    @property
    def is_trusted(self) -> bool:
        """Whether it belongs to this user and nobody else can write to it."""
        return _is_ours(os.fstat(self.descriptor))

    @property
    def where(self) -> str:
        """A path that leads to this very folder, whatever has become of its own, while the descriptor is open."""
        return f"/proc/self/fd/{self.descriptor}" if os.path.isdir("/proc/self/fd") else self.path

    def read(self, name: str) -> bytes | None:
        """The contents of a file that belongs to this user and that nobody else can write; None if there is none."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # a pipe must not make it wait
        try:
            with open(os.open(name, flags, dir_fd=self.descriptor), "rb") as file:
                found = os.fstat(file.fileno())
                good = stat.S_ISREG(found.st_mode) and _is_ours(found) and found.st_size <= LARGEST
                return file.read() if good else None
        except OSError:
            return None

    def write(self, name: str, contents: bytes, to_disk: bool = False) -> None:
        """Write a new file, and wait until it is on the disk where a crash must not tear it."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        with open(os.open(name, flags, 0o600, dir_fd=self.descriptor), "wb") as file:
            file.write(contents)
            if to_disk:
                file.flush()
                os.fsync(file.fileno())

    def move(self, name: str, into: Folder, new: str) -> None:
        """Give a file its name in another folder of the same filesystem, in one instant."""
        os.rename(name, new, src_dir_fd=self.descriptor, dst_dir_fd=into.descriptor)
        os.fsync(into.descriptor)

    def touch(self, name: str) -> None:
        """Note once a day that a file is in use."""
        with contextlib.suppress(OSError):
            if time.time() - os.stat(name, dir_fd=self.descriptor).st_mtime > 24 * HOUR:
                os.utime(name, dir_fd=self.descriptor)

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all that is in it, as far as that is possible."""
        with contextlib.suppress(OSError):
            if not stat.S_ISDIR(os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=self.descriptor)
                return
            with _opened(name, self) as folder:
                for inner in os.listdir(folder.descriptor):
                    folder.remove(inner)
            os.rmdir(name, dir_fd=self.descriptor)

    def sweep(self, key: str | None = None) -> None:
        """Remove what processes that were killed have left behind, and kernels that nobody has used for a season.

        Args:
            key: In the cache folder, the kernel whose lock is held, or an empty string: nobody else is making that one,
                so its remains need not be old. None in a folder for temporary files, where others keep theirs.
        """
        limits = {LOCK: HOUR, KERNEL: SEASON} if key is not None else {}
        with contextlib.suppress(OSError):
            for name in os.listdir(self.descriptor):
                is_work = name.startswith(PREFIX) and name.endswith(PARTIAL)
                limit = HOUR if is_work else limits.get(os.path.splitext(name)[1])
                if limit is None:
                    continue
                with contextlib.suppress(OSError):
                    found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
                    used = max(found.st_mtime, found.st_atime, found.st_ctime)
                    remains = key and name.startswith(f"{PREFIX}{key}.")
                    if found.st_uid == os.geteuid() and (remains or time.time() - used > limit):
                        self.remove(name)


def _is_ours(found: os.stat_result) -> bool:
    return found.st_uid == os.geteuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


@contextlib.contextmanager
def _opened(path: str, parent: Folder | None = None) -> Iterator[Folder]:
    """Open a folder by its path, or by its name in a parent."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if parent else 0)
    descriptor = os.open(path, flags, dir_fd=parent.descriptor if parent else None)
    if descriptor < 3:  # a service may run without standard streams, whose place a compiler's take
        low, descriptor = descriptor, fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3)
        os.close(low)
    try:
        yield Folder(os.path.join(parent.path, path) if parent else path, descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------ which folders


@contextlib.contextmanager
def cache() -> Iterator[Folder | None]:
    """The cache folder of this user; None where there is none that can be trusted."""
    with contextlib.ExitStack() as stack:
        yield _cache(stack)


def _cache(stack: contextlib.ExitStack) -> Folder | None:
    home = _cache_home()
    if home is None:
        return None
    path = os.path.join(home, "lightning_optim")
    with contextlib.suppress(OSError):
        os.makedirs(path, 0o700, exist_ok=True)
    try:
        folder = stack.enter_context(_opened(path))
    except OSError:
        return None
    if folder.is_trusted:
        return folder
    if path not in _told:
        _told.add(path)
        warnings.warn(
            f"kernels are compiled anew in each process, since {printable(path)} belongs to another user or can be "
            "written by others, and what it holds may be theirs. Make it yours alone (chmod go-w), or set "
            "XDG_CACHE_HOME to a folder of your own.",
            stacklevel=2,
        )
    return None


def _cache_home() -> str | None:
    """Where programs keep their caches. Relative paths mean another folder in each process, and are ignored."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(named):
        return named
    home = os.environ.get("HOME", "")
    if not os.path.isabs(home) or _is_of_somebody_else(home):
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:  # a container may run as a user without an entry
            return None
    return os.path.join(home, ".cache") if os.path.isabs(home) else None


def _is_of_somebody_else(home: str) -> bool:
    """Whether it is another user's home, which `sudo` leaves in HOME. Folders of root would be in the way there."""
    try:
        return os.stat(home).st_uid not in (os.geteuid(), 0)
    except OSError:
        return False


def temporary() -> list[str]:
    """Folders for temporary files, the usual one first."""
    found = []
    with contextlib.suppress(OSError):  # none that can be written
        found.append(tempfile.gettempdir())
    return [*found, "/dev/shm"]


@contextlib.contextmanager
def work(parent: str | Folder, word: str) -> Iterator[Folder]:
    """A new folder for this process alone, which is removed in the end with all that is in it.

    Raises:
        OSError: where no folder can be made there.
    """
    with contextlib.ExitStack() as stack:
        if isinstance(parent, Folder):
            above = parent
        else:
            above = stack.enter_context(_opened(parent))
            above.sweep()
        name = f"{PREFIX}{word}.{secrets.token_hex(4)}{PARTIAL}"
        os.mkdir(name, 0o700, dir_fd=above.descriptor)
        try:
            with _opened(name, above) as folder:
                if not folder.is_trusted:
                    raise OSError(f"{printable(folder.path)} has been replaced by another user")
                yield folder
        finally:
            above.remove(name)


def printable(path: str) -> str:
    """A path for a message; bytes that are no UTF-8 are shown as such."""
    return os.fsencode(path).decode(errors="backslashreplace")


# ------------------------------------------------------------------ locks


@contextlib.contextmanager
def lock(folder: Folder, key: str, patience: float, given_up: Callable[[], bool]) -> Iterator[bool]:
    """Let one process at a time make a kernel. The system frees the lock of a process that ends, however it ends.

    Args:
        folder: The cache folder.
        key: The kernel.
        patience: Seconds to wait for another process.
        given_up: Whether there is nothing to wait for any more.

    Yields:
        Whether the lock is held. It is not where the filesystem has no locks, and where the other process takes too
        long, which may have been stopped.
    """
    name = key + LOCK
    deadline = time.monotonic() + patience
    descriptor = _acquired(folder, name, lambda: given_up() or time.monotonic() > deadline)
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.unlink(name, dir_fd=folder.descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_UN)  # a child of a fork may hold a copy of the descriptor
            os.close(descriptor)


def _acquired(folder: Folder, name: str, given_up: Callable[[], bool]) -> int | None:
    """The open file that is locked, or None."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    while True:
        try:
            descriptor = os.open(name, flags, 0o600, dir_fd=folder.descriptor)
        except OSError:  # read-only or full
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            named = os.stat(name, dir_fd=folder.descriptor, follow_symlinks=False)
            if os.path.samestat(named, os.fstat(descriptor)):
                return descriptor
        except (BlockingIOError, FileNotFoundError):  # taken; or its holder has finished and removed it
            pass
        except OSError:
            os.close(descriptor)
            folder.remove(name)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
        if given_up():
            return None
        time.sleep(0.02)
