"""Read a folder of shards without running anything that is in it, and verify it.

`torch.distributed.checkpoint` keeps a table `.metadata` of what the folder holds and where. It is a pickle without a
checksum, and torch's reader runs whatever it names. Here classes that the table needs are stood in for by empty ones,
everything else is refused, and what the table says is compared with itself and with the files.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_optim.checkpoints import archive
from lightning_optim.checkpoints.archive import Damaged

METADATA = "meta.pt"  # the file beside the shards with what else Lightning saves: loops, callbacks, hyper-parameters
TABLE = ".metadata"

_OF_TABLE = {"BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"}
_OF_TABLE |= {"TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"}
_PATHS = {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"}
_STOOD_IN_FOR: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": _OF_TABLE,
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed._shard.sharded_tensor.metadata": {"MEM_FORMAT_ENCODING", "TensorProperties"},  # before torch 2.3
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,  # Python 3.13
    "builtins": {"getattr"},  # members of an Enum, Python 3.11.0 to 3.11.3
}


class Shard(NamedTuple):
    """A part of a tensor, or an object, and where it is stored."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    length: int


class Entry(NamedTuple):
    """A tensor or an object of a checkpoint."""

    path: tuple[str | int, ...]  # keys of nested dicts and lists
    dtype: torch.dtype | None  # None for an object
    shape: tuple[int, ...]
    shards: list[Shard]


class _StandIn:
    """Takes the place of a class in the table, and keeps what it was given."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


# What the table is written with. Of the other operations some allocate as much memory as a changed byte asks for.
_OPERATIONS = [pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.GLOBAL, pickle.STACK_GLOBAL]
_OPERATIONS += [pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2]
_OPERATIONS += [pickle.LONG1, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.NEWOBJ, pickle.REDUCE, pickle.BUILD]
_OPERATIONS += [pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS]
_OPERATIONS += [pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3]
_OPERATIONS += [pickle.MEMOIZE, pickle.BINPUT, pickle.LONG_BINPUT, pickle.BINGET, pickle.LONG_BINGET]


class _Unpickler(pickle._Unpickler):
    """Python's own in Python, with the classes and the operations that the table needs and no others."""

    dispatch: ClassVar[dict[int, Any]] = {
        operation[0]: pickle._Unpickler.dispatch[operation[0]] for operation in _OPERATIONS
    }

    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in (("torch", "Size"), ("collections", "OrderedDict")):
            return {"Size": tuple, "OrderedDict": dict}[name]
        if (module, name) == ("torch.serialization", "_get_layout"):
            return str
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if name in _STOOD_IN_FOR.get(module, ()):
            return type(name, (_StandIn,), {})  # one for each use: nothing that a file does to it lasts
        raise _Refused(f"it asks for {module}.{name}, which no checkpoint needs")


class _TorchsUnpickler(pickle.Unpickler):
    """The one that torch uses, for a table that has been verified: whether torch can read it."""

    @override
    def find_class(self, module: str, name: str) -> Any:
        _Unpickler(io.BytesIO()).find_class(module, name)
        return super().find_class(module, name)


class _Refused(Exception):
    pass


def read(folder: Path) -> list[Entry]:
    """What a folder of shards holds, by its table, which must agree with itself and with the sizes of the files.

    Raises:
        Damaged: if the folder is incomplete, or the table is not as it was written.
    """
    for name in (TABLE, METADATA):
        if not (folder / name).is_file():
            raise Damaged(f"{folder} has no {name}: its save was never finished.")
    data = io.BytesIO((folder / TABLE).read_bytes())
    try:
        table = _Unpickler(data).load().state
        if data.read(1):
            raise _Refused("it is longer than it was written")
        entries = _entries(folder, table)
        _TorchsUnpickler(io.BytesIO(data.getvalue())).load()
    except Exception as error:  # an unpickler may raise anything on changed bytes
        raise Damaged(f"{folder / TABLE} is damaged, or was not written by torch: {_reason(error)}.") from None
    _check_files(entries)
    return entries


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, _Refused) else f"{type(error).__name__} while it was read"


def _need(holds: bool, wrong: str) -> None:
    if not holds:
        raise _Refused(wrong)


def _entries(folder: Path, table: Mapping[str, Any]) -> list[Entry]:
    tensors = table["state_dict_metadata"]
    paths = table["planner_data"] or {name: (name,) for name in tensors}
    stored: dict[str, dict[Any, Any]] = defaultdict(dict)
    for index, where in table["storage_data"].items():
        offset, descriptors = index.state.get("offset"), where.state.get("transform_descriptors")
        _need(not descriptors, "its shards are compressed, which Lightning does not do")
        _need(offset not in stored[index.state["fqn"]], "a shard is named twice")
        stored[index.state["fqn"]][offset] = where.state
    _need(tensors.keys() == paths.keys() == stored.keys(), "its lists name different tensors")
    return [_entry(folder, name, tensors[name], paths[name], stored[name]) for name in tensors]


def _entry(folder: Path, name: str, tensor: Any, path: tuple[Any, ...], stored: dict[Any, Any]) -> Entry:
    _need(".".join(map(str, path)) == name, f"{name} has another name too")
    if type(tensor).__name__ == "BytesStorageMetadata":
        _need(stored.keys() == {None}, f"{name} has several places")
        return Entry(path, None, (), [_shard(folder, (), (), stored[None])])
    shape, chunks = tensor.state["size"], tensor.state["chunks"]
    properties = tensor.state["properties"].state
    dtype = properties["dtype"] if isinstance(properties, dict) else properties[0]
    _need(isinstance(dtype, torch.dtype), f"{name} has no dtype")
    shapes = {chunk.state["offsets"]: chunk.state["sizes"] for chunk in chunks}
    _need(shapes.keys() == stored.keys(), f"{name} has shards in other places")
    for offset, sizes in shapes.items():
        inside = all(0 <= o <= o + s <= n for o, s, n in zip(offset, sizes, shape, strict=True))
        _need(inside, f"a shard of {name} is outside of it")
    _need(sum(map(math.prod, shapes.values())) == math.prod(shape), f"{name} is incomplete")
    shards = [_shard(folder, offset, sizes, stored[offset]) for offset, sizes in shapes.items()]
    return Entry(path, dtype, shape, shards)


def _shard(folder: Path, offset: tuple[int, ...], shape: tuple[int, ...], where: Mapping[str, Any]) -> Shard:
    file = where["relative_path"]
    _need(Path(file).name == file, f"{file!r} is not in this folder")
    return Shard(offset, shape, folder / file, where["offset"], where["length"])


def _check_files(entries: list[Entry]) -> None:
    """Shards stand one behind the other in their files, up to the end."""
    files: dict[Path, list[tuple[int, int]]] = defaultdict(list)
    for entry in entries:
        for shard in entry.shards:
            files[shard.file].append((shard.start, shard.length))
    for file, places in files.items():
        end = 0
        for start, length in sorted(places):
            if start != end or length <= 0:
                raise Damaged(f"{file.parent / TABLE} is damaged: it leaves a gap in {file.name}.")
            end = start + length
        if not file.is_file() or file.stat().st_size < end:
            raise Damaged(f"{file} is missing or truncated.")
        if file.stat().st_size > end:
            raise Damaged(f"{file} is longer than it was written.")


def load(entry: Entry, shard: Shard, trusted: bool = False) -> Any:
    """Read a part of a tensor or an object, and verify it.

    Args:
        entry: What it belongs to.
        shard: Where it is.
        trusted: Take an object unread: return None for it.

    Raises:
        Damaged: if it is not what was written, or an object of a class that torch does not load without running code.
    """
    name = ".".join(map(str, entry.path))
    with shard.file.open("rb") as file:
        file.seek(shard.start)
        data = io.BytesIO(file.read(shard.length))
    archive.check(data, f"{name} in {shard.file}")
    if entry.dtype is None and trusted:
        return None
    data.seek(0)
    value = load_plain(data, f"{name} in {shard.file}")
    if entry.dtype is not None:
        right = isinstance(value, Tensor) and (value.dtype, tuple(value.shape)) == (entry.dtype, shard.shape)
        if not right:
            raise Damaged(f"{shard.file.parent / TABLE} is damaged: {name} has another shape or dtype than it says.")
    return value


def load_plain(file: Any, name: str) -> Any:
    """`torch.load` of numbers, strings, tensors and containers alone.

    Raises:
        Damaged: if there is anything else.
    """
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        (asks, *_) = [line for line in str(error).splitlines() if "GLOBAL " in line] or [str(error).splitlines()[0]]
        raise Damaged(
            f"{name} holds more than numbers, strings and tensors, and reading it would run code ({asks.strip()}). "
            "If you trust where it comes from, allow its classes with torch.serialization.add_safe_globals."
        ) from None


def check(folder: Path, trusted: bool = False) -> None:
    """Verify a folder of shards: all of it is read once.

    Raises:
        Damaged: if it is not what was written, or not plain data; objects in a `trusted` one are not looked at.
    """
    for entry in read(folder):
        for shard in entry.shards:
            load(entry, shard, trusted)
    with (folder / METADATA).open("rb") as file:
        archive.check(file, f"{folder / METADATA}")
