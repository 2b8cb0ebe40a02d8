"""docs/scale.md says what a step sends; here it is counted, on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.communication import counted
from benchmarks.scale import messages, tables
from lightning_optim import create_optimizer
from tests.harness.ranks import run_ranks

PAGE = Path(__file__).parent.parent.parent / "docs" / "scale.md"


def sent(name: str, options: dict[str, Any], layers: int, sharded: bool) -> tuple[list[int], list[tuple[int, ...]]]:
    """The bytes of each message of the second step, and the shapes of the tensors."""
    dist.init_process_group("gloo")
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)), nn.Linear(8, 4))
    shapes = [tuple(p.shape) for p in net.parameters()]
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
    optimizer = create_optimizer({"name": name, **options}, list(net.parameters()))

    def step() -> list[int]:
        net(torch.ones(2, 8)).square().mean().backward()
        with counted() as found:
            optimizer.step(lambda: torch.tensor(1.0))
        return found

    step()
    return step(), shapes


OPTIONS: dict[str, dict[str, Any]] = {"lamb": {"max_grad_norm": 1.0}, "adafactor": {}, "koala_v": {}, "prodigy": {}}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_sharded_step_sends_what_the_page_says(name: str) -> None:
    """In number and in bytes, and in as many messages for ten tensors as for four."""
    for layers in (1, 4):
        for found, shapes in run_ranks(sent, name, OPTIONS[name], layers, True):
            assert sorted(found) == sorted(messages(name, shapes).values())


@pytest.mark.parametrize("name", OPTIONS)
def test_a_replicated_step_sends_the_loss_alone(name: str) -> None:
    for found, _ in run_ranks(sent, name, OPTIONS[name], 1, False):
        assert found == ([16] if name == "koala_v" else [])


def test_the_page_holds_the_tables() -> None:
    text = PAGE.read_text()
    for line in tables():
        assert line in text, "run python benchmarks/scale.py"
