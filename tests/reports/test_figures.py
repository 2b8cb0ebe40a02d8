"""Where matplotlib is not installed: whoever asks for a figure hears the command that installs it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.analysis.depth_profile import DepthProfile
from lightning_optim.errors import EXTRAS, MissingPackageError, OptionError, needed, pip_command
from lightning_optim.reports import depth_profile, figures, local_geometry, memory_views, spectrum
from lightning_optim.reports.memory import Entry
from tests.harness.missing import without

ROOT = Path(__file__).parents[2]
PROFILE = DepthProfile(0, "body", ("0", "1"), {"block": (1.0, 2.0)}, ())
MEMORY = memory_views.OptimizerMemory("Adan", ["all"], [[Entry(0, "exp_avg", "float32", 1, 4)]])
FIGURES: dict[str, Callable[[], Any]] = {
    "depth": lambda: depth_profile.picture([PROFILE]),
    "memory": lambda: memory_views.picture(MEMORY),
    "density": lambda: spectrum.density_figure(torch.ones(2), torch.ones(2), "title"),
    "local geometry": lambda: local_geometry.trajectories({}),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_that_is_asked_for_says_what_is_missing(name: str) -> None:
    with without("matplotlib"), pytest.raises(MissingPackageError) as found:
        FIGURES[name]()
    assert str(found.value) == (
        "A figure needs matplotlib, which is not installed. Type: pip install 'lightning-optim[plots]'"
    )
    assert isinstance(found.value, OptionError)
    assert isinstance(found.value, ImportError)


def test_a_callback_says_once_that_it_logs_none(caplog: pytest.LogCaptureFixture) -> None:
    with without("matplotlib"), caplog.at_level("INFO"):
        assert not any(figures.can_draw(owner) for owner in ("One", "Other", "One"))
    said = [record.getMessage() for record in caplog.records]
    assert [line.partition(" ")[0] for line in said] == ["One", "Other"]
    assert all(line.endswith("Type: pip install 'lightning-optim[plots]'") for line in said)
    assert figures.can_draw("One")


def test_a_package_that_is_there_and_does_not_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with without("matplotlib"):
        del sys.modules["matplotlib"]
        (tmp_path / "matplotlib.py").write_text("raise ImportError('libpng is too old')")
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        with pytest.raises(MissingPackageError, match=r"does not import \(libpng is too old\). Type: pip install"):
            needed("matplotlib", "This")


@pytest.mark.parametrize("package", EXTRAS)
def test_the_command_names_an_extra_that_brings_it(package: str) -> None:
    extra = pip_command(package).partition("[")[2].partition("]")[0]
    distribution = {"sklearn": "scikit-learn"}.get(package, package)
    [line] = [line for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith(f"{extra} = [")]
    assert f'"{distribution}>=' in line
