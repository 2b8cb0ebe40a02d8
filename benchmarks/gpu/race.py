"""Step times of our optimizers and their equivalents in other packages, side by side on one list of tensors."""

from __future__ import annotations

import gc
import math
import time
import traceback
from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.contenders import Contender, bytes_that_must_move, one_by_one, others, ours
from benchmarks.gpu.setting import Result, Setting
from benchmarks.timing import copy_bandwidth, launches, peak_memory, random_params, side_by_side, synchronize
from lightning_optim.reports.memory import state_memory

WARM = 8  # steps before anything is measured: RAdam has changed its form by then
MANY = 1000  # tensors, from which on packages that start a kernel for each of them are left out
PACKAGES = ("torch.optim", "bitsandbytes", "flashoptim", "optimi")
SLOW = ("torchao",)  # it compiles a kernel for every shape, which takes minutes


def copy(setting: Setting) -> Result:
    """The bandwidth that everything is measured against."""
    return {"bytes_per_second": copy_bandwidth(setting.device, 1 << 16 if setting.tiny else 1 << 30)}


def race(setting: Setting, which: str, name: str, dtype: torch.dtype, slow: bool = False) -> Result:
    """Step times on one list of tensors, side by side, and what goes with them.

    Args:
        setting: Where.
        which: The name of the list.
        name: The optimizer.
        dtype: Of parameters and gradients.
        slow: Whether packages take part that compile a kernel for every shape, instead of the others.
    """
    shapes = setting.lists[which]()
    packages = ("torch.optim", *SLOW) if slow else PACKAGES
    few = setting.tiny or len(shapes) > MANY
    rivals, absent = others(name, dtype, packages[:1] if few else packages)
    if not setting.on_gpu:
        rivals = [rival for rival in rivals if "fused" not in rival.label]
    elif few and name == "adamw":
        rivals.append(one_by_one())
    found: Result = {"absent": absent, "rows": {}, "parameters": sum(math.prod(shape) for shape in shapes)}
    params = random_params(shapes, dtype, setting.device)
    everyone = [*([] if slow else ours(name)), *rivals]
    base = next((c for c in rivals if "fused" in c.label or "foreach" in c.label), everyone[0])
    found["base"] = base.label
    for together in _sets(everyone, base, params, setting):
        for label, row in _race_of(together, base, params, setting).items():
            if label != base.label or label not in found["rows"]:
                found["rows"][label] = row
    return found


def _sets(
    everyone: Sequence[Contender], base: Contender, params: Sequence[Tensor], setting: Setting
) -> list[list[Contender]]:
    """Those that fit the memory together, each set with the one that others are compared with."""
    room = 0.8 * torch.cuda.mem_get_info(setting.device)[0] if setting.on_gpu else math.inf
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
        optimizer, rows[contender.label] = _prepared(contender, params, setting)
        if optimizer is not None:
            running[contender.label] = optimizer
    times = side_by_side({label: o.step for label, o in running.items()}, setting.device, setting.rounds)
    for label, measured in times.items():
        rows[label].update(measured.summary())
    for label in times:
        if base.label in times:
            rows[label]["times_base"] = rows[label]["ms"] / rows[base.label]["ms"]
        rows[label].update(launches(running[label].step, setting.device))  # the profiler slows what follows it
    running.clear()
    gc.collect()
    if setting.on_gpu:
        torch.cuda.empty_cache()
    return rows


def _prepared(
    contender: Contender, params: Sequence[Tensor], setting: Setting
) -> tuple[torch.optim.Optimizer | None, Result]:
    """An optimizer that has taken some steps, with what it needs in memory and took for the first; or why it failed."""
    try:
        return _warmed(contender, params, setting)
    except Exception as error:  # a peer that does not work here must not end the others' measurement
        traceback.print_exc()
        return None, {"failed": f"{type(error).__name__}: {str(error)[:300]}"}


def _warmed(contender: Contender, params: Sequence[Tensor], setting: Setting) -> tuple[torch.optim.Optimizer, Result]:
    with peak_memory(setting.device) as first:
        optimizer = contender.make(params)
        begin = time.perf_counter()
        optimizer.step()
        synchronize(setting.device)
    seconds = time.perf_counter() - begin
    for _ in range(1 if setting.tiny else WARM):
        optimizer.step()
    with peak_memory(setting.device) as later:
        optimizer.step()
    state = first["left"] if first else sum(entry.bytes for entry in state_memory(optimizer))
    return optimizer, {
        "bits": contender.bits,
        "state_bytes": state,
        "must_move_bytes": bytes_that_must_move(optimizer, state),
        "peak_bytes": later.get("peak"),
        "first_step_s": seconds,
    }
