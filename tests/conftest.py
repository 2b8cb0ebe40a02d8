"""What must hold before anything is imported, and which tests run when nobody chooses."""

import os

import pytest
import torch

# Triton reads this while it is imported, which Lightning does: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full: a long cross product, run by -m full")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked full, unless markers are chosen."""
    if not config.getoption("markexpr"):
        full = [item for item in items if item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)
        items[:] = [item for item in items if item not in full]
