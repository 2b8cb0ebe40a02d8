"""The measurements of speed on a CPU: their arithmetic by hand, and every script whole at tiny sizes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cpu, cpu_report, growth, host_time, start_up, trainer_overhead
from benchmarks.contenders import bytes_that_must_move
from benchmarks.cpu_contenders import base, others, ours
from benchmarks.pages import ROOT, replace_part
from benchmarks.pairs import Tensors, measure
from benchmarks.records import load, machine
from benchmarks.shapes import scaled, tiny, two_million
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.reports.memory import state_memory

# Bytes per parameter of a large matrix, counted by hand: p, g and slots read, p and slots written, all in float32; LAMB
# reads p, g and both slots once more for its norms.
BYTES = {"adamw": 28, "radam": 28, "adabelief": 28, "lion": 20, "sgdw": 20, "diffgrad": 36, "adan": 44, "lamb": 44}


def test_lists_are_of_the_sizes_that_are_said() -> None:
    assert len(two_million()) == 200
    assert sum(map(math.prod, two_million())) == pytest.approx(2e6, rel=0.01)
    for number in growth.NUMBERS:
        assert len(scaled(number)) == 148
        assert sum(map(math.prod, scaled(number))) == pytest.approx(number, rel=0.02)


@pytest.mark.parametrize("name", BYTES)
def test_bytes_of_a_step_are_those_counted_by_hand(name: str) -> None:
    p = torch.nn.Parameter(torch.randn(128, 128))
    p.grad = torch.randn(128, 128)
    optimizer = OPTIMIZERS[name]([p])
    optimizer.step()
    state = sum(entry.bytes for entry in state_memory(optimizer))
    assert bytes_that_must_move(optimizer, state) == BYTES[name] * 128**2


@pytest.mark.parametrize("name", ["adafactor", "koala_m"])
def test_bytes_of_lists_whose_tensors_keep_different_slots(name: str) -> None:
    tensors = Tensors([(64, 64), (64,)])
    optimizer = OPTIMIZERS[name](tensors.params)
    if optimizer.inputs:
        optimizer.set_loss(1.0)
    optimizer.step()
    assert 12 * 64**2 < bytes_that_must_move(optimizer, 0) < 48 * 65 * 64


def test_gradients_take_turns_and_are_of_random_numbers() -> None:
    tensors = Tensors([(33, 5), (7,), (0,)])
    seen = []
    for _ in range(3):
        seen.append([p.grad.clone() for p in tensors.params if p.grad is not None])
        tensors.turn()
    assert [grad.shape for grad in seen[0]] == [(33, 5), (7,), (0,)]
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][0], seen[2][0])
    assert len({x for grad in seen[0] for x in grad.flatten().tolist()}) == 33 * 5 + 7


def test_every_optimizer_is_measured_and_every_peer_named_takes_a_step() -> None:
    for name in OPTIMIZERS:
        assert {32} <= {entry.contender.bits for entry in ours(name, "auto")} <= {32, 8}
        for entry in others(name, ("torch.optim", "pytorch_optimizer"))[0]:
            tensors = Tensors([(8, 8), (8,)])
            before = [p.detach().clone() for p in tensors.params]
            optimizer = entry.contender.make(tensors.params)
            for _ in range(6):  # a RAdam may stand still until its second moment can be trusted
                optimizer.step()
            assert not torch.equal(before[0], tensors.params[0]), entry.key


def test_a_pair_is_compared_within_itself() -> None:
    def slow(params: Any) -> torch.optim.Optimizer:
        optimizer = base().make(params)
        optimizer.register_step_pre_hook(lambda *_: torch.randn(1_000_000).sort() and None)
        return optimizer

    found = measure(tiny(), base().make, slow, rounds=1, longest=0)
    assert found["times_base"] == pytest.approx(found["ms"] / found["base"]["ms"])
    assert found["state_bytes"] == sum(2 * 4 * math.prod(shape) + 4 for shape in tiny())


@pytest.mark.parametrize(
    ("optimizer", "bits", "bound", "case", "limit"),
    [
        ("acprop", 32, 1.0, "a", 1.3),
        ("acprop", 32, 1.0, "b", 1.2),
        ("adan", 32, 44 / 28, "a", 2.0),
        ("lamb", 32, 44 / 28, "b", 2.5),
        ("lion", 32, 20 / 28, "b", 1.3 * 20 / 28),
        ("adamw", 8, 0.6, "b", 3.0),
        ("lion", 8, 0.5, "b", None),
        ("adafactor", 32, 24 / 28, "b", 1.5),
        ("adafactor", 32, 24 / 28, "a", None),
    ],
)
def test_goals(optimizer: str, bits: int, bound: float, case: str, limit: float | None) -> None:
    assert cpu_report.goal(optimizer, bits, bound, case) == limit


def test_step_times_go_on_where_they_ended(tmp_path: Path) -> None:
    out = tmp_path / "cpu.json"
    some = ["--optimizers", "lion", "--packages", "torch.optim", "pytorch_optimizer", "--rounds", "1", "--longest", "0"]
    command = ["--cases", "tiny", "--out", str(out), *some]
    cpu.main([*command, "--engines", "auto"])
    first = json.loads(out.read_text())["cases"]["tiny"]["rows"]
    assert set(first) == {"lion/ours, 32 bits", "lion/ours, 8 bits", "lion/pytorch_optimizer Lion"}
    cpu.main([*command, "--engines", "auto", "blocked"])
    found = json.loads(out.read_text())
    rows = found["cases"]["tiny"]["rows"]
    assert {key: rows[key] for key in first} == first
    assert rows["lion/ours, blocked, 32 bits"]["served_by"] == "blocked"
    assert "| `lion` | 32 | 20.0 | 0.71 | 0.93 |" in cpu_report.goals(found)
    assert "pytorch_optimizer Lion" in out.with_suffix(".md").read_text()
    assert 1000 < out.with_suffix(".png").stat().st_size < 100_000


def test_a_result_of_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"about": {**machine(), "device": "another", "threads": 99}}))
    with pytest.raises(SystemExit, match="another device, threads"):
        load(path, machine())


def test_growth(tmp_path: Path) -> None:
    out = tmp_path / "growth.json"
    growth.main(["--largest", "30", "--rounds", "1", "--longest", "0", "--out", str(out)])
    found = json.loads(out.read_text())
    assert [len(line) for line in growth.lines(found, "tensors").values()] == [2] * 6
    assert 1000 < out.with_suffix(".png").stat().st_size < 100_000
    assert "From 10 to 30 tensors of 1,000 elements" in growth.page(found)


def test_bends_are_found() -> None:
    counts = [{"tensors": n, "ms": 0.2 + 0.01 * n} for n in (10, 100, 1000)]
    assert growth.bends(counts, "tensors") == "10.0 µs a tensor and 200 µs a step, as much as 20 tensors"
    sizes = [
        {"parameters": 2**20 * m, "ms": 2**20 * m * ns * 1e-6, "state_bytes": 2**23 * m}
        for m, ns in ((1, 0.5), (3, 0.4), (10, 0.8), (30, 0.85))
    ]
    assert "from 0.40 to 0.80 ns a parameter" in growth.bends(sizes, "parameters")
    assert "from 48 to 160 MiB" in growth.bends(sizes, "parameters")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fits_in_a_trainer(tmp_path: Path) -> None:
    out = tmp_path / "overhead.json"
    chosen = ["NonFiniteGuard", "IterateAveraging"]
    trainer_overhead.main(["--jobs", "tiny", "--callbacks", *chosen, "--rounds", "1", "--out", str(out)])
    found = json.loads(out.read_text())
    of = {one["setting"]: one for one in found["fits"]}
    assert set(of) == {setting.label for setting in trainer_overhead.settings(chosen)}
    for label, one in of.items():
        assert "failed" not in one
        assert 0 < one["update_ms"] + one["hooks_ms"] < one["step_ms"]
        assert (one["hooks_ms"] > 0) == any(name in label for name in chosen)
    assert found["bookkeeping"]["tiny"]["ms"] > 0
    assert "| ours AdamW + NonFiniteGuard |" in trainer_overhead.page(found)


def test_every_callback_is_known_to_the_trainer_measurement() -> None:
    from lightning_optim import callbacks

    wanted = trainer_overhead.settings(callbacks.__all__)
    assert len(wanted) == 3 + len(set(callbacks.__all__) - {"Communication"}) + 1
    for setting in wanted:
        assert all(make() for make in setting.callbacks)


def test_start_up(tmp_path: Path) -> None:
    out = tmp_path / "start.json"
    words = ["--optimizers", "adamw", "--engines", "blocked", "--rounds", "1", "--tiny", "--out", str(out)]
    start_up.main(words)
    found = json.loads(out.read_text())
    (run,) = found["first steps"]["adamw, 32 bits, blocked"]
    assert all(run[what] > 0 for what in ("import", "construct", "first", "resumed: load", "resumed: first"))
    assert "| adamw, 8 bits, blocked |" in start_up.page(found)


def test_the_page_has_a_place_for_every_table() -> None:
    text = (ROOT / "docs" / "speed.md").read_text()
    for part in ("cpu", "host", "growth", "trainer", "start"):
        assert "new words" in replace_part(text, part, "new words")


def test_time_of_the_host(tmp_path: Path) -> None:
    """Two optimizers and torch's take their turns; nothing is launched."""
    out = tmp_path / "host_time.json"
    host_time.main(["--cases", "gpt2", "--steps", "1", "--out", str(out)])
    found = json.loads(out.read_text())["cases"]["gpt2"]
    assert list(found) == ["adamw", "lamb", "torch AdamW fused"]
    assert all(times["stay"] > 0 and times["move"] > 0 for times in found.values())
