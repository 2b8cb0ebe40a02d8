"""Every callback shows what it does, in an example that runs as a doctest."""

from __future__ import annotations

import doctest

import pytest

from lightning_optim import callbacks


@pytest.mark.parametrize("name", callbacks.__all__)
def test_every_callback_has_an_example_that_fits(name: str) -> None:
    source = "".join(example.source for example in doctest.DocTestParser().get_examples(vars(callbacks)[name].__doc__))
    assert "Trainer(" in source
    assert f"{name}(" in source
    assert ".fit(" in source
