"""Checks and measures the Triton engine on a GPU: `python -m benchmarks.gpu --budget 480`.

The benchmark consists of parts, and each is saved when it is done: the bandwidth of a copy; every kernel compared with
the reference; steps that make the host wait; steps inside a CUDA graph; step times compared with other packages; the
first step of a new process. The same command continues where the budget ended. `--tiny` runs the same code with small
sizes in Triton's interpreter, on a machine without a GPU (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu_report
from benchmarks.contenders import NAMES, Contender, bytes_that_must_move, one_by_one, others, ours
from benchmarks.kernel_checks import check_optimizer
from benchmarks.pages import RESULTS, ROOT, write_part
from benchmarks.peers import versions
from benchmarks.problems import apply, build, gradients, make_params
from benchmarks.shapes import LISTS, tiny
from benchmarks.timing import copy_bandwidth, launches, peak_memory, random_params, side_by_side, synchronize
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.reports.memory import state_memory

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What runs where, and how much of it."""

    device: torch.device
    tiny: bool
    rounds: int
    jobs: int
    lists: dict[str, Callable[[], list[tuple[int, ...]]]]
    optimizers: Sequence[str]


# ---------------------------------------------------------------------------------------------- pieces


def copy(setting: Setting) -> Result:
    """The bandwidth that everything is measured against."""
    return {"bytes_per_second": copy_bandwidth(setting.device, 1 << 16 if setting.tiny else 1 << 30)}


def host_waits(setting: Setting) -> Result:
    """Whether a step makes the host wait for the device, by torch's own alarm."""
    if setting.device.type != "cuda":
        return {"skipped": "needs a GPU"}
    found = {}
    for name, bits, optimizer, params in _each_optimizer(setting):
        sets = [
            [grad.to(setting.device) for grad in grads]
            for grads in gradients(2, [tuple(p.shape) for p in params], torch.float32)
        ]
        try:
            for step in range(9):
                for p, grad in zip(params, sets[step % 2], strict=True):  # gradients move, as they do in training
                    p.grad = grad
                if optimizer.inputs:
                    optimizer.set_loss(1.0)
                if step == 7:  # by when RAdam has changed its form
                    torch.cuda.set_sync_debug_mode("error")
                optimizer.step()
            found[f"{name}, {bits} bits"] = ""
        except Exception as error:
            found[f"{name}, {bits} bits"] = f"{type(error).__name__}: {error}"
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return {"steps": found}


def graphs(setting: Setting) -> Result:
    """Whether steps that are replayed from a CUDA graph are those that would have been taken without."""
    if setting.device.type != "cuda":
        return {"skipped": "needs a GPU"}
    found = {}
    for name, bits, _, params in _each_optimizer(setting):
        cls = OPTIMIZERS[name]
        if "capturable" not in cls.options or cls.inputs:
            continue
        try:
            found[f"{name}, {bits} bits"] = _replayed(name, bits, params)
        except Exception as error:
            found[f"{name}, {bits} bits"] = f"{type(error).__name__}: {error}"
        torch.cuda.synchronize()
    return {"steps": found} if found else {"skipped": "no optimizer has the option capturable"}


def _each_optimizer(setting: Setting) -> Iterator[tuple[str, int, Optimizer, list[Tensor]]]:
    for name in sorted(OPTIMIZERS):
        for bits in (32, 8):
            params: list[Tensor] = [
                torch.nn.Parameter(p.detach().to(setting.device)) for p in make_params(tiny(), torch.float32)
            ]
            try:
                optimizer = build(name, params, state_bits=bits, engine="triton")
                apply(optimizer, params, [torch.ones_like(p) for p in params])
            except ValueError:  # nothing to keep in 8 bits, or not served by this engine
                continue
            yield name, bits, build(name, params, state_bits=bits, engine="triton"), params


def _replayed(name: str, bits: int, params: Sequence[Tensor], warm: int = 3, replays: int = 4) -> str:
    """How replayed steps differ from plain ones, in words; empty where they do not."""
    twins = [p.detach().clone().requires_grad_() for p in params]
    options: dict[str, Any] = {"state_bits": bits, "engine": "triton"}
    captured, plain = build(name, params, capturable=True, **options), build(name, twins, **options)
    shapes = [tuple(p.shape) for p in params]
    for tensors in (params, twins):
        for p in tensors:
            p.grad = torch.zeros_like(p)
    graph = torch.cuda.CUDAGraph()
    for step, grads in enumerate(gradients(warm + replays, shapes, torch.float32)):
        for p, twin, grad in zip(params, twins, grads, strict=True):
            assert p.grad is not None
            assert twin.grad is not None
            p.grad.copy_(grad)
            twin.grad.copy_(grad)
        plain.step()
        if step < warm:
            stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                captured.step()
            torch.cuda.current_stream().wait_stream(stream)
            continue
        if step == warm:
            with torch.cuda.graph(graph):
                captured.step()
        graph.replay()
    worst = max(((p - q).abs().max().item() for p, q in zip(params, twins, strict=True) if p.numel()), default=0.0)
    return "" if worst <= 1e-5 else f"parameters differ by {worst:.1e} after {replays} replays"


def race(setting: Setting, shapes: Sequence[tuple[int, ...]], name: str, dtype: torch.dtype) -> Result:
    """Step times on one list of tensors, side by side, and what goes with them."""
    rivals, absent = others(name, dtype, ("torch.optim",) if setting.tiny else None)
    if setting.device.type != "cuda":
        rivals = [rival for rival in rivals if "fused" not in rival.label]
    elif name == "adamw" and len(shapes) > 1000:
        rivals.append(one_by_one())
    found: Result = {"absent": absent, "rows": {}, "parameters": sum(math.prod(shape) for shape in shapes)}
    params = random_params(shapes, dtype, setting.device)
    everyone = [*ours(name), *rivals]
    base = next((c for c in rivals if "fused" in c.label or "foreach" in c.label), everyone[0])
    found["base"] = base.label
    for together in _sets(everyone, base, params, setting):
        for label, row in _race_of(together, base, params, setting).items():
            if label != base.label or label not in found["rows"]:
                found["rows"][label] = row
    return found


def _sets(everyone: Sequence[Contender], base: Contender, params: Sequence[Tensor], setting: Setting) -> list[Any]:
    """Those that fit the memory together, each set with the one that others are compared with."""
    room = 0.8 * torch.cuda.mem_get_info(setting.device)[0] if setting.device.type == "cuda" else math.inf
    values = 3 * sum(p.numel() for p in params)  # two slots, and as much again for what a step may need

    def size(contender: Contender) -> float:
        return values * contender.bits / 8

    sets: list[list[Contender]] = [[base]]
    for contender in everyone:
        if contender is base:
            continue
        if sum(map(size, sets[-1])) + size(contender) > room and len(sets[-1]) > 1:
            sets.append([base])
        sets[-1].append(contender)
    return sets


def _race_of(
    together: Sequence[Contender], base: Contender, params: Sequence[Tensor], setting: Setting
) -> dict[str, Result]:
    rows: dict[str, Result] = {}
    running: dict[str, torch.optim.Optimizer] = {}
    for contender in together:
        try:
            with peak_memory(setting.device) as first:
                optimizer = contender.make(params)
                begin = time.perf_counter()
                optimizer.step()
                synchronize(setting.device)
            seconds = time.perf_counter() - begin
            with peak_memory(setting.device) as later:
                optimizer.step()
            count = launches(optimizer.step, setting.device)
        except Exception as error:  # a peer that does not work here must not end the others' measurement
            rows[contender.label] = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            if contender.ours:
                traceback.print_exc()
            continue
        state = first["left"] if first else sum(entry.bytes for entry in state_memory(optimizer))
        rows[contender.label] = {
            "bits": contender.bits,
            "state_bytes": state,
            "must_move_bytes": bytes_that_must_move(optimizer, state),
            "peak_bytes": later.get("peak"),
            "launches": count,
            "first_step_s": seconds,
        }
        running[contender.label] = optimizer
    times = side_by_side({label: o.step for label, o in running.items()}, setting.device, setting.rounds)
    for label, measured in times.items():
        rows[label].update(measured.summary())
    for label in times:
        if base.label in times:
            rows[label]["times_base"] = rows[label]["ms"] / rows[base.label]["ms"]
    running.clear()
    gc.collect()
    if setting.device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def first_steps(setting: Setting) -> Result:
    """Seconds of a first step in a fresh process: with nothing compiled yet, and with kernels in the caches on disk."""
    contenders = ours("adamw")[:2] if not setting.tiny else ours("adamw")[:1]
    contenders += [] if setting.tiny else others("adamw", torch.float32)[0]
    found: Result = {}
    for contender in contenders:
        with tempfile.TemporaryDirectory() as folder:
            caches = {"TRITON_CACHE_DIR": f"{folder}/triton", "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor"}
            which = "tiny" if setting.tiny else next(iter(setting.lists))
            command = [sys.executable, "-m", "benchmarks.first_step", "adamw", contender.label]
            command += ["--device", str(setting.device), "--list", which]
            path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
            environment = {**os.environ, **caches, "PYTHONPATH": path}
            found[contender.label] = {}
            for what in ("cold", "warm"):
                done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
                good = done.returncode == 0
                found[contender.label][what] = json.loads(done.stdout.splitlines()[-1]) if good else done.stderr[-300:]
    return found


# ---------------------------------------------------------------------------------------------- the whole


def pieces(setting: Setting) -> Iterator[tuple[str, Callable[[], Result]]]:
    """All that is to be done, most telling first; the checks are done before, since they run side by side."""
    yield "copy", lambda: copy(setting)
    yield "host waits", lambda: host_waits(setting)
    yield "graphs", lambda: graphs(setting)
    for name in setting.optimizers:
        for label, shapes in setting.lists.items():
            yield (
                f"race/{label}/{name}/float32",
                lambda shapes=shapes, name=name: race(setting, shapes(), name, torch.float32),  # type: ignore[misc]
            )
    first = next(iter(setting.lists.values()))
    yield f"race/{next(iter(setting.lists))}/adamw/bfloat16", lambda: race(setting, first(), "adamw", torch.bfloat16)
    yield "first steps", lambda: first_steps(setting)


def run_checks(setting: Setting, names: Sequence[str], end: float) -> Iterator[tuple[str, Result | None]]:
    """The checks of every optimizer, in several processes on a GPU: compiling is what takes the time.

    None stands for one whose process died; what fails in a check that goes on stands in its result.
    """
    if setting.jobs <= 1:
        for name in names:
            if time.monotonic() > end:
                return
            yield f"checks/{name}", check_optimizer(name, str(setting.device), quick=setting.tiny)
        return
    # A process for each: after an access out of bounds CUDA refuses all further work of its process.
    with ProcessPoolExecutor(setting.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        waiting = {pool.submit(check_optimizer, name, str(setting.device), setting.tiny): name for name in names}
        try:
            for done in as_completed(waiting, timeout=max(0.0, end - time.monotonic())):
                yield f"checks/{waiting[done]}", None if done.exception() else done.result()
        except FutureTimeout:
            workers = list(getattr(pool, "_processes", {}).values())  # which a shutdown forgets
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in workers:
                worker.terminate()


def about(setting: Setting) -> Result:
    found: Result = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "peers": versions(),
        "device": platform.machine(),
    }
    if setting.device.type == "cuda":
        import triton

        found |= {"device": torch.cuda.get_device_name(setting.device), "triton": triton.__version__}
        found["cuda"] = torch.version.cuda
    return found


def save(path: Path, found: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(path)
    path.with_suffix(".md").write_text(gpu_report.page(found) + "\n")


def main(args: Sequence[str] | None = None) -> int:
    """Run what is not in the results yet; 1 where a check failed or a piece raised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new part starts")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for the interpreter on a CPU")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "gpu.json", help="raw results; the table is written next to it"
    )
    parser.add_argument("--only", nargs="+", default=[""], help="run only parts whose names start with one of these")
    parser.add_argument("--optimizers", nargs="+", default=list(NAMES), choices=NAMES)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--jobs", type=int, help="processes for the checks; by default half the cores, at most 8")
    parser.add_argument("--page", action="store_true", help="write the table to docs/gpu.md")
    given = parser.parse_args(args)
    end = time.monotonic() + given.budget
    if not given.tiny and not torch.cuda.is_available():
        parser.error("no GPU found; --tiny runs on a CPU, with TRITON_INTERPRET=1")
    warnings.simplefilter("ignore")  # of the peers' imports
    jobs = given.jobs or (1 if given.tiny else min(8, max(1, (os.cpu_count() or 2) // 2)))
    lists = {"tiny": tiny} if given.tiny else LISTS
    device = torch.device("cpu" if given.tiny else "cuda")
    setting = Setting(device, given.tiny, given.rounds, jobs, lists, given.optimizers)

    found: Result = json.loads(given.out.read_text()) if given.out.exists() else {"about": about(setting), "pieces": {}}
    if found["about"] != about(setting):
        parser.error(f"{given.out} was measured on another machine or with other versions; set another --out")
    done: Result = found["pieces"]

    def wanted(name: str) -> bool:
        return name not in done and name.startswith(tuple(given.only))

    names = given.optimizers if given.tiny else sorted(OPTIMIZERS)
    unchecked = [name for name in names if wanted(f"checks/{name}")]
    broken: list[str] = []
    for name, result in run_checks(setting, unchecked, end) if unchecked else ():
        if result is None:
            broken.append(name)
            continue
        done[name] = result
        print(name, result, flush=True)
        save(given.out, found)
    for name, piece in pieces(setting):
        if not wanted(name):
            continue
        if time.monotonic() > end:
            print(f"the budget is spent before {name}; the same command continues there")
            break
        begin = time.monotonic()
        try:
            done[name] = piece()
        except Exception:  # too little memory, say: the others are measured all the same
            traceback.print_exc()
            broken.append(name)
            if device.type == "cuda":
                torch.cuda.empty_cache()
            continue
        print(f"{name}: {time.monotonic() - begin:.1f} s", flush=True)
        save(given.out, found)
    print(gpu_report.page(found))
    if given.page:
        write_part("gpu.md", "measurements", gpu_report.page(found))
    failed = any(result.get("failed") for name, result in done.items() if name.startswith("checks/"))
    if broken:
        print(f"not measured: {', '.join(broken)}", file=sys.stderr)
    return int(failed or bool(broken))


if __name__ == "__main__":
    sys.exit(main())
