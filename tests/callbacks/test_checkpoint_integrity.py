"""What Lightning does with checkpoints goes on under `CheckpointIntegrity`, and a save that fails costs nothing."""

from __future__ import annotations

import os
import resource
import signal
import warnings
from pathlib import Path
from typing import Any

import fsspec  # type: ignore[import-untyped]
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_optim.callbacks import CheckpointIntegrity
from lightning_optim.checkpoints.integrity import damage, partial, replacing
from tests.harness.data import batches, seeded_samples
from tests.harness.kills import kill_at
from tests.harness.modules import Made
from tests.harness.nets import seeded_net
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.strategies import Kind, rank, strategy_of
from tests.harness.trainers import trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Be aware that when using `ckpt_path`:UserWarning", "ignore:torch.distributed is (disabled|un):UserWarning"
)
EPOCH = 2  # steps


class Count(Callback):
    """The step at which training begins."""

    began = -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.began = trainer.global_step


def fit(*callbacks: Callback, epochs: int = 2, kind: Kind = "single", resume: Any = None, **options: Any) -> int:
    """The step at which training began."""
    count = Count()
    module = Made(lambda params: torch.optim.AdamW(params, lr=1e-2), seeded_net)
    fitting = trainer(
        count, CheckpointIntegrity(), *callbacks, max_epochs=epochs, strategy=strategy_of(kind), **options
    )
    fitting.fit(module, DataLoader(seeded_samples(EPOCH * 8, seed=rank()), batch_size=8), ckpt_path=resume)
    return count.began


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if "partial" in name or "exchange" in name]


@pytest.mark.parametrize("save_last", [True, "link"])
def test_best_and_last_checkpoints(save_last: Any, tmp_path: Path) -> None:
    """The best two of three, and the last, which may be a link to one of them."""
    saving = ModelCheckpoint(tmp_path, "{epoch}", monitor="epoch", mode="max", save_top_k=2, save_last=save_last)
    fit(saving, epochs=3)
    assert sorted(os.listdir(tmp_path)) == ["epoch=1.ckpt", "epoch=2.ckpt", "last.ckpt"]
    assert (tmp_path / "last.ckpt").is_symlink() == (save_last == "link")
    assert all(damage(tmp_path / name) == "" for name in os.listdir(tmp_path))
    assert fit(ModelCheckpoint(tmp_path, save_last=save_last), epochs=4, resume="last") == 3 * EPOCH


def test_weights_alone(tmp_path: Path) -> None:
    fit(ModelCheckpoint(tmp_path, "it", save_weights_only=True))
    assert damage(tmp_path / "it.ckpt") == ""
    with pytest.raises(KeyError, match="only the model"):  # Lightning's own sentence
        fit(resume=tmp_path / "it.ckpt", epochs=3)


def test_paths_with_a_protocol_are_left_to_lightning() -> None:
    files = fsspec.filesystem("memory")
    fit(ModelCheckpoint("memory://runs", "it"))
    assert [entry["name"] for entry in files.ls("/runs")] == ["/runs/it.ckpt"]
    assert fit(epochs=3, resume="memory://runs/it.ckpt") == 2 * EPOCH
    files.rm("/runs", recursive=True)


def fit_on_a_full_disk(folder: Path) -> str:
    """Files may grow to 100 bytes from the second epoch on."""

    class Starves(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            if trainer.current_epoch == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))

    try:
        fit(ModelCheckpoint(folder, "last", enable_version_counter=False), Starves())
    except (OSError, RuntimeError) as error:  # torch's archive writer raises the second
        return f"{error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return ""


def test_a_full_disk_costs_the_new_checkpoint_alone(tmp_path: Path) -> None:
    (said,) = run_ranks(fit_on_a_full_disk, tmp_path, world_size=1)
    assert "File too large" in said
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert fit(ModelCheckpoint(tmp_path), resume="last") == EPOCH


def test_what_a_killed_run_left_is_cleared_away(tmp_path: Path) -> None:
    """A torn file under a name that is never written again."""
    torn = partial(tmp_path / "epoch=7.ckpt")
    torn.parent.mkdir()
    torn.write_bytes(b"PK")
    (torn.parent / "a folder.ckpt").mkdir()
    fit(ModelCheckpoint(tmp_path, "it"))
    assert os.listdir(tmp_path) == ["it.ckpt"]


@pytest.mark.parametrize("torn", [False, True])
def test_what_an_earlier_version_left_is_recovered(torn: bool, tmp_path: Path) -> None:
    """Both folders were hidden between its renames, where Lightning does not look: so the run says so."""
    from tests.checkpoints.folders import write_folder

    path = tmp_path / "last.ckpt"
    new, old = write_folder(partial(path), 2), write_folder(partial(path).with_name("last.ckpt.replaced"), 1)
    if torn:
        (new / "__0_0.distcp").unlink()
    with pytest.warns(UserWarning, match=r"last\.ckpt was being replaced when an earlier process was killed"):
        fit(ModelCheckpoint(tmp_path, "other"))
    assert torch.load(path / "meta.pt", weights_only=True)["global_step"] == (1 if torn else 2)
    assert not old.exists()
    assert not hidden(tmp_path)


class DiesInItsSecondSave(Callback):
    """Rank 0 is killed before the n-th rename of its second save."""

    def __init__(self, number: int, folder: Path) -> None:
        self.number, self.folder, self.saves = number, folder, 0

    def state_dict(self) -> dict[str, Any]:
        self.saves += 1
        if self.saves == 2 and rank() == 0:
            kill_at(self.number, self.folder, ("os.rename",))
        return {}


def die_in_a_save(kind: Kind, folder: Path, number: int) -> None:
    saving = ModelCheckpoint(folder, "last", enable_version_counter=False)
    fit(DiesInItsSecondSave(number, folder), saving, kind=kind)


def resume_last(kind: Kind, folder: Path) -> int:
    return fit(ModelCheckpoint(folder, "last", enable_version_counter=False), epochs=3, kind=kind, resume="last")


@pytest.mark.parametrize(
    ("kind", "number", "steps"),
    [
        pytest.param("fsdp2 sharded", 1, EPOCH, marks=pytest.mark.full),  # torch's own, inside of the folder
        pytest.param("fsdp2 sharded", 2, EPOCH, marks=pytest.mark.full),
        pytest.param("fsdp2 sharded", 3, 2 * EPOCH, marks=pytest.mark.full),
        ("fsdp2 sharded", 4, 2 * EPOCH),
        pytest.param("ddp", 1, EPOCH, marks=pytest.mark.full),
    ],
)
def test_last_goes_on_from_the_newest_whole_checkpoint(kind: Kind, number: int, steps: int, tmp_path: Path) -> None:
    """The new folder gets a name beside the old one; the old one leaves; the new one takes its place."""
    with pytest.raises(RankFailure, match="rank 0: killed by SIGKILL"):
        run_ranks(die_in_a_save, kind, tmp_path, number)
    assert set(run_ranks(resume_last, kind, tmp_path)) == {steps}
    assert damage(tmp_path / "last.ckpt") == ""
    assert not hidden(tmp_path)


def save_often(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Another process is saving")
        for number in range(10):
            with replacing(folder / "last.ckpt") as written:
                torch.save({"global_step": number, "weight": torch.full((1000,), float(rank()))}, written)


def test_processes_that_save_to_one_folder_wait_for_each_other(tmp_path: Path) -> None:
    run_ranks(save_often, tmp_path, world_size=4)
    assert os.listdir(tmp_path) == ["last.ckpt"]
    assert damage(tmp_path / "last.ckpt") == ""
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 9


def test_a_load_between_batches_is_not_undone_later(tmp_path: Path) -> None:
    """As a finder of learning rates does it. An exception afterwards must not bring back older weights."""
    seen = []

    class Finds(Callback):
        def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            trainer.save_checkpoint(tmp_path / "finder.ckpt")
            trainer.strategy.load_checkpoint(tmp_path / "finder.ckpt")

        def on_train_batch_end(
            self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            seen.append(next(pl_module.parameters()).detach().clone())
            if len(seen) == 2:
                raise ValueError("stop")

    module = Made(lambda params: torch.optim.SGD(params, lr=1e-2))
    fitting = trainer(CheckpointIntegrity(), Finds(), max_epochs=1)
    with pytest.raises(ValueError, match="stop"):
        fitting.fit(module, batches())
    assert torch.equal(next(module.parameters()), seen[-1])
