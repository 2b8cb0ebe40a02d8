"""At each moment at which a process may die, the newest whole checkpoint has a name that `ckpt_path="last"` finds.

Every call that touches the disk is such a moment. An audit hook kills the process before the n-th of them, for each n.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn

from lightning_optim.checkpoints.consolidate import consolidate
from lightning_optim.checkpoints.integrity import damage, recover, replacing, tidy
from lightning_optim.errors import OptionError
from tests.checkpoints.folders import write_folder
from tests.harness.kills import EVENTS, kill_at
from tests.harness.ranks import run_ranks
from tests.harness.trainers import QUIET

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def write(path: Path, value: int, folder: bool) -> None:
    if folder:
        write_folder(path, value)
    else:
        torch.save({"global_step": value}, path)


def save(path: Path, value: int, folder: bool) -> None:
    with replacing(path) as written:
        write(written, value, folder)


def value_of(path: Path) -> int:
    assert damage(path) == ""
    found = torch.load(path / "meta.pt" if path.is_dir() else path, weights_only=True)
    return int(found["global_step"])


@functools.cache
def looking() -> tuple[Trainer, ModelCheckpoint]:
    saving = ModelCheckpoint()
    return Trainer(callbacks=[saving], **QUIET), saving


def last(folder: Path) -> Path | None:
    """What Lightning takes for `ckpt_path="last"`, by its own code, before a callback of ours has run."""
    fitting, saving = looking()
    fitting.state.fn, saving.dirpath = TrainerFn.FITTING, f"{folder}"
    found = fitting._checkpoint_connector._parse_ckpt_path(TrainerFn.FITTING, "last", True, True)
    return None if found is None else Path(found)


def killed_at(number: int, act: Callable[[], object], under: Path, events: tuple[str, ...] = EVENTS) -> bool:
    """Whether a process that does something is killed before its n-th call that opens or changes something there."""
    child = os.fork()
    if child == 0:
        kill_at(number, under, events)
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def names(folder: Path) -> frozenset[str]:
    return frozenset(str(path.relative_to(folder)) for path in folder.rglob("*"))


def act_out(before: Path, as_folder: bool, every_repair: bool) -> list[int]:
    """Kill a save at each moment, and what puts that right at each moment too. The values that "last" finds.

    Runs in a process that has one thread, so that it may fork.
    """
    under, again, values, seen = before.with_name("now"), before.with_name("again"), [], set()
    save(before / "last.ckpt", 1, as_folder)
    save(before / "best.ckpt", 7, as_folder)
    killed, number = True, 0
    while killed:
        number += 1
        shutil.rmtree(under, ignore_errors=True)
        shutil.copytree(before, under)
        killed = killed_at(number, lambda: save(under / "last.ckpt", 2, as_folder), under)
        found = last(under)
        assert found is not None, number
        values.append(value_of(found))
        kinds = names(under), values[-1]
        if kinds in seen:  # what is left is as it was after another moment
            continue
        seen.add(kinds)
        repairs = [
            lambda: tidy(again),
            lambda: recover(again / "last.ckpt"),
            lambda: save(again / "a.ckpt", 3, as_folder),
        ]
        for repair in repairs if every_repair else repairs[:1]:
            moment, interrupted = 0, True
            while interrupted:
                moment += 1
                shutil.rmtree(again, ignore_errors=True)
                shutil.copytree(under, again)
                interrupted = killed_at(moment, repair, again)
                found = last(again)
                assert found is not None, (number, moment)
                assert value_of(found) == values[-1], (number, moment)
                assert value_of(recover(found)) == values[-1], (number, moment)
                tidy(again)
                assert names(again) >= {"last.ckpt", "best.ckpt"}, (number, moment)
                assert not any("partial" in name or "exchange" in name for name in names(again)), (number, moment)
                assert (value_of(again / "last.ckpt"), value_of(again / "best.ckpt")) == (values[-1], 7)
    return values


@pytest.mark.parametrize("every_repair", [False, pytest.param(True, marks=pytest.mark.full)], ids=["", "all"])
@pytest.mark.parametrize("as_folder", [False, True], ids=["file", "folder"])
def test_last_finds_the_newest_whole_checkpoint_whenever_a_save_is_killed(
    as_folder: bool, every_repair: bool, tmp_path: Path
) -> None:
    """And nothing else that was whole is lost; a second kill, while the first is put right, changes nothing."""
    (values,) = run_ranks(act_out, tmp_path / "before", as_folder, every_repair, world_size=1, timeout=250)
    assert values == sorted(values)
    assert set(values) == {1, 2}
    assert len(values) >= 8


def test_a_name_may_be_as_long_as_the_file_system_takes(tmp_path: Path) -> None:
    path = tmp_path / f"{'a' * 250}.ckpt"
    for value in (1, 2):
        save(path, value, folder=False)
        assert value_of(recover(path)) == value


@pytest.mark.parametrize("folder", [False, True])
def test_a_folder_that_is_no_checkpoint_is_not_replaced(folder: bool, tmp_path: Path) -> None:
    """In a fit, `save_checkpoint("runs")` must not take away the runs. What looks like a checkpoint goes."""
    runs = tmp_path / "runs"
    save(runs / "last.ckpt", 1, folder)
    with pytest.raises(OptionError, match=r"runs is a folder that is no checkpoint, and is not written over"):
        save(runs, 2, folder)
    write_folder(tmp_path / "source")
    with pytest.raises(OptionError, match=r"runs is a folder, and is not written over"):
        consolidate(tmp_path / "source", runs)
    assert value_of(runs / "last.ckpt") == 1
    assert sorted(os.listdir(tmp_path)) == ["runs", "source"]
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "__0_0.distcp").touch()  # a save that was killed
    (tmp_path / "empty").mkdir()
    for name in ("torn", "empty", "source"):
        save(tmp_path / name, 3, folder)
        assert value_of(tmp_path / name) == 3
