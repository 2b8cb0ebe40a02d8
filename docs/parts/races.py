"""What our own races say, for the page on which optimizer to use: from committed results alone."""

from __future__ import annotations

import json
import statistics
from typing import Any

from docs.parts import curves
from docs.parts.facts import RESULTS
from docs.parts.markdown import table, yaml_value

TASKS = {"digits": "digits, validation loss", "bytes": "bytes of source text, validation loss"}


def section() -> str:
    """The races over several seeds, and the race of all on the digits, which is one run each."""
    found = curves.results()
    return "\n\n".join([races(found)] if found else [few_seeds(), many_words()])


def few_seeds() -> str:
    """Five optimizers at 32 bits, with seven seeds each: means and spread over seeds."""
    runs = json.loads((RESULTS / "train_quality.json").read_text())["runs"]
    rows = []
    for name in dict.fromkeys(run["optimizer"] for run in runs):
        cells = []
        for task in TASKS:
            values = [r["held_out_loss"] for r in runs if (r["optimizer"], r["task"], r["bits"]) == (name, task, 32)]
            cells.append(f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}")
        rows.append([f"[`{name}`](optimizers/{name}.md)", *cells])
    return (
        "Five optimizers with seven seeds each, at rates from a few short trials "
        "(`python -m benchmarks.train_quality`). A lower loss is better; ± is the standard deviation over seeds.\n\n"
    ) + table(["optimizer", *TASKS.values()], rows)


def many_words() -> str:
    found = json.loads((RESULTS / "digits_race.json").read_text())["runs"]
    accuracies = sorted(run["test/accuracy"] for run in found)
    low, middle, high = (100 * accuracies[i] for i in (0, len(accuracies) // 2, -1))
    return (
        f"All {len(found)} words on the digits, one run each: test accuracies from {low:.1f} % to {high:.1f} %, "
        f"half of them above {middle:.1f} % ([table](digits_race.md)). With 300 test images and one seed, differences "
        "below 2 % mean nothing."
    )


def races(found: curves.Results) -> str:
    """All that were raced over seeds and learning rates, best first, each beside AdamW."""
    parts = []
    for task in found["tasks"]:
        names = dict.fromkeys(run["optimizer"] for run in found["runs"] if run["task"] == task["name"])
        means = {name: mean(curves.runs_of(found, name, task["name"])) for name in names}
        sign = -1 if task["better"] == "higher" else 1
        order = sorted(names, key=lambda name: (means[name] is None, sign * (means[name] or 0.0)))
        rows = []
        for name in order:
            runs = curves.runs_of(found, name, task["name"])
            setting = ", ".join(f"`{key}: {yaml_value(value)}`" for key, value in runs[0]["options"].items())
            rows.append([f"[`{name}`](optimizers/{name}.md)", setting, len(runs), curves.final(runs, task)[1]])
        parts.append(f"**{task['title']}**, {task['metric']} ({task['better']} is better):")
        parts.append(table(["optimizer", "best of its grid", "seeds", "mean ± spread over seeds"], rows))
    return f"`{found['about']['command']}`\n\n" + "\n\n".join(parts)


def mean(runs: list[dict[str, Any]]) -> float | None:
    values = [run["metric"] for run in runs if run["metric"] is not None]
    return statistics.mean(values) if values else None
