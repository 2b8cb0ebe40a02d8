"""The memory report against bytes counted by hand, its table, and its scalars read back from TensorBoard."""

from __future__ import annotations

import re
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_optim import create_optimizer
from lightning_optim.callbacks import IterateAveraging, LookaheadSync, LossInput, OptimizerStateMemory
from lightning_optim.memory import predicted_memory, state_memory
from tests.callbacks.toys import Make, Run
from tests.ranks import run_ranks

VALUES = 4 * 6 + 6 + 6 * 2 + 2  # of the toy's two layers
TENSORS = 4


class Before(Callback):
    """What the report would say before the first step."""

    predicted: list[Any]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.predicted = predicted_memory(trainer.optimizers[0])


def ours(spec: Any) -> Make:
    return lambda params: create_optimizer(spec, params)


def by_hand(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of every tensor that the optimizer keeps, whatever it is called."""
    kept = [value for state in optimizer.state.values() for value in state.values()]
    kept += [value for group in optimizer.param_groups for key, value in group.items() if key != "params"]
    tensors = [value for value in kept if isinstance(value, torch.Tensor)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
    actual = state_memory(optimizer)
    expected += len(extra) * VALUES * 4
    assert sum(entry.bytes for entry in actual) == expected == by_hand(optimizer)
    assert sorted(before.predicted, key=str) == sorted(actual, key=str)


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
    assert scalars["optimizer_state/slot/prev_grad"][-1] == (12, 4.0 * VALUES)
    assert scalars["optimizer_state/dtype/float32"][-1] == (12, size)
    assert scalars["optimizer_state/group/0"][-1] == (12, size)


def test_16_bits_are_told_apart(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    Run(ours({"name": "adan", "state_bits": 16}), OptimizerStateMemory(table=False), logger=logger, log_every_n_steps=1)
    scalars = {tag: values[-1][1] for tag, values in logged(tmp_path).items()}
    assert scalars["optimizer_state/bytes"] == 3 * VALUES * 2 + VALUES * 4 + TENSORS * 4
    assert scalars["optimizer_state/bytes_in_32_bits"] == 4 * VALUES * 4 + TENSORS * 4
    assert scalars["optimizer_state/dtype/bfloat16"] == 3 * VALUES * 2
    assert scalars["optimizer_state/slot/prev_grad"] == VALUES * 4  # a previous gradient stays exact


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
