"""What is not as it was written is refused in words, whichever bit of which file it is; and what is whole is not."""

from __future__ import annotations

import io
import itertools
import os
import random
import shutil
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.checkpoints import archive, integrity, shards
from lightning_optim.checkpoints.archive import Damaged
from lightning_optim.checkpoints.integrity import damage
from tests.checkpoints.folders import write_folder

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")

FIXTURES = Path(__file__).parent / "files"


def small() -> dict[str, Any]:
    return {"weight": torch.arange(5.0), "codes": torch.arange(9, dtype=torch.uint8), "none": torch.zeros(0), "n": 1}


def saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def wrong_in(data: bytes) -> str:
    try:
        archive.check(io.BytesIO(data), "it")
    except Damaged as error:
        return str(error)
    return ""


def flipped(data: bytes, bits: range | list[int]) -> Iterator[bytes]:
    changed = bytearray(data)
    for bit in bits:
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)
        changed[bit // 8] ^= 1 << bit % 8


def test_each_bit_of_a_file_counts() -> None:
    """Of its records and what stands before and behind them, of the directory and of the end."""
    data = saved(small())
    assert wrong_in(data) == ""
    said = [wrong_in(changed) for changed in flipped(data, range(8 * len(data)))]
    assert "" not in said
    assert all(words.startswith(("it was changed after it was written", "it is truncated")) for words in set(said))


@pytest.mark.parametrize("name", ["torch_1_6.pt", "torch_2_5.pt"])
def test_each_bit_of_a_file_of_an_earlier_torch_counts(name: str) -> None:
    data = (FIXTURES / name).read_bytes()
    assert wrong_in(data) == ""
    assert all(map(wrong_in, flipped(data, range(8 * len(data)))))


def test_each_length_but_its_own_is_refused() -> None:
    data = saved(small())
    assert wrong_in(b"") == "it is empty."
    assert all(wrong_in(data[:length]) for length in range(len(data)))
    for longer in (data + b"\0", data + b"\0" * 98, data + data, b"\0" + data, data + data[-98:], data[-98:] + data):
        assert wrong_in(longer)
    other = saved({"weight": torch.zeros(3)})
    assert wrong_in(data + other)
    assert wrong_in(other + data)


def test_a_bit_that_makes_torch_read_memory_that_nobody_wrote(tmp_path: Path) -> None:
    """What `zipfile` finds nothing wrong with: the attribute that makes a record a folder."""
    path = tmp_path / "it.pt"
    torch.save(small(), path)
    data = path.read_bytes()
    entry = data.find(b"PK\1\2", data.find(b"data/0", zipfile.ZipFile(path).start_dir) - 46)
    path.write_bytes(next(flipped(data, [8 * (entry + 38) + 4])))
    assert zipfile.ZipFile(path).testzip() is None
    assert damage(path) == f"{path} was changed after it was written: its directory is not as torch.save writes it."


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"empty": torch.zeros(0)},
        {str(number): torch.zeros(1) for number in range(300)},
        {"views": torch.zeros(1000)[::7], "sparse": torch.eye(3).to_sparse()},
        torch.nn.Linear(3, 2).state_dict(),
        "a string",
    ],
)
def test_whole_files_pass(content: object, tmp_path: Path) -> None:
    path = tmp_path / "a name with ümlauts.ckpt"
    torch.save(content, path)
    assert damage(path) == ""
    assert wrong_in(saved(content)) == ""
    torch.save(content, path, _use_new_zipfile_serialization=False)  # before torch 1.6: no checksums
    assert damage(path) == ""


@pytest.mark.full
def test_a_file_of_more_than_4_gib_passes(tmp_path: Path) -> None:
    """Sizes and places of more than 32 bits stand in second fields."""
    path = tmp_path / "it.ckpt"
    torch.save({"large": torch.zeros((1 << 32) + 1000, dtype=torch.uint8), "behind": torch.ones(3)}, path)
    assert damage(path) == ""
    os.truncate(path, path.stat().st_size - 1)
    assert "is truncated" in damage(path)
    path.unlink()


def test_a_file_without_checksums_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `torch.serialization.set_crc32_options(False)` writes it. Its directory is verified all the same."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        data = saved(small())
    finally:
        torch.serialization.set_crc32_options(before)
    assert wrong_in(data) == ""
    start = zipfile.ZipFile(io.BytesIO(data)).start_dir
    assert all(map(wrong_in, flipped(data, range(8 * start, 8 * len(data)))))


def test_a_torch_that_writes_another_form_is_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later torch may do; checksums are compared then, and no whole file is refused."""
    monkeypatch.setattr(archive, "_NEEDED", 20)
    archive._form_is_known.cache_clear()
    try:
        data = saved(small())
        assert wrong_in(data) == ""
        place = data.find(torch.arange(5.0).numpy().tobytes())
        assert "checksum of archive/data/0 does not match" in wrong_in(next(flipped(data, [8 * place + 100])))
        assert "is truncated" in wrong_in(data[:-1])
    finally:
        archive._form_is_known.cache_clear()


@pytest.mark.parametrize("content", [b"", b"\x80\x04K\x01.", b"PK", b"GIF89a", b"\0" * 1000, b"PK\5\6" + b"\0" * 18])
def test_what_is_no_checkpoint_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "it.ckpt"
    path.write_bytes(content)
    assert damage(path).startswith(f"{path} ")
    assert "cannot be read" in damage(tmp_path / "nothing.ckpt")


def test_a_file_that_is_replaced_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process puts a damaged one in its place as soon as the first has been read."""
    path, other = tmp_path / "it.ckpt", tmp_path / "other.ckpt"
    torch.save(small(), path)
    check = archive.check

    def check_and_replace(*args: Any) -> None:
        check(*args)
        other.write_bytes(path.read_bytes()[:-1])
        os.replace(other, path)

    monkeypatch.setattr(archive, "check", check_and_replace)
    assert "is truncated" in damage(path)


def test_a_file_that_never_rests_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "it.ckpt"
    torch.save(small(), path)
    sizes = itertools.count(1)
    monkeypatch.setattr(archive, "check", lambda *_: os.utime(path, ns=(0, next(sizes))))
    assert damage(path) == f"{path} is being written: it changed while it was read."


# ---------------------------------------------------------------------- a folder of shards


def test_each_bit_of_a_folder_counts_or_changes_nothing(tmp_path: Path) -> None:
    """Of its table a sample, for time's sake. What passes is read as before: deprecated properties, hints, an id."""
    folder = write_folder(tmp_path / "it")
    assert damage(folder) == ""
    entries, pick = shards.read(folder), random.Random(0)
    for file in sorted(folder.iterdir()):
        data = file.read_bytes()
        for bit, changed in zip(bits := pick.sample(range(8 * len(data)), 250), flipped(data, bits), strict=True):
            file.write_bytes(changed)
            wrong = damage(folder)
            assert wrong or (file.name == ".metadata" and shards.read(folder) == entries), (file, bit)
        file.write_bytes(data)
    assert damage(folder) == ""


HARM: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "empty": lambda file: file.write_bytes(b""),
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "longer": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "a folder": lambda file: [do(file) for do in (Path.unlink, Path.mkdir)],
}


@pytest.mark.parametrize("harm", HARM)
def test_each_file_of_a_folder_counts(harm: str, tmp_path: Path) -> None:
    whole = write_folder(tmp_path / "whole")
    for name in [file.name for file in whole.iterdir()]:
        folder = shutil.copytree(whole, tmp_path / name)
        HARM[harm](folder / name)
        assert name in damage(folder), name


def test_what_the_table_does_not_name_is_not_read(tmp_path: Path) -> None:
    """Such as a shard of an earlier save on more ranks, or what a file manager leaves."""
    folder = write_folder(tmp_path / "it")
    (folder / "__7_0.distcp").write_bytes(b"of another save")
    (folder / ".DS_Store").touch()
    assert damage(folder) == ""


def test_shards_of_another_save_do_not_fit(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "it")
    other = write_folder(tmp_path / "other", more=torch.zeros(3))
    shutil.copy(other / "__0_0.distcp", folder)
    assert "longer than it was written" in damage(folder)
    assert integrity.damage(other) == ""
