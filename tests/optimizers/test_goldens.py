"""The optimizers against printed reference values, without an oracle in between."""

from __future__ import annotations

import numpy as np
import pytest

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from tests.harness.driver import History, run
from tests.optimizers.goldens import ADAN_RESTART, ADAN_RESTART_AFTER, GOLDENS, Golden, Tensors
from tests.optimizers.worked import WORKED

ENGINES = ("reference", pytest.param("auto", marks=pytest.mark.engines))


def assert_printed(history: History, expected: tuple[Tensors, ...]) -> None:
    """Equal up to the rounding of ten printed digits."""
    assert len(history) == len(expected)
    for after_step, printed in zip(history, expected, strict=True):
        for theta, value in zip(after_step, printed, strict=True):
            np.testing.assert_allclose(theta, np.array(value), rtol=6e-10, atol=1e-15)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("golden", GOLDENS, ids=lambda golden: golden.name)
def test_golden(golden: Golden, engine: str) -> None:
    history = run(
        golden.optimizer,
        golden.initial(),
        golden.gradient_steps(),
        lrs=golden.lrs,
        losses=golden.losses,
        engine=engine,
        **golden.options,
    )
    assert_printed(history, golden.expected)


def test_every_optimizer_has_a_golden() -> None:
    assert {*(golden.optimizer for golden in GOLDENS), *(worked.optimizer for worked in WORKED)} == set(OPTIMIZERS)


def test_reset_is_the_restart_of_adan() -> None:
    def restart(k: int, optimizer: Optimizer) -> None:
        if k + 1 == ADAN_RESTART_AFTER:
            optimizer.reset()

    history = run(
        "adan",
        ADAN_RESTART.initial(),
        ADAN_RESTART.gradient_steps(),
        after_step=restart,
        **ADAN_RESTART.options,
    )
    assert_printed(history, ADAN_RESTART.expected)
