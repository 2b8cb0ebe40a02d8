"""Triton's interpreter, with torch's elementary functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch


@pytest.fixture
def torch_functions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the interpreter take roots, exponentials and logarithms from torch.

    NumPy's differ from torch's in the last place on a CPU, where neither rounds all of them correctly. With the same
    functions below them everything else must agree bit for bit.
    """
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def use(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def run(self: Any, arg: Any) -> Any:
            values = np.ascontiguousarray(arg.data)
            return interpreter.TensorHandle(function(torch.from_numpy(values.copy())).numpy(), arg.dtype.scalar)

        monkeypatch.setattr(interpreter.InterpreterBuilder, name, run)

    functions = {"exp": torch.exp, "exp2": torch.exp2, "log2": torch.log2, "sqrt": torch.sqrt}
    for name, function in {**functions, "precise_sqrt": torch.sqrt}.items():
        use(f"create_{name}", function)
    with np.errstate(all="ignore"):  # what is masked out may divide by zero
        yield
