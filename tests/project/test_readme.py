"""Generated pages are what classes and results say now, and links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from docs.generate import pages
from docs.parts.callback_pages import names
from docs.parts.optimizer_pages import snake
from lightning_optim import OptimizerStrategy, list_optimizers

ROOT = Path(__file__).parents[2]


def test_tables_are_current() -> None:
    for path, text in pages().items():
        assert path.read_text() == text, f"{path.name} is not current: run `make docs`"
    for name in ("README.md", "docs/digits_race.md"):
        page = (ROOT / name).read_text()
        assert all(f"`{word}`" in page for word in list_optimizers())


def test_links_lead_somewhere() -> None:
    top = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    for page in [*top, *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("README.md")]:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_callback_has_a_page_in_one_form() -> None:
    """What it does, when, YAML first, and the options of the signature."""
    for name in names():
        page = (ROOT / "docs" / f"{snake(name)}.md").read_text()
        assert page.startswith(f"# {name}\n"), name
        assert "**When to use.**" in page, name
        assert page.index("```yaml") < page.find("```python") or "```python" not in page, name
        assert f"<!-- options of {name}: " in page or "It has no options." in page, name


def test_configs_on_pages_of_optimizers_are_read() -> None:
    for word in list_optimizers():
        page = (ROOT / "docs" / "optimizers" / f"{word}.md").read_text()
        found = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
        assert found
        specs = [yaml.safe_load(text)["model"]["optimizer"] for text in found]
        read = [OptimizerStrategy.parse(spec) for spec in specs]
        assert read[0].name == word
        if len(read) > 1:  # a recipe, spelled out
            assert read[1].optimizer_class is read[0].optimizer_class
