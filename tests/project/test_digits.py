"""The example from end to end: the command line, any number of processes, and a resume that changes nothing."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from examples.digits.digits import DigitsClassifier, DigitsData, GlobalBatches
from lightning_optim import OptimizerSpec
from lightning_optim.callbacks import IterateAveraging
from lightning_optim.cli import main
from tests.harness.modules import vector
from tests.harness.ranks import run_ranks
from tests.harness.trainers import trainer

ROOT = Path(__file__).parents[2]
CONFIG = "examples/digits/adan.yaml"

# ---------------------------------------------------------------- the command


def command(folder: Path, *arguments: str) -> str:
    """What the command prints, run as a user runs it: by a script, in a process of its own."""
    script = folder / "lightning-optim"
    script.write_text("from lightning_optim.cli import main\n\nmain()\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    env.pop("TRITON_INTERPRET", None)
    logs = f"--trainer.logger.init_args.save_dir={folder}"
    line = [sys.executable, str(script), "fit", "--config", CONFIG, "--trainer.accelerator=cpu", logs, *arguments]
    done = subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for file in sorted(folder.glob("events.out.tfevents.*")):  # fit writes one, and test after it another
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found[tag] = [(event.step, event.value) for event in events.Scalars(tag)]
    return found


def saved(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The main job with fewer epochs: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("one")
    return folder, command(folder, "--trainer.max_epochs=12")


def test_the_main_job(one_process: tuple[Path, str]) -> None:
    folder, printed = one_process
    assert "Optimizer state of Adan (1 rank)" in printed
    for slot in ("exp_avg", "exp_avg_diff", "exp_avg_sq", "prev_grad", "average"):
        assert re.search(rf"main +│ {slot} +│ float32 │ +9,872 │ +39.49 kB", printed), slot  # weights
        assert re.search(rf"no_decay\S* +│ {slot} +│ float32 │ +154 │ +616 B", printed), slot  # biases and norms
    accuracy = re.search(r"test/accuracy +│ +(0\.\d+)", printed)
    assert accuracy is not None
    assert float(accuracy[1]) >= 0.95  # 0.97 was measured; 0.98 after all 30 epochs

    curves = scalars(folder / "digits" / "version_0")
    assert [step for step, _ in curves["train/loss"]] == list(range(9, 240, 10))
    assert curves["train/loss"][0][1] > 1 > 0.2 > curves["train/loss"][-1][1]
    assert len(curves["val/accuracy"]) == len(curves["val/loss"]) == 12
    assert curves["val/accuracy"][-1][1] >= 0.95
    assert curves["test/accuracy"][-1][1] == pytest.approx(float(accuracy[1]))
    assert {value for _, value in curves["optimizer_state/bytes"]} == {4.0 * (5 * 10026 + 10)}

    last = saved(folder / "digits/version_0/checkpoints/last.ckpt")
    best = saved(folder / "digits/version_0/checkpoints/best.ckpt")
    assert (last["global_step"], last["hyper_parameters"]["optimizer"]) == (240, "adan")
    assert best["global_step"] <= 240
    average = last["callbacks"]["IterateAveraging"]
    assert average["swapped"]
    assert average["counts"] == [4]  # 9, 10, 11 and 12 of 12 epochs


def test_the_main_job_on_two_processes(one_process: tuple[Path, str], tmp_path: Path) -> None:
    """Equal to rounding: float32 sums in another order, which a division by small second moments enlarges."""
    folder, _ = one_process
    printed = command(tmp_path, "--trainer.strategy=ddp", "--trainer.devices=2", "--trainer.max_epochs=2")
    assert printed.count("Optimizer state of Adan (2 ranks)") == 1
    one, two = (scalars(path / "digits/version_0") for path in (folder, tmp_path))
    for epoch in range(2):
        for tag, tolerance in (("val/loss", 1e-3), ("val/accuracy", 1e-6)):
            assert two[tag][epoch][0] == one[tag][epoch][0] == 20 * epoch + 19
            assert two[tag][epoch][1] == pytest.approx(one[tag][epoch][1], rel=tolerance)
    assert two["optimizer_state/bytes_all_ranks"][0][1] == 2 * one["optimizer_state/bytes"][0][1]
    assert saved(tmp_path / "digits/version_0/checkpoints/last.ckpt")["global_step"] == 40


def test_the_commands_of_the_page_are_accepted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = (ROOT / "examples/digits/README.md").read_text()
    lines = re.findall(r"^lightning-optim (fit .*)$", page, re.MULTILINE)
    assert len(lines) == 6
    for line in lines:
        words = [word for word in shlex.split(line) if not word.startswith("logs/")]
        words = [word for word in words if word != "--ckpt_path"]
        with pytest.raises(SystemExit) as caught:
            main([*words, "--print_config"])
        assert caught.value.code == 0
        assert "examples.digits.digits.DigitsClassifier" in capsys.readouterr().out


def test_it_resumes_by_the_command_line(one_process: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = one_process
    checkpoint = folder / "digits/version_0/checkpoints/last.ckpt"
    quiet = ("--trainer.logger=false", "--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
    longer = ("--trainer.max_epochs=13", f"--ckpt_path={checkpoint}", f"--trainer.default_root_dir={tmp_path}")
    main(["fit", "--config", CONFIG, "--trainer.accelerator=cpu", *quiet, *longer])
    again = saved(tmp_path / "checkpoints/last.ckpt")
    assert again["global_step"] == 260
    assert again["callbacks"]["IterateAveraging"]["steps"] == [260]


# ---------------------------------------------------------------- the data


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_share_out_the_same_batches(ranks: int) -> None:
    whole = GlobalBatches(100, 12, 0, 1, seed=3)
    parts = [GlobalBatches(100, 12, rank, ranks, seed=3) for rank in range(ranks)]
    epochs = []
    for epoch in range(2):
        for one in (whole, *parts):
            one.set_epoch(epoch)
        batches = list(whole)
        assert len(batches) == len(whole) == 8  # the 4 samples that are left wait for another epoch
        assert len({i for batch in batches for i in batch}) == 96
        shares = [list(part) for part in parts]
        for i, batch in enumerate(batches):
            assert [share[i] for share in shares] == [batch[rank::ranks] for rank in range(ranks)]
        epochs.append(batches)
    assert epochs[0] != epochs[1]


def test_evaluation_sees_every_image_once_in_order() -> None:
    sampler = GlobalBatches(20, 8, 0, 1, seed=None)
    next(iter(sampler))  # a pass that stops, as that of Lightning's sanity check
    batches = list(sampler)
    assert [i for batch in batches for i in batch] == list(range(20))
    halves = [list(GlobalBatches(20, 8, rank, 2, seed=None)) for rank in range(2)]
    assert sorted(i for half in halves for batch in half for i in batch) == list(range(20))


def test_the_split_is_fixed_and_stratified() -> None:
    data = DigitsData()
    data.setup("fit")
    parts = (data.train, data.val, data.test)
    assert [len(part) for part in parts] == [1297, 200, 300]
    images = torch.cat([part.tensors[0] for part in parts]).reshape(1797, -1)
    pixels, _ = load_digits(return_X_y=True)
    assert torch.equal(images.sum(0), torch.tensor(pixels / 16, dtype=torch.float32).sum(0))  # exact in sixteenths
    assert 0 <= images.min() < images.max() == 1
    for part in parts:
        shares = part.tensors[1].bincount(minlength=10) / len(part)
        assert (shares - 0.1).abs().max() < 0.01
    again = DigitsData()
    again.setup("fit")
    assert torch.equal(again.test.tensors[0], data.test.tensors[0])


# ---------------------------------------------------------------- one process and two


def fresh(spec: OptimizerSpec) -> DigitsClassifier:
    seed_everything(0, verbose=False)
    return DigitsClassifier(spec)


def trained(spec: Any, ranks: int = 1, checkpoint: Path | None = None) -> Tensor:
    """The averaged weights after two short epochs, in float64."""
    module = fresh(spec)
    strategy: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    averaging = IterateAveraging(start=5, every=3)
    saving = [ModelCheckpoint(checkpoint, "{step}", every_n_train_steps=7, save_top_k=-1)] if checkpoint else []
    run = trainer(averaging, *saving, max_epochs=2, limit_train_batches=10, precision="64-true", **strategy)
    run.fit(module, datamodule=DigitsData())
    assert run.global_step == 20
    return vector(module)


@pytest.mark.parametrize("spec", ["adan", "lamb", "adamw", "koala_v"])
def test_two_processes_train_like_one(spec: str) -> None:
    """In float64 the order of sums is all that differs: 1e-15 after 20 steps, and small denominators may enlarge it."""
    one = trained(spec)
    first, second = run_ranks(trained, spec, 2)
    assert torch.equal(first, second)
    assert (one - vector(fresh(spec))).abs().max() > 1e-2
    assert (one - first).abs().max() < 1e-12


def resumed(spec: Any, ranks: int, checkpoint: Path) -> Tensor:
    module = fresh(spec).double()  # Lightning loads weights before it makes them double
    strategy: dict[str, Any] = {"strategy": "ddp", "devices": ranks} if ranks > 1 else {}
    callbacks = (
        IterateAveraging(start=5, every=3),
        ModelCheckpoint(checkpoint.parent / "again", every_n_train_steps=7),
    )
    run = trainer(*callbacks, max_epochs=2, limit_train_batches=10, precision="64-true", **strategy)
    run.fit(module, datamodule=DigitsData(), ckpt_path=checkpoint)
    assert run.global_step == 20
    return vector(module)


def test_a_run_on_two_processes_goes_on_on_one_and_back(tmp_path: Path) -> None:
    whole = run_ranks(trained, "adan", 2, tmp_path / "two")[0]
    alone = trained("adan", 1, tmp_path / "one")
    on_one = resumed("adan", 1, tmp_path / "two" / "step=14.ckpt")
    on_two = run_ranks(resumed, "adan", 2, tmp_path / "one" / "step=14.ckpt")[1]
    for other in (alone, on_one, on_two):
        assert (whole - other).abs().max() < 1e-12


# ---------------------------------------------------------------- resume


class Torchs(DigitsClassifier):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 24)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(module: DigitsClassifier, folder: Path, ckpt_path: Path | None = None) -> tuple[Tensor, dict[str, Any], Any]:
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
    averaging = IterateAveraging(start=5, every=3)
    run = trainer(saving, averaging, max_epochs=3, limit_train_batches=8, val_check_interval=3)
    run.fit(module, datamodule=DigitsData(), ckpt_path=ckpt_path)
    assert run.global_step == 24
    return vector(module), run.optimizers[0].state_dict(), averaging.state_dict()


def same(one: Any, other: Any) -> bool:
    """Whether two states hold the same values, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize(
    "spec",
    [
        "adan",
        {"name": "adan", "schedule": {"name": "cosine", "warmup_steps": 7}},
        {"name": "adan", "state_bits": 8},
        "koala_v",
        "ranger",
        "torch.optim.AdamW",
    ],
    ids=str,
)
def test_a_resumed_run_is_bit_for_bit_the_run(spec: Any, tmp_path: Path) -> None:
    """From the end of an epoch, its beginning and its middle; also from a resumed run's own checkpoint."""

    def module() -> DigitsClassifier:
        seed_everything(0, verbose=False)
        return Torchs() if spec == "torch.optim.AdamW" else DigitsClassifier(spec)

    whole = fit(module(), tmp_path / "whole")
    for step in (8, 9, 13, 16):
        seed_everything(99, verbose=False)  # nothing may depend on the seed of the process that resumes
        again = Torchs() if spec == "torch.optim.AdamW" else DigitsClassifier(spec)
        part = fit(again, tmp_path / f"from{step}", tmp_path / "whole" / f"step={step}.ckpt")
        for what, one, other in zip(("weights", "optimizer", "average"), part, whole, strict=True):
            assert same(one, other), f"{what} after resuming from step {step}"
    twice = fit(module(), tmp_path / "twice", tmp_path / "from13" / "step=20.ckpt")
    assert same(twice, whole)
