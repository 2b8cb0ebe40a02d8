"""Every experiment at its tiniest size, the rule of verdicts, and what the command refuses."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats

from benchmarks.claims import __main__ as command
from benchmarks.claims.claim import Arm, Part
from benchmarks.claims.experiments import CLAIMS, load
from benchmarks.claims.files import from_plain, write
from benchmarks.claims.finding import NOT_SEEN, OPPOSITE, SEEN, alike, corrected, higher, lower
from benchmarks.claims.page import PAGES, details, findings_of, summary
from benchmarks.claims.results import TUNING
from benchmarks.claims.running import planned, run_claim, run_part
from benchmarks.claims.size import SMALL, TINY
from lightning_optim.errors import OptionError
from lightning_optim.race.candidate import Candidate


@pytest.mark.parametrize("name", CLAIMS)
def test_an_experiment_runs_at_its_tiniest_size(name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    claim = load(name)
    record = run_claim(claim, TINY, tmp_path, processes=1)
    results = from_plain(record, claim, TINY)
    findings = findings_of(claim, results)
    assert findings
    assert all(math.isfinite(one.p) for one in findings)
    figure = claim.draw(results)
    figure.savefig(tmp_path / "picture.png")
    assert all(one.statement in details(claim, findings, record) for one in findings)


@pytest.mark.parametrize("name", CLAIMS)
def test_the_small_size_compares_five_seeds_and_fits(name: str) -> None:
    parts = load(name).parts(SMALL)
    assert all(part.seeds >= 5 and part.bytes < 4e9 for part in parts)
    assert len({part.name for part in parts}) == len(parts)


def test_pages_say_what_the_results_say() -> None:
    found = {}
    for name in CLAIMS:
        claim, record = load(name), json.loads((command.KEPT / f"{name}.json").read_text())
        findings = findings_of(claim, from_plain(record, claim, SMALL))
        found[name] = claim, findings, record
        assert details(claim, findings, record) in (PAGES / "claims" / f"{name}.md").read_text()
        assert (PAGES / "pictures" / f"claim_{name}.png").exists()
    assert summary([claim for claim, _, _ in found.values()], found) in (PAGES / "claims.md").read_text()


@dataclass(frozen=True)
class Parabola:
    """Gradient descent; with each run it leaves a mark in a folder."""

    folder: str
    steps: int = 5

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> dict[str, float]:
        (Path(self.folder) / f"{candidate.name} {lr} {seed}").touch(exist_ok=False)
        x = 1.0 + 0.01 * (seed % TUNING)
        for _ in range(self.steps):
            x -= lr * candidate.spec["curvature"] * x
        return {"loss": x * x + candidate.spec.get("penalty", 0.0)}


def parabola(folder: Path, **terms: Any) -> Part:
    arms = [
        Arm("flat", 0.3, {"curvature": 1.0}, {"penalty": (0.5, 0.0)}),
        Arm("steep", 0.03, {"curvature": 10.0}),
    ]
    return Part("parabola", Parabola(str(folder)), arms, factors=(0.1, 1.0, 3.0), seeds=5, **terms)


def test_arms_choose_on_seeds_of_their_own_and_are_measured_on_others(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    part = parabola(marks, tuning=2)
    found = run_part(part, tmp_path / "runs", processes=1)
    assert (found.best("flat").lr, found.best("flat").options["penalty"]) == (0.9, 0.0)
    assert sorted(found.values("steep")) == [0, 1, 2, 3, 4]
    assert found.rates("steep") == [0.003, 0.03, 0.09]
    assert found.values("steep", 0.03) == {}  # the rate that lost was not measured
    assert len(found.runs) == planned(part) == (2 + 1) * 3 * 2 + 2 * 5
    run_part(part, tmp_path / "runs", processes=1)  # a run that is done again would find its mark


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    part = parabola(marks)
    stop = marks / "steep 0.03 3"
    stop.touch()
    with pytest.raises(OptionError, match=r"steep at lr 0.03 with seed 3 crashed: .*exists"):
        run_part(part, tmp_path / "runs", processes=1)
    stop.unlink()
    found = run_part(part, tmp_path / "runs", processes=1)
    assert len(found.runs) == planned(part) == 3 * 3 * 5
    assert found.mean("flat", 0.9, penalty=0.5) == pytest.approx(0.5, abs=1e-5)
    of_seed_1 = [found.values("steep", lr)[1] for lr in (0.003, 0.03, 0.09)]
    assert found.over_rates("steep")[1] == pytest.approx(sum(of_seed_1) / 3)


def test_p_values_and_effects_are_those_of_scipy() -> None:
    a, b = {i: x for i, x in enumerate((1.0, 1.4, 1.1, 1.9, 1.2))}, {i: 1.1 + 0.1 * i * i for i in range(5)}
    pairs = [a[i] for i in a], [b[i] for i in a]
    found = lower("", a, b, names=("a", "b"))
    assert found.p == pytest.approx(stats.ttest_rel(*pairs).pvalue, rel=1e-9)
    assert found.size is not None
    effect, low, high = found.size
    t = stats.ttest_rel(*pairs).statistic
    assert effect * math.sqrt(5) == pytest.approx(t, rel=1e-9)
    assert stats.nct.cdf(t, 4, low * math.sqrt(5)) == pytest.approx(0.975, abs=1e-4)
    assert stats.nct.cdf(t, 4, high * math.sqrt(5)) == pytest.approx(0.025, abs=1e-4)
    differences = [x - y for x, y in zip(*pairs, strict=True)]
    above: Any = stats.ttest_1samp(differences, -1.5, alternative="greater")
    below: Any = stats.ttest_1samp(differences, 1.5, alternative="less")
    assert alike("", a, b, 1.5, names=("a", "b")).p == pytest.approx(max(above.pvalue, below.pvalue), rel=1e-9)


def test_the_rule_of_verdicts() -> None:
    low, high = {i: 1 + 0.01 * (i % 3) for i in range(6)}, {i: 2 + 0.01 * (i % 2) for i in range(6)}
    names = ("low", "high")
    assert lower("", low, high, names=names).verdict == SEEN
    assert higher("", low, high, names=names).verdict == OPPOSITE
    assert alike("", low, high, 1.5, names=names).verdict == SEEN
    assert alike("", low, high, 0.5, names=names).verdict == OPPOSITE
    assert alike("", low, 1.01, 0.02, names=names).verdict == SEEN
    noisy = {i: high[i] + (-1) ** i * 3 for i in range(6)}
    assert lower("", low, noisy, names=names).verdict == NOT_SEEN
    assert alike("", low, noisy, 0.5, names=names).verdict == NOT_SEEN
    assert "0.5 times" in lower("", low, {i: 2 * x for i, x in low.items()}, names=names, ratio=True).saw
    close = lower("", low, {i: x + 0.002 + 0.01 * (i % 2) for i, x in low.items()}, names=names)
    assert close.verdict == SEEN  # alone
    assert [one.verdict for one in corrected([close] * 6)] == [NOT_SEEN] * 6


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["adam"], r"there is no claim 'adam'\. Did you mean adan"),
        (["adan", "--size", "huge"], r"size='huge' must be one of tiny, small, large, or a number above 0"),
        (["adan", "--size", "1e6"], r"size 1e\+06 needs about .* for runs \(1 at a time\), and .* are free"),
        (["adan", "--processes", "0"], r"processes=0 must be a number of processes, at least 1"),
    ],
)
def test_the_command_refuses_with_a_sentence(arguments: list[str], told: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=told):
        command.main(["--processes", "1", *arguments, "--folder", str(tmp_path)])


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    claim = load("adan")
    record = run_claim(claim, TINY, tmp_path, processes=1)
    write(tmp_path / "again.json", record)
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(json.dumps(record))
    with pytest.raises(OptionError, match="other settings than its experiment has now"):
        from_plain(record, claim, SMALL)
