"""Generated pages are what classes and results say now, and links lead somewhere."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lightning_optim import list_optimizers

ROOT = Path(__file__).parents[2]


def test_tables_are_current() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for path, text in generate.pages().items():
        assert path.read_text() == text, f"{path.name} is not current: run `make docs`"
    for name in ("README.md", "docs/digits_race.md"):
        page = (ROOT / name).read_text()
        assert all(f"| `{word}` |" in page for word in list_optimizers())


def test_links_lead_somewhere() -> None:
    import re

    pages = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    for page in [*pages, *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
