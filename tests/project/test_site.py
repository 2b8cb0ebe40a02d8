"""The site builds from the pages without a warning, needs no network, and fits a phone."""

from __future__ import annotations

import json
import re
import shutil
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


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Shows each page as wide as a phone, one after another, and writes down those that are wider.
MEASURE = """<!doctype html>
<iframe id=phone style="width:390px;height:844px;border:0"></iframe>
<pre id=found></pre>
<script>
const phone = document.getElementById("phone"), pages = PAGES, wide = [];
const next = () => {
  if (!pages.length) { document.getElementById("found").textContent = `done: ${JSON.stringify(wide)}`; return; }
  const page = pages.shift();
  phone.onload = () => {
    // The theme lets headings and tables reach 8 pixels into the margin.
    const parts = phone.contentDocument.querySelectorAll("html, body, .page, .main, .content, article");
    const much = part => part.scrollWidth > part.clientWidth + (part.nodeName === "ARTICLE" ? 8 : 0);
    const found = [...parts].filter(much).map(part => part.nodeName);
    if (found.length) wide.push([page, found]);
    next();
  };
  phone.src = page;
};
next();
</script>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed: apt-get install chromium")
def test_no_page_is_wider_than_a_phone(site: Path, tmp_path: Path) -> None:
    """Tables, code and formulas scroll within themselves."""
    assert CHROMIUM is not None
    pages = sorted(page.as_uri() for page in site.rglob("*.html") if page.parent != site / "_static")
    assert len(pages) > 80
    start = tmp_path / "measure.html"
    start.write_text(MEASURE.replace("PAGES", json.dumps(pages)))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    options += ["--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--virtual-time-budget=120000"]
    done = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", start.as_uri()], capture_output=True, text=True, timeout=240
    )
    found = re.search(r"done: (\[.*\])</pre>", done.stdout)
    assert found, done.stdout[-500:] + done.stderr[-500:]
    assert json.loads(found[1]) == []
