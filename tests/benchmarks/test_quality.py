"""The benchmarks of how state in few bits behaves, at sizes that take seconds."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import pages, state_quality, train_quality
from benchmarks.peers import PEERS, Peer, missing
from lightning_optim import AdamW


def test_a_part_of_a_page_is_replaced() -> None:
    page = "a\n<!-- speed: written by x -->\nold\n<!-- end of speed -->\nb\n"
    new = pages.replace_part(page, "speed", "| 1 |")
    assert new == "a\n<!-- speed: written by x -->\n\n| 1 |\n\n<!-- end of speed -->\nb\n"
    assert pages.replace_part(new, "speed", "| 1 |") == new
    with pytest.raises(ValueError, match="no part named 'memory'"):
        pages.replace_part(page, "memory", "")


def test_the_closed_loop_compares_with_torch() -> None:
    """The same optimizer has no error; half the rate is half the length; gains and errors are those of the update."""
    same = functools.partial(torch.optim.AdamW, **state_quality.OPTIONS)
    half = functools.partial(torch.optim.AdamW, **{**state_quality.OPTIONS, "lr": 0.5})
    for case in state_quality.CASES:
        assert list(state_quality.closed_loop(case, same, steps=6)) == pytest.approx([0.0, 1.0])
        assert list(state_quality.closed_loop(case, half, steps=6)) == pytest.approx([0.5, 0.5])
    ours = functools.partial(AdamW, **state_quality.OPTIONS)
    assert state_quality.closed_loop("stationary", ours, steps=6)[0] < 1e-6


def test_peers_are_optional(tmp_path: Path) -> None:
    """A package that is not there is named in the table; torch's own are always there."""
    assert missing(Peer("nobody", "no_such_package", "Adam", 8, {})) == "not installed"
    assert not any(missing(peer) for peers in PEERS.values() for peer in peers if peer.package == "torch.optim")
    results = state_quality.measure(steps=3, device="cpu")
    assert set(state_quality.OURS) <= set(results)
    text = state_quality.page(results)
    assert all(label in text for label in results)
    out = tmp_path / "quality.json"
    state_quality.main(["--steps", "2", "--out", str(out), "--no-page"])
    assert json.loads(out.read_text())["about"]["steps"] == 2


def test_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    out = tmp_path / "runs.json"
    given = ["--scale", "0.01", "--seeds", "2", "--optimizers", "adamw", "sgdw", "--out", str(out)]
    train_quality.main([*given, "--tasks", "digits", "--budget", "-1"])
    assert not out.exists()
    train_quality.main([*given, "--tasks", "digits"])
    first = json.loads(out.read_text())["runs"]
    train_quality.main(given)
    runs = json.loads(out.read_text())["runs"]
    assert runs[: len(first)] == first
    assert len(runs) == 2 * len(first) == 2 * 2 * 2 * 2
    found = {(r["task"], r["optimizer"], r["bits"], r["seed"]): r for r in runs}
    assert len(found) == len(runs)
    assert all(run["coded"] == 0 for run in runs if run["bits"] == 32)
    assert all(run["coded"] > 0.8 for run in runs if run["bits"] == 8)
    same: Any = found["bytes", "adamw", 32, 0]
    again = train_quality.train(train_quality.PythonSources(), "adamw", 32, 0, 6)
    assert again.train_loss == same["train_loss"]
    text = train_quality.page([train_quality.Run(**run) for run in runs])
    assert len(text.splitlines()) == 2 + 2 * 2  # two rows for each task


def test_committed_tables_are_those_of_the_committed_results() -> None:
    page = (pages.ROOT / "docs" / "state.md").read_text()
    runs = json.loads((pages.RESULTS / "train_quality.json").read_text())["runs"]
    table = train_quality.page([train_quality.Run(**run) for run in runs])
    assert pages.replace_part(page, "training", table) == page
    results = json.loads((pages.RESULTS / "state_quality.json").read_text())
    assert pages.replace_part(page, "closed loop", state_quality.page(results["error and gain"])) == page
    assert pages.replace_part(page, "momentum", state_quality.momentum_page(results["momentum"])) == page
    worse = [of["log"] > of["dynamic"] for cases in results["momentum"].values() for of in cases.values()]
    assert len(worse) == 9
    assert not any(worse)
