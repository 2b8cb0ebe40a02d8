"""What must hold before anything is imported, and before each test."""

import importlib.util
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small here: a second thread only waits

import pytest
import torch

# Triton reads this while it is imported, which Lightning does: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from tests.harness.engines import exact_roots, quiet_interpreter, torch_functions  # noqa: F401  fixtures of several rooms
from tests.harness.looking import one_call, way_of_looking  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    """Know the option of pytest-timeout where that is missing, as on a lent machine with a GPU."""
    if importlib.util.find_spec("pytest_timeout") is None:
        parser.addini("timeout", "seconds that a test may take")


@pytest.fixture(autouse=True)
def _no_seed_of_another_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning keeps a seed in the environment, from where whoever comes next would take it."""
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.delenv(name, raising=False)
