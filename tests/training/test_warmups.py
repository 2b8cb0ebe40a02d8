"""The factors of warm-ups against published values, and the decay that they follow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.training import second_moment
from lightning_optim.training.warmups import WARMUPS
from tests.harness.rates import warm


@pytest.mark.parametrize(
    ("rule", "beta2", "values"),
    [  # computed elsewhere; RAdam's r_5, r_6, r_10, r_100 and r_1000 are the factors of steps 1, 2, 6, 96 and 996
        ("rectified", 0.9, {1: 0.156110763275, 2: 0.255176806547, 6: 0.492688071040, 96: 0.999806454677, 996: 1.0}),
        ("rectified", 0.98, {1: 0.076552705235, 2: 0.115523211636, 6: 0.219739578619, 96: 0.819672788369}),
        ("rectified", 0.999, {1: 0.017311503166, 6: 0.048998013447, 96: 0.215335436538, 996: 0.645325652338}),
        ("linear", 0.999, {1: 0.0005, 10: 0.005, 100: 0.05, 1000: 0.5, 2000: 1.0, 9999: 1.0}),
        ("exponential", 0.999, {1: 0.000999500167, 10: 0.009950166251, 100: 0.095162581964, 1000: 0.632120558829}),
    ],
)
def test_warmups_have_their_published_values(rule: str, beta2: float, values: dict[int, float]) -> None:
    for t, value in values.items():
        assert WARMUPS[rule](t, beta2) == pytest.approx(value, abs=1e-11)  # the values have 12 digits
        assert warm(rule, t, beta2) == pytest.approx(value, abs=1e-11)


def test_all_warmups_are_about_as_long() -> None:
    """The steps that they cost are 1 / (1 - beta2) - 1/2 for both rules, and a few per cent more for RAdam."""
    lost = {rule: sum(1 - WARMUPS[rule](t, 0.99) for t in range(1, 5000)) for rule in WARMUPS}
    assert lost["linear"] == pytest.approx(99.5, abs=1e-9)
    assert lost["exponential"] == pytest.approx(99.5, abs=0.01)
    assert 1.0 < lost["rectified"] / 99.5 < 1.12


@pytest.mark.parametrize(
    ("cls", "options", "beta2"),
    [
        *((cls, {"betas": (0.8, 0.95)}, 0.95) for cls in (torch.optim.Adam, torch.optim.AdamW, torch.optim.Adamax)),
        *((cls, {"betas": (0.8, 0.95)}, 0.95) for cls in (torch.optim.NAdam, torch.optim.RAdam)),
        (torch.optim.RMSprop, {"alpha": 0.95}, 0.95),
        (torch.optim.Adadelta, {"rho": 0.95}, 0.95),
        (torch.optim.ASGD, {}, None),  # its alpha is a power
        (torch.optim.SGD, {"lr": 0.1}, None),
        (torch.optim.Adagrad, {}, None),
        (torch.optim.Rprop, {}, None),
    ],
)
def test_the_second_moment_of_torchs_optimizers(cls: Any, options: dict[str, Any], beta2: float | None) -> None:
    optimizer = cls([nn.Parameter(torch.ones(2))], **options)
    assert second_moment.decay(optimizer, optimizer.param_groups[0]) == beta2
