"""The ways in which a step may look at its tensors, as fixtures."""

from __future__ import annotations

import contextlib

import pytest

from lightning_optim.engines import facts, native
from lightning_optim.errors import EngineError

WAYS = ("one call", "guards", "lists")


@pytest.fixture(scope="session", autouse=True)
def one_call() -> None:
    """Have the compiled functions from the first test on: a process has them compiled after many steps."""
    with contextlib.suppress(EngineError):
        native.load()


@pytest.fixture(params=WAYS)
def way_of_looking(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One call of C++, guards of torch and lists where there is none, and lists alone."""
    way = str(request.param)
    if way == "one call" and native.native() is None:
        pytest.skip("no C++ compiler, or no header files")
    if way != "one call":
        monkeypatch.setattr(native, "_native", None)
        monkeypatch.setattr(native, "_looked", -1)
    if way == "lists":
        monkeypatch.setattr(facts, "TensorGuards", None)
    return way
