"""Generates tables of README.md, pages of docs/ and the formulas in docstrings: `python docs/generate.py`."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path

from lightning_optim.config.catalog import markdown, reference
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.docstrings import with_formula
from lightning_optim.language.formula import formula

ROOT = Path(__file__).parent.parent


def replace_part(text: str, name: str, content: str) -> str:
    """A page with new content between the markers of a generated part."""
    part = re.compile(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end of {name} -->\n)", re.DOTALL)
    return part.sub(lambda match: f"{match[1]}\n{content.rstrip()}\n\n{match[2]}", text)


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


def pages() -> dict[Path, str]:
    """Every page with generated content, as it should be now."""
    results, docs = ROOT / "benchmarks" / "results", ROOT / "docs"
    table = matrix((results / "checkpoint_matrix.json").read_text())
    sources = {cls: Path(inspect.getfile(cls)) for cls in OPTIMIZERS.values()}
    return {
        **{path: with_formula(path.read_text(), cls.__name__, formula(cls)) for cls, path in sources.items()},
        docs / "optimizers.md": reference(),
        ROOT / "README.md": replace_part((ROOT / "README.md").read_text(), "optimizers", markdown()),
        docs / "checkpoints.md": replace_part((docs / "checkpoints.md").read_text(), "matrix", table),
        docs / "digits_race.md": race((results / "digits_race.json").read_text()),
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
