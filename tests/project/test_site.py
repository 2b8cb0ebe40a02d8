"""The site builds from the pages without a warning, needs no network, and fits a phone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_optim import callbacks, list_optimizers

pytest.importorskip("sphinx", reason="sphinx is in the extra `docs`, for Python 3.11 and newer")

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site. Warnings are errors: of broken links and anchors, and of pages that no other links to."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", "-c", "docs", ".", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-6000:]
    return out


def test_every_optimizer_and_callback_has_a_page(site: Path) -> None:
    for word in list_optimizers():
        assert (site / "docs" / "optimizers" / f"{word}.html").exists(), word
    formula = (site / "docs" / "optimizers" / "adan.html").read_text()
    assert formula.count("<mtr>") >= 6  # MathML, written at build time: one row for each line of the formula
    api = (site / "docs" / "api" / "callbacks.html").read_text()
    assert all(f'id="lightning_optim.callbacks.{name}"' in api for name in callbacks.__all__)


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loaded = re.compile(r'<(?:script|img|iframe)[^>]*\bsrc="(\w+:)?//|<link[^>]*rel="(?!canonical)[^>]*href="(\w+:)?//')
    assert [page.name for page in site.rglob("*.html") if loaded.search(page.read_text())] == []
    imports = re.compile(r"@import|url\((['\"]?)https?:")
    assert [page.name for page in site.rglob("*.css") if imports.search(page.read_text())] == []
