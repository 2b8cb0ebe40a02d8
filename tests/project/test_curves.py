"""Pictures and tables of optimizers come from committed races, and pictures are those of the results that are there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from docs.parts import curves, races

TASKS = [
    {"name": "digits", "title": "digits, 3 epochs", "x": "epoch", "y": "validation loss"}
    | {"metric": "validation accuracy", "better": "higher"},
    {"name": "text", "title": "text, 60 steps", "x": "step", "y": "training loss"}
    | {"metric": "validation loss", "better": "lower"},
]


def run(task: str, optimizer: str, seed: int, y: list[float], metric: float | None) -> dict[str, Any]:
    found = {"task": task, "optimizer": optimizer, "options": {"lr": 0.01}, "seed": seed}
    return {**found, "x": list(range(1, len(y) + 1)), "y": y, "metric": metric}


SAMPLE: dict[str, Any] = {
    "about": {"command": "python -m benchmarks.optimizer_curves"},
    "tasks": TASKS,
    "runs": [
        run("digits", "adamw", 0, [1.0, 0.5, 0.2], 0.96),
        run("digits", "adamw", 1, [1.1, 0.4, 0.3], 0.98),
        run("digits", "lion", 0, [1.0, 0.3, 0.1], 0.99),
        run("digits", "lion", 1, [1.0, 2.0], None),
        run("text", "adamw", 0, [3.0 / n for n in range(1, 61)], 2.1),
        run("text", "lion", 0, [3.0], None),
    ],
}


def test_a_section_has_the_mean_over_seeds_and_says_what_diverged() -> None:
    text = curves.section("lion", SAMPLE)
    assert "| digits, 3 epochs | `adamw` | `lr: 0.01` | 2 | validation accuracy | 0.97 ± 0.014 |" in text
    assert "| digits, 3 epochs | `lion` | `lr: 0.01` | 2 | validation accuracy | 0.99, 1 of 2 diverged |" in text
    assert "| text, 60 steps | `lion` | `lr: 0.01` | 1 | validation loss | diverged |" in text
    assert curves.section("adan", SAMPLE) == curves.section("lion", None) == ""


def test_the_page_on_which_to_use_has_the_best_first() -> None:
    digits, text = races.races(SAMPLE).split("**text, 60 steps**")
    assert digits.index("[`lion`]") < digits.index("[`adamw`]")
    assert text.index("[`adamw`]") < text.index("[`lion`]")  # what diverged is last


def test_a_picture_is_small_and_says_of_what_it_is(tmp_path: Path) -> None:
    path = curves.draw(SAMPLE, "lion", tmp_path)
    assert path.stat().st_size < 100_000
    assert curves.is_current(SAMPLE, "lion", tmp_path)
    later = {**SAMPLE, "runs": [run("digits", "lion", 0, [1.0, 0.2, 0.1], 0.99), *SAMPLE["runs"][3:]]}
    assert not curves.is_current(later, "lion", tmp_path)


def test_committed_pictures_are_current() -> None:
    """Where this fails: run `make docs`, and commit what it has drawn."""
    found = curves.results()
    names = dict.fromkeys(run["optimizer"] for run in found["runs"]) if found else {}
    assert [name for name in names if found and not curves.is_current(found, name)] == []
    pictures = [*(curves.ROOT / "docs").rglob("*.svg"), *(curves.ROOT / "docs").rglob("*.png")]
    assert [path.name for path in pictures if path.stat().st_size > 100 * 1024] == []
