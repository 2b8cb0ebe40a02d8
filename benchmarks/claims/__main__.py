"""Looks whether optimizers and methods do what their papers say: `python -m benchmarks.claims`, or `make claims`.

    python -m benchmarks.claims                       # all, and the pages; what was stopped goes on
    python -m benchmarks.claims adan lookahead        # some
    python -m benchmarks.claims adan --size large     # on a GPU; or `--size 4`: four times as wide
    python -m benchmarks.claims --render              # pages and pictures from the results that are there

Runs are kept in `build/claims/SIZE`. At size small the results go to `benchmarks/results/claims` and the pages of docs/
are written; at other sizes they are printed, and stay in that folder.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.claims.claim import Claim
from benchmarks.claims.experiments import CLAIMS, load
from benchmarks.claims.files import from_plain, write
from benchmarks.claims.finding import Finding
from benchmarks.claims.page import findings_of, summary, write_claim
from benchmarks.claims.running import Within, check_memory, forget, planned, run_claim
from benchmarks.claims.size import SMALL, Size, read_size
from benchmarks.pages import RESULTS, ROOT, write_part
from benchmarks.records import Record
from lightning_optim.errors import OptionError
from lightning_optim.race.progress import Bar

KEPT = RESULTS / "claims"
Found = dict[str, tuple[Claim, list[Finding], Record]]


def run(claims: Sequence[Claim], size: Size, folder: Path, processes: int) -> None:
    """Run experiments one after another under one bar.

    Raises:
        OptionError: for a size that does not fit in memory, before anything is run.
    """
    parts = {claim.name: claim.parts(size) for claim in claims}
    for of_claim in parts.values():
        check_memory(of_claim, size, processes)
    console = Console(stderr=True)
    progress = Within(Bar(console), sum(planned(part) for of_claim in parts.values() for part in of_claim))
    try:
        for i, claim in enumerate(claims):
            console.print(f"{claim.name} ({i + 1} of {len(claims)}): {claim.title}", highlight=False, soft_wrap=True)
            record = run_claim(claim, size, folder, processes, progress)
            if size == SMALL:
                write(KEPT / f"{claim.name}.json", record)
    finally:
        progress.end()


def render(claims: Sequence[Claim], size: Size, folder: Path) -> Found:
    """The findings of the results that are there; at size small with their pages."""
    found: Found = {}
    for claim in claims:
        path = (KEPT if size == SMALL else folder) / f"{claim.name}.json"
        if not path.exists():
            continue
        record = json.loads(path.read_text())
        results = from_plain(record, claim, size)
        findings = write_claim(claim, results, record) if size == SMALL else findings_of(claim, results)
        found[claim.name] = claim, findings, record
    return found


def show(found: Found) -> None:
    """Print what was found."""
    table = Table("claim", "what should be seen", "what we saw", "p", "verdict", show_lines=True)
    for claim, findings, _ in found.values():
        for one in findings:
            table.add_row(claim.name, one.statement, one.saw, f"{one.p:.2g}", one.verdict)
    Console().print(table)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", metavar="CLAIM", help=f"by default all: {', '.join(CLAIMS)}")
    parser.add_argument("--size", default="small", help="tiny, small, large, or a factor on the widths of small")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="runs at a time, of one thread each")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "claims", help="where runs are kept")
    parser.add_argument("--fresh", action="store_true", help="forget the runs that the folder holds")
    parser.add_argument("--render", action="store_true", help="run nothing")
    args = parser.parse_args(given)
    warnings.filterwarnings("ignore", category=UserWarning)
    try:
        if args.processes < 1:
            raise OptionError(f"processes={args.processes} must be a number of processes, at least 1.")
        torch.set_num_threads(args.processes)  # which the processes share out
        size = read_size(args.size)
        claims = [load(name) for name in args.claims or CLAIMS]
        folder = args.folder / size.name
        if args.fresh:
            for claim in claims:
                forget(claim, folder)
        if not args.render:
            run(claims, size, folder, args.processes)
        found = render(claims, size, folder)
        show(found)
        if size == SMALL:
            every = [load(name) for name in CLAIMS]
            write_part("claims.md", "claims", summary(every, render(every, size, folder) if args.claims else found))
    except OptionError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
