"""The entries of a cache: what Triton computes their names from, an archive of them, and the names elsewhere."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

INDEX = "index.json"


@dataclass
class Entries:
    """Entries by the name of their folder.

    Attributes:
        kernels: The hash of the source with the types of the arguments, and the options that are not Triton's defaults.
        modules: The files of C modules.
    """

    kernels: dict[str, dict[str, Any]] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)

    def add_kernel(self, key: str, src: Any, backend: Any, options: Any) -> None:
        usual, given = vars(backend.parse_options({})), vars(options)
        changed = {word: value for word, value in given.items() if value != usual[word]}
        self.kernels[folder_of(key)] = {"name": src.name, "source": src.hash(), "options": changed}

    def add_module(self, folder: str, file: str) -> None:
        self.modules[folder] = file

    def add(self, others: Iterable[Entries]) -> None:
        for other in others:
            self.kernels |= other.kernels
            self.modules |= other.modules

    @classmethod
    def read(cls, folder: Path) -> Entries:
        """Those that are noted in a folder; none if nothing is noted there."""
        file = folder / INDEX
        return cls(**json.loads(file.read_text())) if file.exists() else cls()

    def write(self, folder: Path) -> None:
        (folder / INDEX).write_text(json.dumps(vars(self), indent=1, sort_keys=True) + "\n")


def folder_of(key: str) -> str:
    """The name of the folder in which Triton keeps the entry with a key."""
    from triton.runtime.cache import _base32

    name: str = _base32(hashlib.sha256(key.encode()).hexdigest())
    return name


def folder_here(kernel: dict[str, Any]) -> str:
    """The name of the folder in which the Triton that is installed here looks for a kernel."""
    from triton._C.libtriton import get_cache_invalidating_env_vars
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.cache import get_cache_key

    backend = make_backend(GPUTarget("cuda", 90, 32))
    source = SimpleNamespace(hash=lambda: kernel["source"])
    options = backend.parse_options(dict(kernel["options"]))
    return folder_of(get_cache_key(source, backend, options, get_cache_invalidating_env_vars()))


def pack(folder: Path, archive: Path) -> dict[str, int]:
    """Pack what a later process needs: machine code, its description, and the modules; a few KB for each entry.

    Args:
        folder: A cache that `fill` has filled.
        archive: A file, whose name should end in .tar.xz.
    """
    entries = Entries.read(folder)
    kept = Entries(modules=entries.modules)
    with tarfile.open(archive, "w:xz") as tar:
        for name, kernel in sorted(entries.kernels.items(), key=lambda item: item[1]["name"]):  # those alike together
            files = [file for kind in (".json", ".cubin") for file in (folder / name).glob(f"[!_]*{kind}")]
            if len(files) == 2:  # else compiling it failed, or was broken off
                kept.kernels[name] = kernel
                for file in files:
                    tar.add(file, f"{name}/{file.name}", filter=_plain)
        for name, module in sorted(entries.modules.items()):
            tar.add(folder / name / module, f"{name}/{module}", filter=_plain)
        text = json.dumps(vars(kept), sort_keys=True).encode()
        about = tarfile.TarInfo(INDEX)
        about.size = len(text)
        tar.addfile(about, io.BytesIO(text))
    return {"kernels": len(kept.kernels), "modules": len(kept.modules), "bytes": archive.stat().st_size}


def _plain(about: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without owner and time."""
    about.uid = about.gid = about.mtime = 0
    about.uname = about.gname = ""
    return about


def unpack(archive: Path, folder: Path) -> dict[str, int]:
    """Unpack entries so that the Triton that is installed here finds them.

    Args:
        archive: What `pack` made.
        folder: The later TRITON_CACHE_DIR.

    Returns:
        How many kernels and modules there are, and how many kernels have another name here than where they were made.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    entries, here = Entries.read(folder), Entries()
    renamed = 0
    for name, kernel in entries.kernels.items():
        new = folder_here(kernel)
        here.kernels[new] = kernel
        if new != name:
            (folder / name).rename(folder / new)
            renamed += 1
        _describe(folder / new)
    here.modules = entries.modules
    here.write(folder)
    return {"kernels": len(here.kernels), "modules": len(here.modules), "renamed": renamed}


def _describe(entry: Path) -> None:
    """Write Triton's list of the files of an entry, with their paths here."""
    (description,) = entry.glob("[!_]*.json")
    paths = {file.name: str(file) for file in entry.iterdir() if not file.name.startswith("__grp__")}
    (entry / f"__grp__{description.name}").write_text(json.dumps({"child_paths": paths}))


def report(folder: Path) -> dict[str, Any]:
    """What processes that had this cache compiled themselves: the names of kernels, and the number of modules."""
    entries = Entries.read(folder)
    compiled = [
        file.stem for file in folder.glob("*/[!_]*.cubin") if file.parent.name not in entries.kernels
    ]  # also those of other packages
    modules = [file for file in folder.glob("*/*.so") if file.parent.name not in entries.modules]
    return {
        "carried": len(entries.kernels),
        "compiled": len(compiled),
        "names": sorted(set(compiled)),
        "modules carried": len(entries.modules),
        "modules built": len(modules),
    }
