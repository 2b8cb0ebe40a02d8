"""A save of codes makes full-precision tensors on the device for one parameter, or one unit of FSDP, at a time."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.save_memory import KINDS, LAYERS, measure
from tests.harness.ranks import run_ranks


def measure_codes(kinds: tuple[str, ...]) -> list[dict[str, Any]]:
    return [measure(kind, 8) for kind in kinds]


@pytest.mark.filterwarnings("ignore::UserWarning")  # what torch says of itself in FSDP1's save
def test_a_save_does_not_decode_everything_on_the_device() -> None:
    """Of 16 layers one is decoded at a time, with up to five tensors of its size to work with beside its two slots.

    FSDP gathers it besides, on two ranks to twice that size. What runs a step allocates nothing of the kind.
    """
    found = run_ranks(measure_codes, KINDS[:1], world_size=1)[0] + run_ranks(measure_codes, KINDS[1:])[0]
    for kind, row in zip(KINDS, found, strict=True):
        one = row["full precision"] / LAYERS  # two slots of a layer
        assert 0 < row["save, device"] <= 4 * one, (kind, row)
        assert row["save, host"] >= row["full precision"], (kind, row)  # where all of it is made
        assert row["step"] < one, (kind, row)
