"""Writes docs/claims.md and the pages in docs/claims from results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.claims.claim import Claim
from benchmarks.claims.finding import OPPOSITE, SEEN, Finding, corrected
from benchmarks.claims.results import Results
from benchmarks.pages import ROOT, replace_part, table
from benchmarks.pictures import save_figure
from benchmarks.records import Record, describe
from lightning_optim.race.summary import number

PAGES = ROOT / "docs"
PICTURES = PAGES / "pictures"


def findings_of(claim: Claim, results: Results) -> list[Finding]:
    """What the results of a claim say, with p-values that hold together."""
    return corrected(claim.judge(results))


def summary(claims: Sequence[Claim], found: Mapping[str, tuple[Claim, list[Finding], Record]]) -> str:
    """The table over all claims: a row for each finding, and one for a claim that has no results yet."""
    rows = []
    for claim in claims:
        first = f"[{claim.title}](claims/{claim.name}.md) {claim.papers}. Setting: {claim.setting.rstrip('.')}."
        if claim.name not in found:
            rows.append([first, "", "not run yet", ""])
            continue
        verdicts = [one.verdict for one in found[claim.name][1]]
        seen, opposite = verdicts.count(SEEN), verdicts.count(OPPOSITE)
        first += f" **{seen} of {len(verdicts)} seen{f', {opposite} the opposite' if opposite else ''}.**"
        for one in found[claim.name][1]:
            rows.append([first, one.statement, f"{one.saw} (p {number(one.p)})", f"**{one.verdict}**"])
            first = ""
    return table(["claim", "what should be seen", "what we saw", "verdict"], rows)


def details(claim: Claim, findings: Sequence[Finding], record: Record) -> str:
    """The part of a claim's own page that is written by the command."""
    rows = [[one.statement, one.saw, number(one.p), _size(one), f"**{one.verdict}**"] for one in findings]
    about = record["about"]
    runs = sum(len(part["runs"]) for part in record["parts"].values())
    told = [
        table(["what should be seen", "what we saw", "p", "effect size", "verdict"], rows),
        f"![{claim.title}](../pictures/claim_{claim.name}.png)",
        f"{runs} runs in {about['seconds'] / 60:.1f} minutes, {about['processes']} at a time, size {about['size']}. "
        f"{describe(about)}",
    ]
    if claim.gpu:
        told.append(f"On a GPU: {claim.gpu.rstrip('.')}.")
    return "\n\n".join([f"Setting: {claim.setting}", *told])


def write_claim(claim: Claim, results: Results, record: Record, pages: Path = PAGES) -> list[Finding]:
    """Write a claim's page and picture, and return its findings.

    Raises:
        ValueError: if there is no page in docs/claims with the part `results`.
    """
    findings = findings_of(claim, results)
    page = pages / "claims" / f"{claim.name}.md"
    page.write_text(replace_part(page.read_text(), "results", details(claim, findings, record)))
    save_figure(claim.draw(results), pages / "pictures" / f"claim_{claim.name}.png")
    return findings


def _size(one: Finding) -> str:
    """The effect in standard deviations, with its interval."""
    if one.size is None:
        return "no spread"
    mean, low, high = one.size
    return f"{mean:+.2g} ({low:.2g} to {high:.2g})"
