"""Every operation of the language is one that each printer knows, and that the formula can write."""

from __future__ import annotations

import pytest

from lightning_optim import language
from lightning_optim.engines.compiled.printer import EXPRESSIONS as IN_C
from lightning_optim.engines.triton.printer import EXPRESSIONS as IN_TRITON
from lightning_optim.language.expressions import Writer
from lightning_optim.language.math import FUNCTIONS

OPERATORS = {"add", "sub", "mul", "div", "pow", "neg", "abs", "gt", "ge"}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_operation_is_known_everywhere(name: str) -> None:
    assert name in IN_C
    assert name in IN_TRITON
    assert hasattr(Writer, f"_{name}")
    assert name in OPERATORS or name in language.__all__


def test_printers_know_nothing_else() -> None:
    assert FUNCTIONS.keys() == IN_C.keys() == IN_TRITON.keys()
