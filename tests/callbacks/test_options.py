"""Whatever is given to a callback, it takes it or says in one sentence what it wants."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest

from lightning_optim import OptionError
from lightning_optim.callbacks import (
    BatchSizeScaling,
    GradientNoise,
    GradInit,
    IterateAveraging,
    LookaheadSync,
    OptimizerStateMemory,
    WarmupFreeSchedule,
)

NEEDED: dict[Any, dict[str, Any]] = {BatchSizeScaling: {"reference_batch": 8}}
# Options that are words or flags, where a number is wrong; all others are numbers, where a word is.
WORDS = {"warmup", "decay", "momentum", "evaluate", "kind", "every", "batch_norm", "clipping", "follow", "rule"}
FLAGS = {"ramp", "evaluate_raw", "table", "log", "second_order"}
DECAYS = {(IterateAveraging, "decay"), (GradientNoise, "decay")}
CALLBACKS = [
    *(WarmupFreeSchedule, LookaheadSync, IterateAveraging, GradientNoise, OptimizerStateMemory, GradInit),
    BatchSizeScaling,
]


@pytest.mark.parametrize(
    ("cls", "name"), [(cls, name) for cls in CALLBACKS for name in list(inspect.signature(cls).parameters)]
)
def test_a_wrong_value_gets_a_sentence(cls: Any, name: str) -> None:
    wrong: list[Any] = [[1], {"a": 1}, b"x", math.nan, -math.inf, -1]
    number = name not in FLAGS and name != "csv" and (name not in WORDS or (cls, name) in DECAYS)
    wrong += ["word", "0.5", True] if number else [7.5]
    for value in wrong:
        with pytest.raises(OptionError) as error:
            cls(**{**NEEDED.get(cls, {}), name: value})
        assert str(error.value).startswith(f"{cls.__name__}: {name}={value!r} must be "), value
        assert str(error.value).endswith(".")
