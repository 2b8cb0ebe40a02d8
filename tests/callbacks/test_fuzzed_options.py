"""Whatever options a callback gets: a fit that runs and can be saved, or our own sentence before training starts."""

from __future__ import annotations

import decimal
import fractions
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lightning_optim import AdamW, OptionError, callbacks
from tests.harness.data import batches
from tests.harness.modules import Make, Toy
from tests.harness.trainers import trainer

CALLBACKS = {name: getattr(callbacks, name) for name in callbacks.__all__}
OPTIONS = {name: inspect.signature(cls).parameters for name, cls in CALLBACKS.items()}
NEEDED: dict[str, dict[str, Any]] = {"BatchSizeScaling": {"reference_batch": 8}, "Communication": {"kind": "powersgd"}}
OPTIMIZERS: list[Make] = [lambda p: AdamW(p, lr=0.01), lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9)]

# Values of many kinds, good and bad ones.
NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 7, 0.0, 0.1, 0.5, 0.75, 0.9, 1.0, 2.0, 2.5, 1e-20, 1 - 1e-16]),
    st.sampled_from(
        [math.nan, math.inf, -math.inf, -1, -0.5, 5e-324, 1e308, 2**53 + 1, 2**63, 2**64, 10**400, -(10**400)]
    ),
    st.sampled_from([np.float32(0.5), np.float64(0.9), np.float16(0.5), np.int64(3), np.uint8(2), np.longdouble(0.5)]),
    st.integers(-3, 100),
    st.floats(0, 1),
    st.floats(),
    st.integers(),
)
OTHERS: list[Any] = [
    *(None, True, False, np.bool_(True), "", "epoch", "word", "0.5", b"x", [], [1], (1, 2), {}, {"a": 1}, set()),
    *(np.array(3), np.array([1, 2]), torch.tensor(0.5), torch.tensor([1, 2]), torch.tensor(True)),
    *(fractions.Fraction(1, 2), decimal.Decimal("0.5"), 1j, object(), int, abs, Path("x.csv"), Path()),
    *("no/such/folder/x.csv", "null\0byte", "é" * 300),
]


def words_of(cls: Any, name: str) -> list[Any]:
    """The words that the type of an option allows."""
    found, left = [], [get_type_hints(cls.__init__)[name]]
    while left:
        kind = left.pop()
        if get_origin(kind) is Literal:
            found += list(get_args(kind))
        else:
            left += get_args(kind)
    return found


def values_of(cls: Any, name: str) -> st.SearchStrategy[Any]:
    words = words_of(cls, name)
    good = st.sampled_from(words) if words else NUMBERS
    return st.one_of(good, good, NUMBERS, st.sampled_from(OTHERS))


def options_of(name: str) -> st.SearchStrategy[dict[str, Any]]:
    cls = CALLBACKS[name]
    every = {option: values_of(cls, option) for option in OPTIONS[name]}
    needed = {option: every.pop(option) for option in list(every) if OPTIONS[name][option].default is inspect._empty}
    return st.fixed_dictionaries(needed, optional=every)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A folder to write to, wherever the path of a file leads."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("fuzz"))
    yield
    os.chdir(before)


def serves(make_callback: Callable[[], Any], make: Make) -> None:
    """Take the options, train two steps and write a checkpoint that loads; or refuse before the first step."""
    module = Toy(make)
    try:
        callback = make_callback()
        # GradInit takes no more iterations than a test run has batches
        run = (
            trainer(callback, fast_dev_run=2)
            if "GradInit" in type(callback).__name__
            else trainer(callback, max_steps=2)
        )
        run.fit(module, batches(), batches(batch_size=16))
    except (OptionError, FloatingPointError) as error:
        told, steps = str(error), len(module.losses)
    else:
        run.save_checkpoint("last.ckpt")
        torch.load("last.ckpt", weights_only=True)
        return
    assert not steps, "refused in the middle of training"
    assert told[0].isupper() or told.startswith("communication"), told
    assert told.rstrip()[-1] in ".?", told


@pytest.mark.parametrize("name", [name for name in CALLBACKS if OPTIONS[name]])
def test_any_options_serve_or_are_refused_in_words(name: str) -> None:
    @settings(
        max_examples=15, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(options_of(name), st.sampled_from(OPTIMIZERS))
    def check(options: dict[str, Any], make: Make) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            serves(lambda: CALLBACKS[name](**options), make)

    check()


@pytest.mark.parametrize(("name", "option"), [(name, option) for name in CALLBACKS for option in OPTIONS[name]])
def test_any_value_of_one_option_serves_or_is_refused_in_words(name: str, option: str) -> None:
    needed = NEEDED.get(name, {})

    @settings(
        max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
    )
    @given(values_of(CALLBACKS[name], option))
    def check(value: Any) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            serves(lambda: CALLBACKS[name](**{**needed, option: value}), OPTIMIZERS[0])

    check()
