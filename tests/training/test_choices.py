"""The choices in signatures, which parsers of configs read, are those of the tables."""

from __future__ import annotations

import typing
from typing import Any

import pytest

from lightning_optim.callbacks import Communication, GradInit, WarmupFreeSchedule
from lightning_optim.distributed.communication import KINDS
from lightning_optim.training.schedules import SCHEDULES
from lightning_optim.training.trial_step import DIRECTIONS
from lightning_optim.training.warmups import WARMUPS


@pytest.mark.parametrize(
    ("callback", "option", "choices"),
    [
        (WarmupFreeSchedule, "decay", {*SCHEDULES}),
        (WarmupFreeSchedule, "warmup", {*WARMUPS, "none"}),
        (GradInit, "follow", {*DIRECTIONS, "optimizer"}),
        (Communication, "kind", {*KINDS}),
    ],
)
def test_the_choices_of_a_signature_are_those_of_the_table(callback: Any, option: str, choices: set[str]) -> None:
    assert set(typing.get_args(typing.get_type_hints(callback.__init__)[option])) == choices
