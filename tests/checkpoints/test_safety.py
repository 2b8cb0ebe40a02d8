"""What verifies or converts a checkpoint runs nothing that is in it."""

from __future__ import annotations

import ast
import builtins
import io
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import Metadata

from lightning_optim.checkpoints import shards
from lightning_optim.checkpoints.consolidate import consolidate
from lightning_optim.checkpoints.integrity import damage
from lightning_optim.errors import OptionError
from tests.checkpoints.folders import contents, write_folder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")

ROOT = Path(__file__).parents[2]


class Planted:
    """Unpickled without care, it calls a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def planted(mark: Path) -> list[Planted]:
    """Several ways to make a file."""
    return [
        Planted(os.mkdir, f"{mark}"),
        Planted(subprocess.check_call, ["touch", f"{mark}"]),
        Planted(builtins.eval, f"__import__('os').mkdir({f'{mark}'!r})"),
        Planted(getattr, Path, "mkdir"),
        Planted(torch.hub.load_state_dict_from_url, f"file://{mark}"),
        Planted(torch.load, f"{mark}"),
        Planted(Path.mkdir, mark),
    ]


def tables(bad: Planted) -> list[Any]:
    whole = Metadata({}, planner_data={}, storage_data={})
    inside = Metadata({}, planner_data={"a": bad}, storage_data={})
    return [bad, [bad], {"state_dict_metadata": bad}, inside, (whole, bad)]


def test_a_planted_table_does_not_run(tmp_path: Path) -> None:
    folder, mark = write_folder(tmp_path / "it"), tmp_path / "it ran"
    for bad in planted(mark):
        for table in tables(bad):
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
                (folder / ".metadata").write_bytes(pickle.dumps(table, protocol))
                assert ".metadata is damaged, or was not written by torch" in damage(folder)
                with pytest.raises(OptionError, match="was not written by torch"):
                    consolidate(folder, tmp_path / "all.ckpt")
                assert not mark.exists()
    assert not (tmp_path / "all.ckpt").exists()
    pickle.loads(pickle.dumps(planted(mark)[0]))  # as torch's own reader does
    assert mark.exists()


def test_names_of_the_table_are_stood_in_for() -> None:
    """Nothing of torch's is touched by what a file says of it."""
    loaded = shards._Unpickler(io.BytesIO(b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n.")).load()
    assert loaded is not Metadata
    assert issubclass(loaded, shards._StandIn)


@pytest.mark.parametrize(
    ("pickled", "asks"),
    [(b"cbuiltins\nexec\n.", "builtins.exec"), (b"ctorch\nhub\n.", "torch.hub"), (b"cos\nsystem\n.", "os.system")],
)
def test_the_name_that_is_asked_for_is_told(pickled: bytes, asks: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "it")
    (folder / ".metadata").write_bytes(b"\x80\x02" + pickled)
    assert f"it asks for {asks}, which no checkpoint needs" in damage(folder)


@pytest.mark.parametrize("bits", [31, 40, 62])
def test_no_length_in_the_table_makes_memory(bits: int, tmp_path: Path) -> None:
    """Python's unpickler in C allocates what a byte array, or an index of its memo, claims to need."""
    folder = write_folder(tmp_path / "it")
    for claim in (b"\x96" + (1 << bits).to_bytes(8, "little"), b"Nr" + (1 << min(bits, 31)).to_bytes(4, "little")):
        (folder / ".metadata").write_bytes(b"\x80\x05" + claim + b".")
        assert "was not written by torch" in damage(folder)


def test_a_planted_object_in_a_shard_does_not_run(tmp_path: Path) -> None:
    """torch's reader of folders loads objects without restrictions, so the folder is refused before it sees them."""
    mark = tmp_path / "it ran"
    for number, bad in enumerate(planted(mark)):
        folder = write_folder(tmp_path / f"{number}", planted=bad)
        assert "planted in" in damage(folder)
        assert "torch.serialization.add_safe_globals" in damage(folder)
        with pytest.raises(OptionError, match="holds more than numbers, strings and tensors"):
            consolidate(folder, tmp_path / "all.ckpt")
        assert damage(folder, trusted=True) == ""  # what `fit(weights_only=False)` says
        assert not mark.exists()


def test_a_planted_file_does_not_run(tmp_path: Path) -> None:
    """Verifying a file reads checksums alone; what converts a folder reads the file beside the shards with care."""
    mark, folder = tmp_path / "it ran", write_folder(tmp_path / "it")
    for bad in planted(mark):
        torch.save({"epoch": bad}, folder / shards.METADATA)
        torch.save({"epoch": bad}, tmp_path / "it.ckpt")
        assert damage(tmp_path / "it.ckpt") == ""
        with pytest.raises(OptionError, match=r"meta\.pt holds more than"):
            consolidate(folder, tmp_path / "all.ckpt")
        assert not mark.exists()


def test_a_class_that_the_user_allows_is_read(tmp_path: Path) -> None:
    class Allowed:
        pass

    Allowed.__qualname__ = "Allowed"
    globals()["Allowed"] = Allowed
    folder = write_folder(tmp_path / "it", extra=Allowed())
    assert "Allowed" in damage(folder)
    with torch.serialization.safe_globals([Allowed]):
        assert damage(folder) == ""


def test_what_is_converted_is_what_was_saved(tmp_path: Path) -> None:
    """Tensors, numbers, lists and dicts within one another."""
    more = {"list": [torch.ones(2), {"a": [torch.zeros(1), "text"]}], "none": None, "words": {"epoch 1": (1, 2.5)}}
    consolidate(write_folder(tmp_path / "it", 2.0, **more), tmp_path / "all.ckpt")
    loaded = torch.load(tmp_path / "all.ckpt", weights_only=True)
    expected = {**contents(2.0), **more}
    assert loaded["optimizer_states"][0]["param_groups"] == expected["optimizer_0"]["param_groups"]
    slots = expected["optimizer_0"]["state"]["net.weight"]
    assert all(torch.equal(loaded["optimizer_states"][0]["state"]["net.weight"][name], slots[name]) for name in slots)
    assert loaded["list"][1]["a"][1] == "text"
    assert torch.equal(loaded["list"][0], torch.ones(2))
    assert (loaded["none"], loaded["words"], loaded["epoch"]) == (None, {"epoch 1": (1, 2.5)}, 1)


# ---------------------------------------------------------------------- the source

# What unpickles without restrictions. `torch.load` is allowed with `weights_only=True` in the call.
FORBIDDEN = {"dcp_to_torch_save", "read_metadata", "loads", "load_state_dict_from_url", "unsafe_load"}
ALLOWED = {("shards.py", "_Unpickler"), ("shards.py", "Unpickler")}


def unrestricted(source: str, file: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if name in {"Unpickler", "_Unpickler"} and (file, name) not in ALLOWED:
            found.append(f"{file}: {name}")
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        plain = any(word.arg == "weights_only" and ast.unparse(word.value) == "True" for word in node.keywords)
        of_torch = called in {"torch.load", "pickle.load", "numpy.load", "np.load", "joblib.load", "dill.load"}
        if (of_torch and not plain) or (called.split(".")[-1] in FORBIDDEN and called != "json.loads"):
            found.append(f"{file}:{node.lineno}: {called}")
    return found


def test_nothing_is_unpickled_without_restrictions() -> None:
    """Nowhere in the package."""
    files = [*(ROOT / "lightning_optim").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    assert len(files) > 100
    assert [line for file in files for line in unrestricted(file.read_text(), file.name)] == []


def test_what_would_be_found() -> None:
    for bad in (
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "pickle.loads(x)",
        "import pickle; pickle.load(f)",
    ):
        assert unrestricted(bad, "some.py")
    assert not unrestricted("torch.load(f, weights_only=True)", "some.py")
