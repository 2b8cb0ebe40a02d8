"""A new format is registered in one place and runs on every engine; no printer hears of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, get_args

import pytest
import torch
from torch import Tensor

from lightning_optim import engines, storage
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.storage import Quantized
from tests.harness.problems import apply, build, gradients, make_params
from tests.storage.linear import Linear

SHAPES = ((7,), (64, 64), (5000,), (0,))  # two of them large enough for 8 bits


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the table of formats, and as a word that the option takes."""
    monkeypatch.setitem(storage.FORMATS, "linear", lambda slot, partner: Linear())
    for cls in (OPTIMIZERS["sgdw"], OPTIMIZERS["lion"]):
        option = replace(cls.options["state_format"], type=Literal["log", "dynamic", "linear"])
        monkeypatch.setitem(cls.options, "state_format", option)


def make(name: str, engine: str) -> tuple[Optimizer, list[Tensor]]:
    params = make_params(SHAPES, torch.float32)
    return build(name, params, state_bits=8, state_format="linear", engine=engine), params


def train(optimizer: Optimizer, params: list[Tensor], first: int, last: int) -> None:
    for step, grads in list(enumerate(gradients(last, SHAPES, torch.float32)))[first:]:
        apply(optimizer, params, grads, step)


def ends(optimizer: Optimizer, params: list[Tensor]) -> list[Tensor]:
    """Parameters, codes and scales."""
    slots = [value for p in params for value in optimizer.state[p].values() if isinstance(value, Quantized)]
    assert len(slots) >= 2
    assert all(slot.format == Linear() for slot in slots)
    return [*params, *(tensor for slot in slots for tensor in (slot.codes, slot.scales))]


@pytest.mark.parametrize("name", ["sgdw", "lion"])
@pytest.mark.parametrize("engine", ["blocked", "compiled", "triton"])
def test_every_engine_finds_the_same_codes(name: str, engine: str) -> None:
    found: list[Any] = []
    for choice in ("reference", engine):
        optimizer, params = make(name, choice)
        if refusal := engines.ENGINES[choice].refusal(optimizer.first_programs(), params):
            pytest.skip(refusal)
        train(optimizer, params, 0, 4)
        found.append(ends(optimizer, params))
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    optimizer, params = make("sgdw", "auto")
    train(optimizer, params, 0, 3)
    other, others = make("sgdw", "auto")
    other.load_state_dict(optimizer.state_dict())
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    for one, values in ((optimizer, params), (other, others)):
        train(one, values, 3, 5)
    assert all(torch.equal(x, y) for x, y in zip(ends(optimizer, params), ends(other, others), strict=True))


def test_the_option_takes_the_words_of_the_registry() -> None:
    words = get_args(OPTIMIZERS["adamw"].options["state_format"].type)
    assert set(words) == storage.FORMATS.keys() - {"linear"}
