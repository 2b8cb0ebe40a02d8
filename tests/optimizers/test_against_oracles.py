"""Every optimizer, with every option away from its default, against a literal twin that shares no code with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from lightning_optim.core.optimizer import OPTIMIZERS
from tests.harness.driver import Array, run
from tests.oracles import ORACLES

STEPS = 60
SHAPES = ((), (5,), (3, 4), (2, 3, 4, 2), (2, 2))
KOALA = ("koala_m", "koala_v")

# Option sets beside the defaults. Each option of an optimizer must leave its default in one of them.
SETS: dict[str, tuple[dict[str, Any], ...]] = {
    "adam": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.9, 0.9), "amsgrad": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"betas": (0.0, 0.0)},
    ),
    "adamw": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"betas": (0.9, 0.9), "amsgrad": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": False},
    ),
    "adamax": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-2, "weight_decay": 0.1, "maximize": True},
        {"eps": 0.5},
    ),
    "sgdw": (
        {"lr": 0.01, "momentum": 0.8, "dampening": 0.3, "weight_decay": 0.1, "maximize": True},
        {"nesterov": True},
        {"momentum": 0.0, "weight_decay": 0.1},
    ),
    "rmsprop": (
        {"lr": 0.001, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"momentum": 0.9},
        {"centered": True},
        {"centered": True, "momentum": 0.5, "weight_decay": 0.1},
        {"eps_in_sqrt": True, "eps": 1e-2},
        {"tf_style": True, "eps": 1e-2},
        {"tf_style": True, "momentum": 0.9, "centered": True},
    ),
    "scalar_rmsprop": (
        {"lr": 0.1, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"scope": "tensor", "weight_decay": 0.1},
        {"normalize_by_dim": True},
        {"scope": "tensor", "normalize_by_dim": True, "debias": True},
        {"debias": True},
        {"weight_decay": 0.1, "decoupled": False},
        {"scope": "tensor", "weight_decay": 0.1, "decoupled": False, "debias": True},
    ),
    "radam": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled_weight_decay": True},
        {"threshold": 4.0},
        {"threshold": 7.5},
        {"fallback": "skip"},
        {"fallback": "skip", "weight_decay": 0.1},
        {"fallback": "skip", "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "adan": (
        {"lr": 0.01, "betas": (0.9, 0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"max_grad_norm": 5.0},
        {"weight_decay": 0.1, "no_prox": True, "max_grad_norm": 0.5},
    ),
    "adabelief": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled": False},
        {"rectify": False},
        {"amsgrad": True, "betas": (0.9, 0.9)},
        {"amsgrad": True, "betas": (0.9, 0.9), "rectify": False},
    ),
    "acprop": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled": False},
        {"amsgrad": True, "betas": (0.9, 0.9)},
        {"momentum_update": True},
        {"rectify": True},
        {"rectify": True, "amsgrad": True, "momentum_update": True, "betas": (0.9, 0.9)},
        {"ratio_clip": 0.5},
        {"ratio_clip": 0.5, "rectify": True},
    ),
    "generalized_signsgd": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"use_bias_correction": True},
        {"weight_decay": 0.1, "decoupled": True},
        {"betas": (0.9, 0.0)},
    ),
    "koala_v": (
        {"lr": 0.5, "sigma": 0.1, "q": 0.3, "weight_decay": 0.1},
        {"r": 0.7},
        {"alpha_r": 0.5, "R0": 2.0},
        {"loss_target": 0.3},
        {"weight_decay": 0.1, "wd_in_direction": False},
    ),
    "koala_m": (
        {"lr": 0.5, "sw": 0.3, "sc": 0.1, "sv": 0.2, "a": 0.7, "weight_decay": 0.1},
        {"qw": 0.1, "qv": 0.05},
        {"r": 0.7},
        {"alpha_r": 0.5, "R0": 2.0},
        {"loss_target": 0.3},
    ),
    "pnm": (
        {"lr": 0.01, "betas": (0.8, 0.5), "weight_decay": 0.1, "maximize": True},
        {"weight_decay": 0.1, "decoupled": False},
        {"betas": (0.9, -0.5)},
    ),
    "adapnm": (
        {"lr": 0.01, "betas": (0.8, 0.95, 0.5), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"amsgrad": False},
        {"betas": (0.9, 0.9, 1.0), "weight_decay": 0.1, "decoupled": False},
    ),
    "adafactor": (
        {"lr": 0.1, "beta2_decay": -0.6, "eps": (0.1, 1e-2), "d": 1.5, "weight_decay": 0.1, "maximize": True},
        {"lr": None},
        {"factored": False},
        {"factor_axes": "two_largest"},
        {"factor_axes": "two_largest", "min_dim_size_to_factor": 3},
        {"min_dim_size_to_factor": 3},
        {"mode": "paper", "weight_decay": 0.1},
        {"mode": "paper", "lr": 0.1, "relative_step": False, "scale_parameter": False},
        {"mode": "paper", "relative_step": False, "eps": (1e-2, 0.5)},
        {"mode": "paper", "warmup_init": True},
        {"mode": "paper", "beta1": 0.9, "weight_decay": 0.1, "factor_axes": "two_largest"},
        {"mode": "paper", "beta1": 0.0, "factored": False},
    ),
    "diffgrad": ({"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},),
    "padam": (
        {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"partial": 0.125, "amsgrad": False},
        {"partial": 0.5, "weight_decay": 0.1, "decoupled": True},
        {"debias": "consistent"},
        {"debias": "none", "betas": (0.9, 0.9)},
    ),
    "lars": (
        {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "trust_coefficient": 0.1, "maximize": True},
        {"eps": 0.5, "nesterov": True},
        {"adapt": False},
        {"always_adapt": True},
        {"lr_inside_buffer": False, "nesterov": True},
        {"trust_clip": True, "trust_coefficient": 0.5},
        {"trust_clip": True, "lr_inside_buffer": False, "always_adapt": True},
        {"momentum": 0.0},
        {"adapt": False, "always_adapt": True, "trust_clip": True},
    ),
    "lamb": (
        {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": True},
        {"bias_correction": False},
        {"max_grad_norm": 3.0},
        {"phi": (0.5, 2.0)},
        {"phi": (0.5, 2.0), "always_adapt": True, "max_grad_norm": 0.5},
        {"adapt": False},
        {"always_adapt": True},
    ),
    "moment_estimation_sgd": (
        {"lr": 0.1, "beta": 0.9, "offset": 0.1, "weight_decay": 0.1, "maximize": True},
        {"init": 2.0},
        {"delayed": False},
        {"init": 2.0, "delayed": False},
        {"scope": "tensor"},
        {"scope": "tensor", "delayed": False},
        {"scope": "tensor", "delayed": False, "init": 2.0},
    ),
    "lion": ({"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1, "maximize": True},),
}
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


@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize(("name", "options"), CASES, ids=_word)
def test_agrees_with_its_oracle(name: str, options: dict[str, Any], engine: str) -> None:
    params, gradients, losses = problem(name)
    ours = run(name, params, gradients, losses=losses, engine=engine, **options)
    assert_same(ours, expected(name, options))


@pytest.mark.parametrize("engine", ["reference", "auto"])
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
    """Of every optimizer, in some set above; how state is kept and who runs a step do not change the method."""
    other = ("state_bits", "state_format", "engine", "capturable")
    missing = []
    for name, cls in OPTIMIZERS.items():
        for option in cls.options.values():
            if option.name in other or (option.name == "maximize" and name in KOALA):
                continue
            if all(options.get(option.name, option.default) == option.default for options in SETS[name]):
                missing.append(f"{name}.{option.name}")
    assert not missing


def test_every_optimizer_has_an_oracle() -> None:
    assert set(OPTIMIZERS) == set(ORACLES) == set(SETS)
