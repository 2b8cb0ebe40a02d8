"""Measures the time to the first step: `python -m benchmarks.start_up`.

Each number comes from new processes, in alternating order: the import of this package after torch and, in a second
number, after Lightning; the constructor and the first steps of an optimizer; and, in another process, the first step
after `load_state_dict`. The compiled engine is measured with an empty cache directory and with one that an earlier
process filled. torch's fused AdamW is measured for comparison. `benchmarks/first_step.py` does the same for a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Nothing here may import torch: the processes that are measured begin in this file, too.
from benchmarks.pages import RESULTS, ROOT, table, write_part

OPTIMIZERS = ("adamw", "adan", "lamb")
ENGINES = ("torch", "blocked", "compiled, empty cache", "compiled, filled cache")
BUDGET = 1.0  # second, for an import or a first step without compiled engines

Record = dict[str, Any]


def measured(optimizer: str, bits: int, engine: str, file: Path, resume: bool, tiny: bool) -> Record:
    """What a fresh process sees, in seconds; called in one."""
    begin = time.perf_counter()
    import torch

    found = {"import torch": time.perf_counter() - begin}
    begin = time.perf_counter()
    import lightning.pytorch  # noqa: F401

    found["import lightning"] = time.perf_counter() - begin
    begin = time.perf_counter()
    import lightning_optim

    found["import"] = time.perf_counter() - begin
    from benchmarks import shapes
    from benchmarks.timing import random_params

    torch.set_num_threads(1)
    params = random_params(shapes.tiny() if tiny else shapes.two_million(), torch.float32, torch.device("cpu"))
    torch.optim.SGD(params, lr=0.0, foreach=True).step()  # what torch itself makes ready at a first step
    begin = time.perf_counter()
    made: torch.optim.Optimizer
    if engine == "torch":
        made = torch.optim.AdamW(params, fused=True)
    else:
        spec = {"name": optimizer, "state_bits": bits, "engine": engine.partition(",")[0]}
        made = lightning_optim.create_optimizer(spec, params)
    found["construct"] = time.perf_counter() - begin
    if resume:
        begin = time.perf_counter()
        made.load_state_dict(torch.load(file, weights_only=True))
        found["load"] = time.perf_counter() - begin
    for what in ("first", "second", "third"):
        begin = time.perf_counter()
        made.step()
        found[what] = time.perf_counter() - begin
    if not resume:
        torch.save(made.state_dict(), file)
    return found


def bare_import() -> Record:
    """`import lightning_optim` as a user without the Trainer meets it; called in a fresh process."""
    begin = time.perf_counter()
    import torch  # noqa: F401

    middle = time.perf_counter()
    import lightning_optim  # noqa: F401

    return {"import torch": middle - begin, "import beyond torch": time.perf_counter() - middle}


def in_fresh_process(environment: dict[str, str], *words: str) -> Record:
    """Run this file as a process of its own; raises with what it said where it fails."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.start_up", "--child", *words]
    whole = {**os.environ, **environment, "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=whole, cwd=ROOT, timeout=300)
    if done.returncode:
        raise RuntimeError(done.stderr[-1000:])
    found: Record = json.loads(done.stdout.splitlines()[-1])
    return found


def both_processes(optimizer: str, bits: int, engine: str, tiny: bool) -> Record:
    """The first steps of a process, and those of one that resumes from its state."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {"XDG_CACHE_HOME": folder}
        words = [optimizer, str(bits), engine, str(Path(folder, "state.pt")), *(["--tiny"] if tiny else [])]
        if engine == "compiled, filled cache":
            in_fresh_process(environment, *words)
        started = in_fresh_process(environment, *words)
        return {**started, **{f"resumed: {k}": v for k, v in in_fresh_process(environment, *words, "--resume").items()}}


def cases(optimizers: Sequence[str], engines: Sequence[str]) -> list[tuple[str, int, str]]:
    """The optimizers, bits and engines that are measured; torch once."""
    found = [("adamw", 32, "torch")] if "torch" in engines else []
    rest = [engine for engine in engines if engine != "torch"]
    return found + [(name, bits, engine) for name in optimizers for bits in (32, 8) for engine in rest]


# ---------------------------------------------------------------------------------------------- what comes of it


def page(found: Record) -> str:
    """The table, in seconds."""
    from benchmarks.records import describe

    def middle(runs: Sequence[Record], what: str) -> float:
        return float(statistics.median(run[what] for run in runs))

    imports, rows = found["imports"], []
    for key, runs in found["first steps"].items():
        cells = [middle(runs, what) for what in ("construct", "first", "second", "resumed: load", "resumed: first")]
        good = "" if key.endswith("empty cache") else "yes" if max(cells) <= BUDGET else "no"
        rows.append([key, *(f"{cell:.3f}" for cell in cells), good])
    beyond = middle(imports, "import beyond torch")
    text = (
        f"{describe(found['about'])} Commit: {found['code']}. Medians over {len(imports)} new processes.\n\n"
        f"`import torch` takes {middle(imports, 'import torch'):.2f} s, "
        f"and `import lightning_optim` {beyond:.2f} s more"
    )
    steps = [run for runs in found["first steps"].values() for run in runs]
    if steps:
        lightning, after = middle(steps, "import lightning"), middle(steps, "import")
        text += f"; after Lightning, which takes {lightning:.2f} s, it takes {after:.2f} s"
    text += f". Within {BUDGET:.0f} s: {'yes' if beyond <= BUDGET else 'no'}."
    head = ["seconds", "construct", "first step", "second", "load state", "first step after it", "all within a second"]
    return f"{text}\n\n{table(head, rows)}"


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new round starts")
    parser.add_argument("--tiny", action="store_true", help="few small tensors")
    parser.add_argument("--out", type=Path, default=RESULTS / "start_up.json")
    parser.add_argument("--page", action="store_true", help="write the table to docs/speed.md")
    given = parser.parse_args(args)
    from benchmarks.records import commit, machine, save

    end = time.monotonic() + given.budget
    found: Record = {"about": machine(), "code": commit(), "imports": [], "first steps": {}}
    for turn in range(given.rounds):
        if turn and time.monotonic() > end:
            break
        found["imports"].append(in_fresh_process({}, "import"))
        for name, bits, engine in cases(given.optimizers, given.engines):
            runs = found["first steps"].setdefault(f"{name}, {bits} bits, {engine}", [])
            runs.append(both_processes(name, bits, engine, given.tiny))
            print(turn, name, bits, engine, f"first step {runs[-1]['first']:.3f} s", flush=True)
        save(given.out, found)
    print(page(found))
    if given.page:
        write_part("speed.md", "start", page(found))


def child(args: Sequence[str]) -> None:
    """What a measured process does: print a line of JSON."""
    if args[0] == "import":
        print(json.dumps(bare_import()))
        return
    name, bits, engine, file, *flags = args
    found = measured(name, int(bits), engine, Path(file), resume="--resume" in flags, tiny="--tiny" in flags)
    print(json.dumps(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
