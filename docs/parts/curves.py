"""The curves of optimizers, from `benchmarks/results/optimizer_curves.json`, as pictures and tables of their pages.

Where the file is missing, pages say nothing of curves. It holds:

    {"about": {"command": "...", "torch": "...", "lightning": "...", "machine": "..."},
     "tasks": [{"name": "digits", "title": "digits, 20 epochs", "x": "epoch", "y": "validation loss",
                "metric": "test accuracy", "better": "higher"}],
     "runs": [{"task": "digits", "optimizer": "adan", "options": {"lr": 0.02, "weight_decay": 0.02}, "seed": 0,
               "x": [1, 2, 3], "y": [0.9, 0.3, 0.1], "metric": 0.977}]}

`optimizer` is a word of a config, `options` are those of its best learning rate in the grid, and there is one run for
each seed. A run that diverged has the points until then, and null as its metric.
"""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from pathlib import Path
from typing import Any

from docs.parts.markdown import table, yaml_value

ROOT = Path(__file__).parents[2]
FILE = ROOT / "benchmarks" / "results" / "optimizer_curves.json"
PICTURES = ROOT / "docs" / "pictures" / "optimizers"
REFERENCE = "adamw"

Results = dict[str, Any]


def results() -> Results | None:
    return json.loads(FILE.read_text()) if FILE.exists() else None


def runs_of(found: Results, name: str, task: str) -> list[Results]:
    return [run for run in found["runs"] if run["optimizer"] == name and run["task"] == task]


def section(name: str, found: Results | None) -> str:
    """The picture and the table of one optimizer; empty where there are no results."""
    if found is None or not any(run["optimizer"] == name for run in found["runs"]):
        return ""
    words = " and ".join(task["title"] for task in found["tasks"] if runs_of(found, name, task["name"]))
    rows = []
    for task in found["tasks"]:
        for who in dict.fromkeys((name, REFERENCE)):
            if runs := runs_of(found, who, task["name"]):
                setting = ", ".join(f"`{key}: {yaml_value(value)}`" for key, value in runs[0]["options"].items())
                rows.append([task["title"], f"`{who}`", setting or "defaults", len(runs), *final(runs, task)])
    head = ["task", "optimizer", "settings", "seeds", "metric", "mean ± spread over seeds"]
    return (
        f"![{name} beside AdamW: {words}](../pictures/optimizers/{name}.svg)\n\n"
        f"Each at the best learning rate of a small grid; lines are means over seeds, bands their range "
        f"(`{found['about']['command']}`).\n\n" + table(head, rows)
    )


def final(runs: list[Results], task: Results) -> tuple[str, str]:
    values = [run["metric"] for run in runs if run["metric"] is not None]
    if not values:
        return task["metric"], "diverged"
    spread = f" ± {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    lost = f", {len(runs) - len(values)} of {len(runs)} diverged" if len(values) < len(runs) else ""
    return task["metric"], f"{statistics.mean(values):.4g}{spread}{lost}"


def digest(found: Results, name: str) -> str:
    """What a picture was drawn from. It stands in the picture, so that a test finds a picture that is not current."""
    parts = [found["tasks"], [run for run in found["runs"] if run["optimizer"] in (name, REFERENCE)]]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def is_current(found: Results, name: str, folder: Path = PICTURES) -> bool:
    """Whether a picture was drawn from these results."""
    path = folder / f"{name}.svg"
    return path.exists() and digest(found, name) in path.read_text()


def draw_all() -> list[Path]:
    """Draw the pictures that are missing or not current."""
    found = results()
    names = dict.fromkeys(run["optimizer"] for run in found["runs"]) if found else {}
    return [draw(found, name) for name in names if found and not is_current(found, name)]


def draw(found: Results, name: str, folder: Path = PICTURES) -> Path:
    """One picture: a panel for each task, with AdamW in grey beside the optimizer."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    tasks = [task for task in found["tasks"] if runs_of(found, name, task["name"])]
    mark = digest(found, name)
    with plt.rc_context({"svg.hashsalt": mark, "svg.fonttype": "none", "font.size": 9, "font.family": "sans-serif"}):
        figure, axes = plt.subplots(1, len(tasks), figsize=(4.2 * len(tasks), 2.9), squeeze=False)
        for axis, task in zip(axes[0], tasks, strict=True):
            for who, color in {REFERENCE: "#888888", name: "#2a6fbb"}.items():
                curve(axis, runs_of(found, who, task["name"]), who, color)
            axis.set(title=task["title"], xlabel=task["x"], ylabel=task["y"], yscale="log")
            axis.grid(alpha=0.25)
            axis.legend(frameon=False)
        figure.tight_layout()
        path = folder / f"{name}.svg"
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Date": None, "Description": mark})
        plt.close(figure)
    return path


def curve(axis: Any, runs: list[Results], label: str, color: str) -> None:
    """The mean over seeds, as far as all seeds went, and the range between them."""
    length = min((len(run["x"]) for run in runs), default=0)
    if not length:
        return
    x, columns = runs[0]["x"][:length], list(zip(*(run["y"][:length] for run in runs), strict=True))
    kept = [(at, column) for at, column in zip(x, columns, strict=True) if all(map(math.isfinite, column))]
    if not kept:
        return
    places, kept_columns = zip(*kept, strict=True)
    axis.plot(places, [statistics.mean(column) for column in kept_columns], label=label, color=color, linewidth=1.4)
    axis.fill_between(places, list(map(min, kept_columns)), list(map(max, kept_columns)), color=color, alpha=0.15, lw=0)
