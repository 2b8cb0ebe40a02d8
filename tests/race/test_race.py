"""Races on functions: grids that grow, runs that fail, folders that continue."""

from __future__ import annotations

import json
import math
import os
import signal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lightning_optim.errors import OptionError
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.comparison import Comparison
from lightning_optim.race.files import save
from lightning_optim.race.outcome import Outcome
from lightning_optim.race.race import Race


def valley(candidate: Candidate, seed: int, lr: float) -> dict[str, Any]:
    """A loss whose best learning rate is 0.01 for all, with a level of each candidate."""
    level = float(candidate.spec or 0.0)
    end = level + abs(math.log10(lr) + 2) + 0.1 * math.sin(7 * seed + 1) + 0.01 * math.sin(seed * (3 + 1000 * level))
    return {"loss": [end + 2, end + 1, end], "same": 1 + level * (1 + 1e-3 * math.sin(seed))}


class Counted:
    """A run that counts, and stops like Ctrl-C before a certain one."""

    def __init__(self, stop_before: int = -1) -> None:
        self.count, self.stop_before = 0, stop_before

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> dict[str, Any]:
        if self.count == self.stop_before:
            raise KeyboardInterrupt
        self.count += 1
        return valley(candidate, seed, lr)


def troubled(candidate: Candidate, seed: int, lr: float) -> dict[str, Any]:
    """Runs that fail in every way."""
    if candidate.name == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if candidate.name == "stops":
        raise KeyboardInterrupt
    if candidate.name == "raises":
        raise RuntimeError("shapes do not fit\nmore")
    if candidate.name == "diverges" and lr > 0.02:
        return {"loss": float("nan")}
    return valley(candidate, seed, lr)


def two(*levels: float) -> list[Candidate]:
    return [Candidate(f"c{i}", 0.01, level) for i, level in enumerate(levels or (0.0, 1.0))]


def test_the_best_learning_rate_has_the_best_mean_and_differences_are_paired() -> None:
    race = Race(valley, two(), seeds=[0, 1, 2, 3])
    first, other = race.go()
    assert (first.best and first.best.lr, other.best and other.best.lr) == (0.01, 0.01)
    assert other.difference is not None
    assert other.difference.mean == pytest.approx(1.0, abs=0.02)
    assert other.p is not None
    assert other.p < 1e-4
    assert other.verdict.startswith("c1 is worse than c0: loss is higher by ")
    assert first.outcomes[0].curves["loss"][0] == [1, 2, 3]
    maximized = Race(valley, two(), seeds=[0, 1, 2, 3], mode="max", extend=0).go()
    assert maximized[1].verdict.startswith("c1 is better than c0")


def test_no_difference_is_said() -> None:
    _, other = Race(valley, two(0.0, 0.001), seeds=[0, 1, 2], factors=[1.0]).go()
    assert other.verdict.startswith("No difference seen between c1 and c0 with 3 seeds (p = ")
    _, other = Race(valley, two(0.0, 1e-9), seeds=[0, 1, 2], factors=[1.0], metric="same").go()
    assert other.difference is not None
    assert other.difference.p is not None
    assert other.difference.p < 1e-4
    assert other.verdict == "c1 and c0 differ by rounding only (1e-09, 3 seeds)."
    _, other = Race(valley, two(), seeds=[0]).go()
    assert "With one seed no difference can be told from chance" in other.verdict


@pytest.mark.parametrize(("centre", "extend", "best", "edge"), [(1e-3, 2, 0.009, False), (1e-4, 2, 0.0027, True)])
def test_a_grid_grows_where_the_best_lies_at_its_edge(centre: float, extend: int, best: float, edge: bool) -> None:
    race = Race(valley, [Candidate("far", centre)], seeds=[0, 1], extend=extend)
    (found,) = race.go()
    assert race.metric is not None
    assert found.best is not None
    assert (found.best.lr, found.at_edge) == (best, edge)
    assert len(found.points) == 5
    assert (
        "The best learning rate of far lies at the edge" in str(Comparison([found], race.metric, race.runs))
    ) == edge
    (alone,) = Race(valley, [Candidate("far", centre)], seeds=[0, 1], factors=[1.0]).go()
    assert (len(alone.points), alone.at_edge) == (1, False)


def test_failures_cost_their_run_only() -> None:
    names = ["good", "diverges", "raises"]
    race = Race(troubled, [Candidate(name, 0.01) for name in names], seeds=[0, 1])
    good, diverges, raises = race.go()
    assert good.best is not None
    assert set(good.best.values) == {0, 1}
    assert diverges.best is not None
    assert (diverges.best.lr, diverges.note) == (0.01, "It failed at lr 0.03.")
    assert raises.note == "RuntimeError: shapes do not fit."
    assert "nothing is said" in raises.verdict
    assert len([key for key in race.runs if key[0] == "raises"]) == 3  # the rest is left out


def test_a_candidate_that_always_diverges_is_tried_at_lower_learning_rates() -> None:
    candidates = [Candidate("good", 0.01), Candidate("diverges", 3.0)]
    _, found = Race(troubled, candidates, seeds=[0, 1]).go()
    assert [point.lr for point in found.points] == [0.081, 0.27, 0.9, 3.0, 9.0]
    assert found.verdict.startswith("diverges finished no run")


def test_a_process_that_dies_costs_its_run_only(capfd: pytest.CaptureFixture[str]) -> None:
    candidates = [Candidate("good", 0.01), Candidate("dies", 0.01), Candidate("stops", 0.01)]
    good, dies, stops = Race(troubled, candidates, seeds=[0, 1], factors=[1.0], processes=2).go()
    alone = Race(troubled, candidates[:1], seeds=[0, 1], factors=[1.0]).go()
    assert good.best == alone[0].best
    assert dies.note == "its process ended with SIGKILL."
    assert stops.note == "its process ended with status 0."
    assert "Traceback" not in capfd.readouterr().err


def test_a_race_is_stopped_and_continued(tmp_path: Path) -> None:
    settings = {"model": "a"}
    with pytest.raises(KeyboardInterrupt):
        Race(Counted(5), two(), folder=tmp_path, settings=settings).go()
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"candidate": "c0", "lr')  # cut off
    whole = Race(Counted(), two()).go()
    rest = Counted()
    continued = Race(rest, two(), folder=tmp_path, settings=settings).go()
    assert rest.count == 18 - 5
    assert [one.best for one in continued] == [one.best for one in whole]
    again, more = Counted(), Counted()
    Race(again, two(), folder=tmp_path, settings=settings).go()
    Race(more, two(), folder=tmp_path, settings=settings, seeds=[0, 1, 2, 3]).go()
    assert (again.count, more.count) == (0, 6)
    changed = Counted()
    Race(changed, two(0.0, 2.0), folder=tmp_path, settings=settings).go()  # another spec under the same name
    assert changed.count == 9


def test_crashed_runs_are_repeated(tmp_path: Path) -> None:
    candidates = [Candidate("good", 0.01), Candidate("raises", 0.01)]
    Race(troubled, candidates, seeds=[0], folder=tmp_path).go()
    again = Counted()
    Race(again, candidates, seeds=[0], folder=tmp_path).go()
    assert again.count == 3


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    Race(valley, two(), seeds=[0], folder=tmp_path / "race", settings={"model": {"width": 8}, "epochs": 1}).go()
    with pytest.raises(OptionError, match=r"holds runs with model\.width=8, and here it is 16, and 1 other settings"):
        Race(valley, two(), folder=tmp_path / "race", settings={"model": {"width": 16}, "epochs": 2})
    (tmp_path / "notes.txt").touch()
    with pytest.raises(OptionError, match=r"holds something else \(notes\.txt, race\), and no race"):
        Race(valley, two(), folder=tmp_path)
    with pytest.raises(OptionError, match="cannot be used"):
        Race(valley, two(), folder=tmp_path / "notes.txt")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "settings.json").write_text('{"a": 1}')
    with pytest.raises(OptionError, match="is not of a race"):
        Race(valley, two(), folder=tmp_path / "other")
    race = Race(valley, two(), folder=tmp_path / "third")
    (tmp_path / "third" / "runs.jsonl").mkdir(parents=True)
    with pytest.raises(OptionError, match=r"third cannot be used: .*Is a directory"):
        race.go()
    with pytest.raises(OptionError, match=r"third cannot be used: .*Is a directory"):
        Race(valley, two(), folder=tmp_path / "third")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"candidates": []}, "there is no candidate"),
        ({"candidates": [Candidate("a", 1.0), Candidate("a", 2.0)]}, "candidate 'a' is there twice"),
        ({"candidates": [Candidate("a", -1.0)]}, "lr=-1.0 must be a number above 0"),
        ({"seeds": []}, "at least one"),
        ({"seeds": [1, 1]}, "a seed twice"),
        ({"seeds": [-1]}, "whole number of 0 or more"),
        ({"factors": 0}, "must be factors above 0"),
        ({"factors": []}, "must be factors above 0"),
        ({"factors": [0.0, 1.0]}, "must be factors above 0"),
        ({"factors": [1.0, 1.0]}, "a factor twice"),
        ({"extend": -1}, "extend=-1"),
        ({"processes": 0}, "processes=0"),
        ({"mode": "up"}, "mode='up' must be 'min' or 'max'"),
        ({"metric": "los"}, "no metric 'los'. Did you mean loss"),
    ],
)
def test_wrong_arguments(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Race(valley, **{"candidates": two(), **options}).go()


def test_where_nothing_finishes_the_reasons_are_said() -> None:
    with pytest.raises(OptionError, match=r"no run has finished.*raises: RuntimeError: shapes do not fit"):
        Race(troubled, [Candidate("raises", 0.01)]).go()


class Tags(HTMLParser):
    """Tags that are open, and what would be fetched."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "data")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [str(value) for key, value in attrs if key in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_needs_nothing_else_and_has_the_numbers_of_the_table(tmp_path: Path) -> None:
    candidates = [Candidate("<b>&", 0.01, 0.0), *(Candidate(f"c{i}", 0.01, i) for i in range(9))]
    race = Race(valley, candidates, seeds=[0, 1])
    standings = race.go()
    assert race.metric is not None
    comparison = Comparison(standings, race.metric, race.runs, {"command": "a < b"})
    names = [path.name for path in save(comparison, tmp_path)]
    assert names == ["race.html", "race.png", "result.json"]
    html = (tmp_path / "race.html").read_text()
    tags = Tags()
    tags.feed(html)
    assert (tags.open, tags.fetched) == ([], [])
    assert "url(" not in html
    assert "@import" not in html
    assert {cell for row in comparison.rows() for cell in row} <= set(tags.texts)
    assert html.count('<svg viewBox="0 0 480 300"') == 2
    assert (tmp_path / "race.png").read_bytes().startswith(b"\x89PNG")
    data = json.loads((tmp_path / "result.json").read_text())
    assert [one["candidate"] for one in data["candidates"]] == [one.name for one in standings]
    assert data["candidates"][0]["values"]["1"] == valley(candidates[0], 1, 0.01)["loss"][-1]


def test_an_outcome_survives_its_file() -> None:
    outcome = Outcome("diverged", "nan", {"a": math.inf}, {"a": ([1, 2], [1.0, math.inf])}, 2, 0.5, None, 8, {"x": "y"})
    assert Outcome.from_json(json.loads(json.dumps(outcome.as_json(), allow_nan=False))) == outcome
    with pytest.raises(OptionError, match="neither a number nor a list"):
        Outcome.of({"loss": "low"})
    with pytest.raises(OptionError, match="not metrics by name"):
        Outcome.of(0.5)
