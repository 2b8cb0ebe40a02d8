"""Every optimizer, with every option away from its default, against a literal twin that shares no code with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lightning_optim.core.optimizer import OPTIMIZERS
from tests.harness.driver import Array, run
from tests.optimizers.settings import SETS
from tests.oracles import ORACLES

STEPS = 60
SHAPES = ((), (5,), (3, 4), (2, 3, 4, 2), (2, 2))
KOALA = ("koala_m", "koala_v")

CASES = [(name, options) for name, sets in SETS.items() for options in ({}, *sets)]


def _word(case: object) -> str:
    if isinstance(case, str):
        return case
    assert isinstance(case, Mapping)
    return ",".join(f"{key}={value}" for key, value in case.items()) or "defaults"


def problem(name: str) -> tuple[list[Array], list[list[Array | None]], list[tuple[float, float]]]:
    """Parameters, gradients with gaps, and losses; the last tensor starts at zero."""
    rng = np.random.default_rng(0)
    params: list[Array] = [rng.normal(size=shape) for shape in SHAPES[:-1]] + [np.zeros(SHAPES[-1])]
    gradients: list[list[Array | None]] = []
    for k in range(STEPS):
        drawn = [np.asarray(rng.normal(size=shape)) for shape in SHAPES]
        here = rng.random(len(SHAPES)) < 0.8
        if k == 9 and name not in KOALA:  # a Kalman filter predicts where no tensor has a gradient too; we stand still
            here[:] = False
        elif not here.any() or k == 0:
            here[2] = True
        if k == 20:
            drawn[2], here[2] = np.zeros(SHAPES[2]), True
        gradients.append([g if there else None for g, there in zip(drawn, here, strict=True)])
    means = rng.uniform(0.5, 1.5, size=STEPS)
    losses = [(float(mean), float(mean**2 + rng.uniform(0, 0.5))) for mean in means]
    return params, gradients, losses


def expected(name: str, options: Mapping[str, Any], **kwargs: Any) -> list[list[Array]]:
    """What the oracle makes of the same problem."""
    params, gradients, losses = problem(name)
    options = {key: value for key, value in options.items() if not (key == "lr" and value is None)}
    if name == "adamw" and "decoupled_weight_decay" in options:  # which its twin does not offer
        name = "adam"
    return ORACLES[name](params, gradients, losses=losses, **options, **kwargs)


def assert_same(ours: list[list[Array]], theirs: list[list[Array]]) -> None:
    for k, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        for j, (p, q) in enumerate(zip(mine, other, strict=True)):
            np.testing.assert_allclose(p, q, rtol=0, atol=1e-10, err_msg=f"step {k + 1}, tensor {j}")


@pytest.mark.parametrize("engine", ["reference", pytest.param("auto", marks=pytest.mark.engines)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=_word)
def test_agrees_with_its_oracle(name: str, options: dict[str, Any], engine: str) -> None:
    params, gradients, losses = problem(name)
    ours = run(name, params, gradients, losses=losses, engine=engine, **options)
    assert_same(ours, expected(name, options))


@pytest.mark.parametrize("engine", ["reference", pytest.param("auto", marks=pytest.mark.engines)])
@pytest.mark.parametrize("name", list(SETS))
def test_agrees_under_a_schedule(name: str, engine: str) -> None:
    """The learning rate of every step is its own, and may be zero."""
    params, gradients, losses = problem(name)
    base = float(OPTIMIZERS[name].options["lr"].default)
    lrs = [base * (k % 7) / 6 for k in range(STEPS)]
    assert_same(
        run(name, params, gradients, losses=losses, lrs=lrs, engine=engine, weight_decay=0.1),
        expected(name, {"weight_decay": 0.1}, lrs=lrs),
    )


def test_every_option_leaves_its_default() -> None:
    """Of every optimizer, in some set; how state is kept and who runs a step do not change the method.

    `test_cautious.py` has the options of caution, beside each of these sets.
    """
    other = ("state_bits", "state_format", "engine", "capturable", "cautious", "cautious_decay", "compute", "owners")
    of_shapes = ("muon.experts",)  # for tensors of other shapes, in test_muon.py
    missing = []
    for name, cls in OPTIMIZERS.items():
        for option in cls.options.values():
            if option.name in other or (option.name == "maximize" and name in KOALA):
                continue
            if all(options.get(option.name, option.default) == option.default for options in SETS[name]):
                missing.append(f"{name}.{option.name}")
    assert set(missing) == set(of_shapes)


def test_every_optimizer_has_an_oracle() -> None:
    assert set(OPTIMIZERS) == set(ORACLES) == set(SETS)
