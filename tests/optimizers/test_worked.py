"""The optimizers against the worked numbers of the authors' programs, without an oracle in between."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from lightning_optim.core.optimizer import Optimizer
from tests.harness.driver import run
from tests.optimizers.worked import WORKED, Worked, inputs, joined, numbers

TENSORS = "ABCv"


@pytest.mark.parametrize("engine", ["reference", pytest.param("auto", marks=pytest.mark.engines)])
@pytest.mark.parametrize("worked", WORKED, ids=lambda worked: worked.name)
def test_worked_numbers(worked: Worked, engine: str) -> None:
    params, gradients = inputs(TENSORS)
    recorded: dict[str, list[float]] = {}

    def record(k: int, optimizer: Optimizer) -> None:
        for name, value in optimizer.param_groups[0].items():
            if isinstance(value, torch.Tensor):
                recorded.setdefault(name, []).append(float(value))

    history = run(
        worked.optimizer, params, gradients, lrs=worked.lrs, after_step=record, engine=engine, **worked.options
    )
    for line in joined(worked.lines):
        found = re.match(r"t=(\d+) (\w) (.*)", line)
        if found:
            after = history[int(found[1]) - 1][TENSORS.index(found[2])]
            np.testing.assert_allclose(after.reshape(-1), numbers(found[3]), rtol=0, atol=1e-11, err_msg=line)
        else:
            name, _, expected = line.partition(" ")
            np.testing.assert_allclose(recorded[name], numbers(expected), rtol=1e-11, err_msg=name)
