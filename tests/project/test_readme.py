"""The README's generated part is what the classes say now."""

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
    text = (ROOT / "README.md").read_text()
    assert generate.readme(text) == text, "run `make docs`"
    assert all(f"| `{name}` |" in text for name in list_optimizers())
    result = (ROOT / "benchmarks" / "results" / "digits_race.json").read_text()
    page = (ROOT / "docs" / "digits_race.md").read_text()
    assert generate.race(result) == page, "run `make docs`"
    assert all(f"| `{name}` |" in page for name in list_optimizers())


def test_links_lead_somewhere() -> None:
    import re

    pages = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    for page in [*pages, *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*/README.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
