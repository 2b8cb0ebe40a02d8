"""Cautious steps and cautious decays, options of all pages: what they compute, and where they are refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim import AdamW, Lion, OptionError
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.program import namespace
from tests.harness.driver import Array, run
from tests.harness.problems import NAMES, make_params
from tests.optimizers.settings import SETS
from tests.oracles import ORACLES

STEPS = 50
SHAPES = ((), (5,), (7, 3), (3, 8), (4, 4), (3, 2, 4), (2, 3, 2, 2))
WORDS = ("cautious", "cautious_decay")
FLAGS = ("decoupled", "decoupled_weight_decay")
LOOSE: dict[str, Any] = {"weight_decay": 0.1}


def accepted(name: str, options: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of the two options an optimizer takes beside these."""
    cls = OPTIMIZERS[name]
    coupled = any(options.get(flag, getattr(cls, flag, True)) is False for flag in FLAGS)
    return tuple(word for word in WORDS if word not in cls.refuses and not (coupled and word == "cautious_decay"))


def cases() -> Iterator[Any]:
    """Each optimizer with each option, on both engines; and with what it takes of them beside all its other options."""
    for name in NAMES:
        flags = {flag: True for flag in FLAGS if flag in OPTIMIZERS[name].options}
        for word in accepted(name, flags):
            yield pytest.param(name, {word: True, **LOOSE, **flags}, "reference")
            yield pytest.param(name, {word: True, **LOOSE, **flags}, "auto", marks=pytest.mark.engines)
        for options in ({}, *SETS[name]):
            if words := accepted(name, options):
                yield pytest.param(name, {**dict.fromkeys(words, True), **LOOSE, **options}, "reference")


def problem() -> tuple[list[Array], list[list[Array | None]]]:
    """Parameters of all shapes, and gradients of which some are missing and some elements are zero."""
    rng = np.random.default_rng(3)
    params: list[Array] = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
    gradients: list[list[Array | None]] = []
    for k in range(STEPS):
        drawn = [np.asarray(rng.normal(size=shape) * (rng.random(size=shape) < 0.9)) for shape in SHAPES]
        here = rng.random(len(SHAPES)) < 0.9 if k else np.ones(len(SHAPES), dtype=bool)
        gradients.append([g if there else None for g, there in zip(drawn, here, strict=True)])
    return params, gradients


@pytest.mark.parametrize(("name", "options", "engine"), list(cases()), ids=str)
def test_agrees_with_its_oracle(name: str, options: dict[str, Any], engine: str) -> None:
    params, gradients = problem()
    given = {key: value for key, value in options.items() if not (key == "lr" and value is None)}
    twin = "adam" if name == "adamw" and "decoupled_weight_decay" in given else name
    theirs = ORACLES[twin](params, gradients, **given)
    for mine, other in zip(run(name, params, gradients, engine=engine, **options), theirs, strict=True):
        for p, q in zip(mine, other, strict=True):
            np.testing.assert_allclose(p, q, rtol=0, atol=1e-10)


# ------------------------------------------------------------------ what has no meaning


def reads(name: str, word: str, **options: Any) -> bool:
    """Whether the update asks for the option, under these options."""
    cls = OPTIMIZERS[name]
    optimizer = cls(make_params(((3, 4),)), **options)
    (group,) = optimizer.param_groups
    h = {**optimizer.options_of(group), **optimizer.traits_of(0, group["params"][0])}
    h |= {**cls.scalars(namespace(h), 2), **dict.fromkeys(cls.inputs, 0.0)}
    programs = [optimizer.program("update", {**h, word: value}) for value in (False, True)]
    shapes = [tuple(map(repr, (*program.outputs.items(), *program.symbols))) for program in programs]
    return shapes[0] != shapes[1]


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", NAMES)
def test_taken_where_the_update_asks_for_it_and_refused_elsewhere(name: str, word: str) -> None:
    """Read off the update, whatever the page declares. Two pages could be cautious, and do not want to."""
    flags = [flag for flag in FLAGS if flag in OPTIMIZERS[name].options]
    for choice in (True, False):
        options: dict[str, Any] = dict.fromkeys(flags, choice)
        both = {**options, word: True}
        asks = reads(name, word, **options) and not (name in ("moment_estimation_sgd", "muon") and word == "cautious")
        assert asks == (word in accepted(name, options))
        if asks:
            OPTIMIZERS[name](make_params(), **both)
            continue
        with pytest.raises(OptionError, match=rf"{word}=True (has no meaning here: its|needs decoupled\w*=True: )"):
            OPTIMIZERS[name](make_params(), **both)
        with pytest.raises(OptionError, match=word):
            OPTIMIZERS[name]([{"params": make_params(), word: True}], **options)


# ------------------------------------------------------------------ by hand


def one_step(optimizer: Any, p: torch.Tensor, g: list[float]) -> torch.Tensor:
    p.grad = torch.tensor(g, dtype=p.dtype)
    optimizer.step()
    return p.detach()


def test_the_share_that_is_left_lengthens_the_rest() -> None:
    """Lion after one gradient of ones: the sign of its mean is 1 everywhere, of two new gradients 3 of 4 agree."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, betas=(0.9, 0.5), cautious=True)
    assert torch.equal(one_step(optimizer, p, [1.0] * 4), torch.full((4,), -0.1, dtype=torch.float64))
    moved = one_step(optimizer, p, [1.0, 1.0, 1.0, -1.0]) + 0.1
    torch.testing.assert_close(moved, torch.tensor([-0.1 * 4 / 3] * 3 + [0.0], dtype=torch.float64), rtol=0, atol=1e-16)


def test_no_step_is_lengthened_more_than_a_thousand_times() -> None:
    p = torch.nn.Parameter(torch.zeros(5000, dtype=torch.float64))
    optimizer = Lion([p], lr=0.1, cautious=True)
    moved = one_step(optimizer, p, [1.0] + [0.0] * 4999)
    assert float(moved[0]) == pytest.approx(-100.0, rel=1e-12)
    assert not moved[1:].any()


def test_where_a_step_is_zero_a_cautious_decay_decays() -> None:
    """It decays at 0, where both directions are right, and where the step makes a weight smaller."""
    p = torch.nn.Parameter(torch.tensor([1.0, 1.0, 1.0, -1.0], dtype=torch.float64))
    optimizer = AdamW([p], lr=0.1, eps=1e-30, weight_decay=0.5, cautious_decay=True)
    after = one_step(optimizer, p, [0.0, 1.0, -1.0, 1.0])
    torch.testing.assert_close(after, torch.tensor([0.95, 0.85, 1.1, -1.1], dtype=torch.float64), rtol=0, atol=1e-15)


def test_tiny_numbers_keep_their_signs() -> None:
    """The product of a gradient of 1e-30 and its step is 0 in float32, and both agree."""
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = Lion([p], lr=1e-20, cautious=True)
    assert bool((one_step(optimizer, p, [1e-30, -1e-30]) != 0).all())


def test_a_group_may_be_cautious_alone() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2))
    optimizer = Lion([{"params": [p], "cautious": True}, {"params": [q]}], lr=0.1)
    for g in ([1.0, 1.0], [0.1, -0.05]):
        p.grad = torch.tensor(g, dtype=torch.float64)
        q.grad = torch.tensor(g, dtype=torch.float64)
        optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([-0.3, -0.1], dtype=torch.float64), rtol=0, atol=1e-15)
    torch.testing.assert_close(q.detach(), torch.tensor([-0.2, -0.2], dtype=torch.float64), rtol=0, atol=1e-15)
