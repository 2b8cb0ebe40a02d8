"""Generates pages of docs/, tables of README.md, and the formulas in docstrings: `python -m docs.generate`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from docs.parts import api_pages, callback_pages, curves, facts, optimizer_pages, races, schedule_pages
from docs.parts.markdown import replace_part
from lightning_optim.config.recipes import RECIPES
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.docstrings import with_formula
from lightning_optim.language.formula import formula
from tools import versions

ROOT = Path(__file__).parent.parent


def matrix(results: str) -> str:
    """The table of checkpoints between strategies, from its committed result."""
    found = json.loads(results)
    saved = list(dict.fromkeys(entry["saved"] for entry in found))
    loaded = list(dict.fromkeys(entry["loaded"] for entry in found))
    cells = {(entry["saved"], entry["loaded"]): entry for entry in found}

    def cell(row: str, column: str) -> str:
        entry = cells[row, column]
        text = "same" if entry["identical"] else f"{entry['error']:.0e}"
        return text + ("*" if entry["consolidated"] else "")

    def short(setting: str) -> str:
        return re.sub(r" (bits|ranks?)\b", "", setting)

    lines = ["| saved by | " + " | ".join(map(short, loaded)) + " |", "| --- |" + " --- |" * len(loaded)]
    lines += [f"| {short(row)} | " + " | ".join(cell(row, column) for column in loaded) + " |" for row in saved]
    return "\n".join(lines)


def race(results: str) -> str:
    """The page that compares all optimizers on the digits, from its committed result."""
    found = json.loads(results)
    about = found["about"]
    lines = [
        "# All optimizers on the digits",
        "",
        "This page compares every optimizer and recipe on the handwritten digits, each with the options that its page",
        "records as `recommended`: what did best in a few runs on these same digits. They are a small network and",
        "little data, for which learning rates are large; on other data begin with the defaults. It is one run with",
        "one seed, so a difference of a percent means nothing.",
        "",
        f"`python -m examples.digits.race --epochs {about['epochs']} --out benchmarks/results/digits_race.json`",
        f"(seed {about['seed']}, torch {about['torch']}, lightning {about['lightning']}, {about['machine']})",
        "",
        "| optimizer | setting | train loss | val loss | val accuracy | test accuracy |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for run in sorted(found["runs"], key=lambda run: -run["test/accuracy"]):
        setting = ", ".join(f"`{key}={value}`" for key, value in run["options"].items()) or "defaults"
        keys = ("train/loss", "val/loss", "val/accuracy", "test/accuracy")
        lines.append(f"| `{run['name']}` | {setting} | " + " | ".join(f"{run[key]:.3g}" for key in keys) + " |")
    return "\n".join(lines) + "\n"


def schedules(text: str) -> str:
    """The page of schedules with its tables."""
    text = replace_part(text, "schedules", schedule_pages.overview())
    return replace_part(text, "schedule options", schedule_pages.options())


def callback_parts(docs: Path) -> dict[Path, str]:
    """Pages of callbacks with their generated parts: a part stands wherever its markers are."""
    parts = {"callbacks": callback_pages.index(), "races": races.section(), "eight bits": facts.eight_bits()}
    for name in callback_pages.names():
        parts.update(callback_pages.parts(name))
    found = {}
    for path in sorted(docs.glob("*.md")):
        text = path.read_text()
        for name in re.findall(r"<!-- end of (.+) -->", text):
            if name in parts:
                found[path] = text = replace_part(text, name, parts[name])
    return found


def words() -> str:
    """Optimizers and recipes for README, each with a link to its page."""
    optimizers, recipes = (
        ", ".join(f"[`{name}`](docs/optimizers/{name}.md)" for name in sorted(names)) for names in (OPTIMIZERS, RECIPES)
    )
    return f"{optimizers}; and the recipes, which bring their callbacks: {recipes}."


def pages() -> dict[Path, str]:
    """Every page with generated content, as it should be now."""
    results, docs = ROOT / "benchmarks" / "results", ROOT / "docs"
    table = matrix((results / "checkpoint_matrix.json").read_text())
    sources = {cls: Path(inspect.getfile(cls)) for cls in OPTIMIZERS.values()}
    return {
        **callback_parts(docs),
        **{path: with_formula(path.read_text(), cls.__name__, formula(cls)) for cls, path in sources.items()},
        docs / "optimizers.md": optimizer_pages.index(),
        **{docs / "optimizers" / f"{name}.md": optimizer_pages.page(name) for name in sorted(OPTIMIZERS)},
        **{docs / "optimizers" / f"{name}.md": optimizer_pages.recipe_page(r) for name, r in RECIPES.items()},
        **{docs / "api" / api_pages.file_name(module): api_pages.page(module) for module in api_pages.MODULES},
        ROOT / "README.md": replace_part((ROOT / "README.md").read_text(), "optimizers", words()),
        docs / "checkpoints.md": replace_part((docs / "checkpoints.md").read_text(), "matrix", table),
        docs / "schedules.md": schedules((docs / "schedules.md").read_text()),
        docs / "versions.md": versions.page(),
        docs / "digits_race.md": race((results / "digits_race.json").read_text()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    curves.draw_all()
    schedule_pages.draw()
