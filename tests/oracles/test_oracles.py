"""The oracles against printed reference values, and the rules that hold for every oracle."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from typing import Any

import numpy as np
import pytest

from tests.optimizers.goldens import (
    ADAN_RESTART,
    ADAN_RESTART_AFTER,
    AVERAGES,
    GOLDENS,
    SGDW_PAPER,
    SGDW_PAPER_ALPHA,
    SGDW_PAPER_MULTIPLIERS,
    Golden,
    Tensors,
)
from tests.optimizers.worked import WORKED
from tests.oracles import ORACLES
from tests.oracles.driver import History
from tests.oracles.sgdw import sgdw_paper

KOALA = ("koala_m", "koala_v")
GLOBAL_BY_DEFAULT = ("scalar_rmsprop", "moment_estimation_sgd")
BY_NAME = {golden.name: golden for golden in GOLDENS}


def run(golden: Golden) -> History:
    return ORACLES[golden.optimizer](
        golden.initial(), golden.gradient_steps(), lrs=golden.lrs, losses=golden.losses, **golden.options
    )


def assert_printed(history: History, expected: tuple[Tensors, ...]) -> None:
    """Equal up to the rounding of ten printed digits."""
    assert len(history) == len(expected)
    for after_step, printed in zip(history, expected, strict=True):
        for theta, value in zip(after_step, printed, strict=True):
            np.testing.assert_allclose(theta, np.array(value), rtol=6e-10, atol=1e-15)


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_golden(golden: Golden) -> None:
    assert_printed(run(golden), golden.expected)


def test_no_golden_repeats_the_numbers_of_other_options() -> None:
    """Nor the first of them: they would say nothing of the option."""
    repeated = set()
    for one, other in itertools.permutations(GOLDENS, 2):
        begins_alike = one.expected == other.expected[: len(one.expected)]
        if begins_alike and one.optimizer == other.optimizer and one.options != other.options:
            repeated.add((one.name, other.name))
    stated = {(golden.name, golden.same_as) for golden in GOLDENS if golden.same_as}
    assert repeated == stated | {pair[::-1] for pair in stated}


@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_every_option_of_a_golden_shows(golden: Golden) -> None:
    """With any of them at its default the numbers are others."""
    defaults = {name: p.default for name, p in inspect.signature(ORACLES[golden.optimizer]).parameters.items()}
    for name, value in golden.options.items():
        if value != defaults[name]:
            other = dataclasses.replace(golden, options={**golden.options, name: defaults[name]})
            with pytest.raises(AssertionError):
                assert_printed(run(other), golden.expected)


def test_every_oracle_has_a_golden() -> None:
    assert {*(golden.optimizer for golden in GOLDENS), *(worked.optimizer for worked in WORKED)} == set(ORACLES)


@pytest.mark.parametrize("name", ["gadam", "gadamx"])
def test_average_of_the_iterates(name: str) -> None:
    iterates = run(BY_NAME[f"{name}_iterates"])
    means = [[np.mean([theta[0] for theta in iterates[: k + 1]], axis=0)] for k in range(len(iterates))]
    assert_printed(means, AVERAGES[f"{name}_average_after_each_step"])


def test_adan_restart_is_a_new_start_from_the_same_point() -> None:
    gradients = ADAN_RESTART.gradient_steps()
    adan = ORACLES["adan"]
    first = adan(ADAN_RESTART.initial(), gradients[:ADAN_RESTART_AFTER], **ADAN_RESTART.options)
    second = adan(first[-1], gradients[ADAN_RESTART_AFTER:], **ADAN_RESTART.options)
    assert_printed(first + second, ADAN_RESTART.expected)


def test_sgdw_paper_form() -> None:
    history = sgdw_paper(
        SGDW_PAPER.initial(),
        SGDW_PAPER.gradient_steps(),
        alpha=SGDW_PAPER_ALPHA,
        multipliers=SGDW_PAPER_MULTIPLIERS,
        **SGDW_PAPER.options,
    )
    assert_printed(history, SGDW_PAPER.expected)


def test_sgdw_paper_form_equals_sgdw_at_a_constant_rate() -> None:
    golden = BY_NAME["sgdw"]
    history = sgdw_paper(
        golden.initial(),
        golden.gradient_steps(),
        alpha=0.1,
        multipliers=(1.0, 1.0, 1.0),
        momentum=0.9,
        weight_decay=0.1 * 0.01,
    )
    assert_printed(history, golden.expected)


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_step_without_gradient_leaves_a_tensor_and_its_counter_alone(name: str) -> None:
    """A second tensor that misses steps ends where it would have ended without those steps."""
    if name in KOALA:
        pytest.skip("a Kalman filter predicts in every step and couples its tensors")
    rng = np.random.default_rng(0)
    params = [rng.normal(size=(3, 2)), rng.normal(size=(2, 3))]
    always = [rng.normal(size=(3, 2)) for _ in range(9)]
    sometimes = [rng.normal(size=(2, 3)) if k % 3 != 1 else None for k in range(9)]
    options: dict[str, Any] = {"weight_decay": 0.1, "lr": 0.01}
    if name in GLOBAL_BY_DEFAULT:
        options["scope"] = "tensor"
    both = ORACLES[name](params, list(zip(always, sometimes, strict=True)), **options)
    alone = ORACLES[name](params[1:], [[g] for g in sometimes if g is not None], **options)
    np.testing.assert_array_equal(both[-1][1], alone[-1][0])
    np.testing.assert_array_equal(both[1][1], both[0][1])


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_step_without_any_gradient_moves_nothing(name: str) -> None:
    params = [np.array([1.0, -2.0])]
    losses = [(1.0, 1.0)]
    kept = ORACLES[name](params, [[None]], losses=losses, weight_decay=0.1)
    np.testing.assert_array_equal(kept[0][0], params[0])


@pytest.mark.parametrize("name", sorted(set(ORACLES) - set(KOALA)))
def test_maximize_negates_the_gradient(name: str) -> None:
    params = [np.array([1.0, -2.0]), np.array(0.5)]
    gradients = [[np.array([0.1, -0.2]), np.array(0.3)], [np.array([-0.3, 0.4]), np.array(0.1)]]
    negated = [[-g for g in step] for step in gradients]
    up = ORACLES[name](params, gradients, maximize=True, weight_decay=0.1)
    down = ORACLES[name](params, negated, weight_decay=0.1)
    for k in range(2):
        for j in range(2):
            np.testing.assert_array_equal(up[k][j], down[k][j])


@pytest.mark.parametrize("name", sorted(ORACLES))
def test_schedule_replaces_the_learning_rate(name: str) -> None:
    params = [np.array([1.0, -2.0])]
    gradients = [[np.array([0.1, -0.2])], [np.array([-0.3, 0.4])]]
    losses = [(1.5, 2.5), (1.2, 1.6)]
    measure = {"base_lr": 0.005} if name == "mars" else {}  # by default the first lr, of which lr_1d is a share
    constant = ORACLES[name](params, gradients, losses=losses, lr=0.005, **measure)
    scheduled = ORACLES[name](params, gradients, losses=losses, lr=77.0, lrs=[0.005, 0.005], **measure)
    np.testing.assert_array_equal(constant, scheduled)
