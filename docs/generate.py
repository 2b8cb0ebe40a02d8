"""Generates the tables of README.md and pages of docs/ from classes and results: `python docs/generate.py`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lightning_optim.config.catalog import markdown

ROOT = Path(__file__).parent.parent
PART = re.compile(r"(<!-- optimizers: [^\n]*-->\n).*?(<!-- end of optimizers -->\n)", re.DOTALL)


def readme(text: str) -> str:
    """The README with current tables of optimizers and recipes."""
    return PART.sub(lambda match: match[1] + "\n" + markdown() + "\n" + match[2], text)


def race(results: str) -> str:
    """The page that compares all optimizers on the digits, from its committed result."""
    found = json.loads(results)
    about = found["about"]
    lines = [
        "# All optimizers on the digits",
        "",
        "This page compares every optimizer and recipe on the handwritten digits, each with the options that its page",
        "records as `recommended`. It is one run with one seed, so a difference of a percent means nothing.",
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


if __name__ == "__main__":
    (ROOT / "docs" / "digits_race.md").write_text(race((ROOT / "benchmarks/results/digits_race.json").read_text()))
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text()))
