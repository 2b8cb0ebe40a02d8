"""The memory report against bytes counted by hand, its tables and file, and what TensorBoard has of it."""

from __future__ import annotations

import csv
import re
import sys
from contextlib import redirect_stdout
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader

from lightning_optim import OptimizerStrategy, create_optimizer
from lightning_optim.callbacks import IterateAveraging, LookaheadSync, LossInput, OptimizerStateMemory
from lightning_optim.reports.memory import human, predicted_memory, state_memory
from tests.harness.data import seeded_samples
from tests.harness.memory import by_hand, by_walk, ours
from tests.harness.modules import Configured, Made, Make, Toy
from tests.harness.nets import seeded_net
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import Run, trainer

VALUES = 4 * 6 + 6 + 6 * 2 + 2  # of the toy's two layers
TENSORS = 4


class Before(Callback):
    """What the report would say before the first step, and after the last."""

    predicted: list[Any]
    actual: list[Any]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.predicted = predicted_memory(trainer.optimizers[0])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.actual = state_memory(trainer.optimizers[0])


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (ours("adan"), 4 * VALUES * 4 + TENSORS * 4),
        (ours("adamw"), 2 * VALUES * 4 + TENSORS * 4),
        (ours({"name": "adamw", "amsgrad": True}), 3 * VALUES * 4 + TENSORS * 4),
        (ours({"name": "adan", "state_bits": 16}), 3 * VALUES * 2 + VALUES * 4 + TENSORS * 4),
        (ours({"name": "sgdw", "momentum": 0.0}), TENSORS * 4),
        (ours("koala_v"), TENSORS * 4 + 2 * 8),  # P and R, once for all parameters
        (lambda params: torch.optim.AdamW(params), 2 * VALUES * 4 + TENSORS * 4),
        (lambda params: torch.optim.SGD(params, 0.1, momentum=0.9), VALUES * 4),
        (lambda params: torch.optim.RMSprop(params, centered=True), 2 * VALUES * 4 + TENSORS * 4),
        (lambda params: torch.optim.SGD(params, 0.1), 0),
    ],
)
@pytest.mark.parametrize("extra", [(), ("average",), ("average", "slow")])
def test_what_is_predicted_is_what_comes(make: Make, expected: int, extra: tuple[str, ...]) -> None:
    stages = {"average": IterateAveraging("ema"), "slow": LookaheadSync()}
    before = Before()
    run = Run(make, *(stages[name] for name in extra), LossInput(), before, max_epochs=1)
    optimizer = run.trainer.optimizers[0]
    actual = before.actual
    expected += len(extra) * VALUES * 4
    assert sum(entry.bytes for entry in actual) == expected == by_hand(optimizer)
    assert sorted(before.predicted, key=str) == sorted(actual, key=str)
    assert {entry.slot for entry in actual if entry.kind == "stage"} == set(extra)


@pytest.mark.parametrize("name", ["adafactor", "adan"])
def test_predictions_for_factors_and_codes(name: str) -> None:
    """Slots without an axis, and state in 8 bits where the package has it."""
    options = [{"name": name, "lr": 0.01}]
    if 8 in getattr(create_optimizer(name, nn.Linear(2, 2)).options["state_bits"].type, "__args__", ()):
        options.append({"name": name, "lr": 0.01, "state_bits": 8})
    for spec in options:
        before = Before()
        run = Run(ours(spec), before, max_epochs=1, net=lambda: nn.Sequential(nn.Linear(4, 4096), nn.Linear(4096, 2)))
        actual = state_memory(run.trainer.optimizers[0])
        assert sum(entry.bytes for entry in actual) > 0
        assert sorted(before.predicted, key=str) == sorted(actual, key=str)


def test_the_table_and_the_scalars(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    Run(ours("adan"), OptimizerStateMemory(), logger=logger, log_every_n_steps=1)
    table = capsys.readouterr().out
    assert table.count("Optimizer state of Adan (1 rank)") == 1
    for slot in ("step", "exp_avg", "exp_avg_diff", "exp_avg_sq", "prev_grad"):
        assert re.search(rf"\b{slot} ", table), f"{slot} is missing in\n{table}"
    total = next(line for line in table.splitlines() if "total" in line)
    assert re.findall(r"[\d.,]+", total)[:2] == [f"{4 * VALUES + TENSORS}", f"{16 * VALUES + 4 * TENSORS}"]
    scalars = logged(tmp_path)
    size = float(16 * VALUES + 4 * TENSORS)
    assert scalars["optimizer_state/bytes"] == [(1, size), (4, size), (8, size), (12, size)]
    assert scalars["optimizer_state/bytes_all_ranks"][-1] == (12, size)
    assert scalars["optimizer_state/bytes_in_32_bits"][-1] == (12, size)
    assert sum(tag.startswith("optimizer_state/") for tag in scalars) == 3


def test_16_bits_are_told_apart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    report = OptimizerStateMemory(table=False, csv=tmp_path / "memory.csv")
    Run(ours({"name": "adan", "state_bits": 16}), report, logger=logger, log_every_n_steps=1)
    rows = [row for row in rows_of(tmp_path / "memory.csv") if row["when"] == "actual"]
    assert sum(int(row["bytes"]) for row in rows if row["type"] == "bfloat16") == 3 * VALUES * 2
    previous = [int(row["bytes"]) for row in rows if row["slot"] == "prev_grad"]
    assert sum(previous) == VALUES * 4  # a previous gradient stays exact
    scalars = {tag: values[-1][1] for tag, values in logged(tmp_path).items()}
    assert scalars["optimizer_state/bytes"] == 3 * VALUES * 2 + VALUES * 4 + TENSORS * 4
    assert scalars["optimizer_state/bytes_in_32_bits"] == 4 * VALUES * 4 + TENSORS * 4


def test_both_parts_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    Run(ours("adan"), OptimizerStateMemory(table=False, log=False), logger=logger, log_every_n_steps=1)
    assert "Optimizer state" not in capsys.readouterr().out
    assert not any(tag.startswith("optimizer_state/") for tag in logged(tmp_path))


class Shy(torch.optim.SGD):
    """Cannot be asked before its first step."""

    def step(self, closure: Any = None) -> Any:
        if any(p.is_meta for group in self.param_groups for p in group["params"]):
            raise NotImplementedError("no meta tensors")
        return super().step(closure)


def test_an_optimizer_that_cannot_be_asked_gets_its_table_after_a_step(
    capsys: pytest.CaptureFixture[str],
) -> None:
    Run(lambda params: Shy(params, 0.1, momentum=0.9), OptimizerStateMemory(), max_epochs=1)
    table = capsys.readouterr().out
    assert table.count("Optimizer state of Shy (1 rank)") == 1
    assert f"{4 * VALUES} B" in table


def on_ranks(folder: str, torchs: bool) -> str:
    make: Make = (lambda params: torch.optim.AdamW(params)) if torchs else ours("adamw")
    logger = TensorBoardLogger(folder, name="", version="")
    with redirect_stdout(StringIO()) as printed:
        Run(make, OptimizerStateMemory(), logger=logger, log_every_n_steps=1, strategy="ddp", devices=2)
    return printed.getvalue()


@pytest.mark.parametrize("torchs", [False, True])
def test_two_processes_report_their_sum(torchs: bool, tmp_path: Path) -> None:
    table, silence = run_ranks(on_ranks, str(tmp_path), torchs)
    size = 2 * VALUES * 4 + TENSORS * 4
    scalars = {tag: values[-1][1] for tag, values in logged(tmp_path).items()}
    assert scalars["optimizer_state/bytes"] == size
    assert scalars["optimizer_state/bytes_all_ranks"] == 2 * size
    assert "Optimizer state" not in silence
    assert table.count("Optimizer state of AdamW (2 ranks)") == 1
    assert f"{size} B" in table
    assert f"{2 * size} B" in table


# ---------------------------------------------------------------- layers, picture and file


def wide() -> nn.Sequential:
    """Twelve layers with biases, the last the largest, and one that is frozen."""
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in range(11)), nn.Linear(4, 4), nn.Linear(4, 2000), nn.Linear(2000, 2))
    net[0].requires_grad_(False)
    return net


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_layers_file_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    path = tmp_path / "new" / "memory.csv"
    logger = TensorBoardLogger(tmp_path, name="", version="")

    def make(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        moving = [p for p in params if p.requires_grad]
        return create_optimizer({"name": "adamw", "state_bits": 8, "lr": 0.01}, moving)

    run = Run(
        make, IterateAveraging("ema"), OptimizerStateMemory(csv=str(path)), logger=logger, log_every_n_steps=1, net=wide
    )
    optimizer = run.trainer.optimizers[0]
    printed = capsys.readouterr().out
    assert "Largest in state" in printed
    assert len(re.findall(r"│ net\.\d+ ", printed)) == 10
    assert printed.index("net.12 ") < printed.index("net.13 ") < printed.index("net.1 ")
    size = by_walk(optimizer)
    assert re.search(
        rf"State of AdamW after the first step: {size / 1e3:.2f} kB \({size / 1e3:.2f} kB predicted\)", printed
    )
    for word in ("parameters", "gradients", "state", "averages and the like"):
        assert f"│ {word}" in printed

    rows = rows_of(path)
    actual = [row for row in rows if row["when"] == "actual"]
    assert sum(int(row["bytes"]) for row in actual if row["kind"] in ("state", "stage")) == size
    predicted = [row for row in rows if row["when"] == "predicted"]
    assert [{**row, "when": ""} for row in actual] == [{**row, "when": ""} for row in predicted]
    weight = {row["slot"]: row for row in actual if row["parameter"] == "net.12.weight"}
    assert weight["exp_avg"]["type"] == "8 bits (ratio)"
    assert int(weight["exp_avg_sq"]["bytes"]) == 8192 + 2 * 4 * 32  # 8000 values in blocks of 256, two numbers for each
    assert int(weight["exp_avg_sq"]["bytes_in_32_bits"]) == 32_000
    assert weight["average"]["kind"] == "stage"
    assert weight["parameter"]["bytes"] == weight["gradient"]["bytes"] == "32000"
    assert weight["gradient"]["layer"] == "net.12"
    assert [row["kind"] for row in actual if row["layer"] == "net.0"] == ["parameter"] * 2  # it is frozen

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    images = events.Images("optimizer_state/bars")
    assert [image.step for image in images] == [1]  # nothing changed after it
    assert len(Image.open(BytesIO(images[0].encoded_image_string)).convert("RGB").getcolors(1 << 24) or ()) > 10
    scalars = {tag: values[-1][1] for tag, values in logged(tmp_path).items()}
    assert scalars["optimizer_state/bytes"] == size
    gradients = sum(int(row["bytes"]) for row in actual if row["kind"] == "gradient")
    assert gradients == 4 * sum(p.numel() for p in optimizer.param_groups[0]["params"])


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    Run(ours("adan"), OptimizerStateMemory(table=False), logger=logger, log_every_n_steps=1, max_epochs=1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert events.Tags()["images"] == []
    assert "optimizer_state/bytes" in events.Tags()["scalars"]


class Pair(Toy):
    """Two optimizers, one of ours and one of torch's, by hand."""

    def __init__(self) -> None:
        super().__init__(ours("adan"))
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        first, second = self.net[0], self.net[2]  # type: ignore[index]
        return [create_optimizer("adan", first), torch.optim.Adam(second.parameters())]

    def training_step(self, batch: Any, index: int) -> Any:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():  # type: ignore[union-attr]
            optimizer.step()
            optimizer.zero_grad()


def test_several_optimizers_by_hand(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    report = OptimizerStateMemory(csv=str(tmp_path / "memory.csv"))
    run = Run(ours("adan"), report, module=Pair(), logger=logger, log_every_n_steps=1)
    scalars = {tag: values[-1][1] for tag, values in logged(tmp_path).items()}
    sizes = [by_walk(optimizer) for optimizer in run.trainer.optimizers]
    assert [scalars[f"optimizer_state/{i}/bytes"] for i in (0, 1)] == sizes == [4 * 30 * 4 + 8, 2 * 14 * 4 + 8]
    assert {row["optimizer"] for row in rows_of(tmp_path / "memory.csv")} == {"0", "1"}


class Late(Pair):
    """Two of one class; the second, which is smaller, takes its first step in the third batch."""

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(self.net[i].parameters()) for i in (0, 2)]  # type: ignore[index]

    def training_step(self, batch: Any, index: int) -> Any:
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers()[: 1 if index < 2 else 2]:  # type: ignore[index]
            optimizer.step()
            optimizer.zero_grad()


def test_each_optimizer_is_reported_after_its_own_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    Run(ours("adan"), OptimizerStateMemory(), module=Late(), logger=logger, log_every_n_steps=1, max_epochs=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if "after the first" in line]
    sizes = [2 * 30 * 4 + 2 * 4, 2 * 14 * 4 + 2 * 4]  # two moments, and two counters
    assert lines == [f"State of Adam after the first step: {size} B ({size} B predicted)" for size in sizes]
    assert [step for step, _ in logged(tmp_path)["optimizer_state/1/bytes"]] == [1, 4, 6]  # steps of both


class Skipping(Toy):
    """Its first batch moves nothing."""

    def __init__(self, make: Any, overflow: bool) -> None:
        super().__init__(make)
        self.overflow = overflow

    def training_step(self, batch: Any, index: int) -> Any:
        loss = super().training_step(batch, index)
        first = loss * torch.inf if self.overflow else None
        return first if len(self.losses) == 1 else loss


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`", "ignore:Detected call of")
@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("make", [ours("adamw"), lambda params: torch.optim.AdamW(params)])
def test_a_step_that_moves_nothing_is_not_the_first(
    make: Any, overflow: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scaler = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]
    logger = TensorBoardLogger(tmp_path, name="", version="")
    options: dict[str, Any] = {"logger": logger, "log_every_n_steps": 1, "plugins": scaler if overflow else []}
    run = Run(make, OptimizerStateMemory(), module=Skipping(make, overflow), **options)
    size = by_walk(run.trainer.optimizers[0])
    assert f"after the first step: {size} B ({size} B predicted)" in capsys.readouterr().out
    assert logged(tmp_path)["optimizer_state/bytes"] == [(step, size) for step in (2, 4, 8, 12)]


def test_fast_dev_run_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(ours("adan"), OptimizerStateMemory(), fast_dev_run=True)
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_top_k=-1)
    straight = Run(ours("adan"), OptimizerStateMemory(), saving)
    again = OptimizerStateMemory(csv=str(tmp_path / "memory.csv"))
    saving = ModelCheckpoint(tmp_path / "again", "{step}", every_n_train_steps=4, save_top_k=-1)
    rest = Run(ours("adan"), again, saving, ckpt_path=tmp_path / "step=4.ckpt")
    assert rest.module.losses == straight.module.losses[4:]
    assert capsys.readouterr().out.count("after the first step") == 3
    sizes = {"predicted": 0, "actual": 0}
    for row in rows_of(tmp_path / "memory.csv"):
        sizes[row["when"]] += int(row["bytes"]) if row["kind"] == "state" else 0
    assert sizes["predicted"] == sizes["actual"] == by_walk(rest.trainer.optimizers[0])


def sharded(kind: Kind, name: str, folder: str) -> tuple[int, str]:
    """The bytes of this rank's state by the walk, and what it printed."""
    module: Any = Made(lambda params: torch.optim.AdamW(params, lr=0.01), seeded_net)
    if name != "torch":
        module = Configured(OptimizerStrategy(name, lr=0.01), seeded_net)
    fit = trainer(
        IterateAveraging("ema"),
        OptimizerStateMemory(csv=f"{folder}/memory.csv"),
        strategy=strategy_of(kind),
        logger=TensorBoardLogger(folder, name="", version=""),
        log_every_n_steps=1,
        max_epochs=1,
    )
    with redirect_stdout(StringIO()) as printed:
        fit.fit(module, DataLoader(seeded_samples(scale=1.0), batch_size=8))
    return by_walk(fit.optimizers[0]), printed.getvalue()


@pytest.mark.parametrize("name", ["torch", "adan"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp1 full", "fsdp2 full"])
def test_every_rank_is_counted(kind: Kind, name: str, tmp_path: Path) -> None:
    (first, printed), (second, silence) = run_ranks(sharded, kind, name, str(tmp_path))
    assert silence == ""
    assert "(2 ranks)" in printed
    rows = [row for row in rows_of(tmp_path / "memory.csv") if row["when"] == "actual"]
    for rank, size in (("0", first), ("1", second)):
        mine = [row for row in rows if row["rank"] == rank]
        assert sum(int(row["bytes"]) for row in mine if row["kind"] in ("state", "stage")) == size
        averages = sum(int(row["bytes"]) for row in mine if row["kind"] == "stage")
        parameters = sum(int(row["bytes"]) for row in mine if row["kind"] == "parameter")
        assert averages == parameters > 0
        assert sum(int(row["bytes"]) for row in mine if row["kind"] == "gradient") == parameters
        assert {row["layer"] for row in mine} <= {"net.0", "net.2"}
    scalars = {tag: values[-1][1] for tag, values in logged(tmp_path).items()}
    assert scalars["optimizer_state/bytes"] == first
    assert scalars["optimizer_state/bytes_all_ranks"] == first + second
    whole = 161 * 4  # of the module: 8 x 16 + 16 + 16 + 1 values
    total = sum(int(row["bytes"]) for row in rows if row["kind"] == "parameter")
    assert total == (2 * whole if kind == "ddp" else whole)


def test_it_is_set_from_yaml(tmp_path: Path) -> None:
    from lightning_optim.cli import main

    path = tmp_path / "fit.yaml"
    path.write_text(f"""
seed_everything: 0
model:
  class_path: tests.harness.modules.Configured
  init_args: {{optimizer: {{name: adan, state_bits: 16}}}}
data: tests.harness.data.Data
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  default_root_dir: {tmp_path}
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_optim.callbacks.OptimizerStateMemory
      init_args: {{table: false, csv: {tmp_path}/memory.csv}}
""")
    main(["fit", "--config", str(path)])
    assert {row["type"] for row in rows_of(tmp_path / "memory.csv") if row["slot"] == "exp_avg"} >= {"bfloat16"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_peak_of_a_device(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    Run(ours("adan"), OptimizerStateMemory(), logger=logger, log_every_n_steps=1, accelerator="gpu")
    said = " ".join(capsys.readouterr().out.split())
    assert f"peak of the device {human(torch.cuda.max_memory_allocated())}" in said
