"""A model of the time of kernels, from their machine code for sm_90, without a GPU.

    python -m benchmarks.kernel_model adamw adan:8 --out benchmarks/results/kernel_model.json --page

A scheduler of a multiprocessor is simulated: in each cycle it issues one instruction of a warp that is not waiting,
into a unit that is not busy. A kernel takes the longer of that time and of the time in which memory moves its bytes.
Beside an H200 its times were 6 % too long where memory decides, and too short by a factor of 1.3 where instructions do.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.pages import RESULTS, table, write_part
from benchmarks.problems import apply, build, gradients, make_params
from benchmarks.sass import Instruction, compiled, instructions, path_of_a_tile, resources
from lightning_optim.engines import triton as engine
from lightning_optim.engines.kernels import Kernel
from lightning_optim.engines.signature import Signature
from lightning_optim.engines.step import Batch, LocalParameter
from lightning_optim.storage.quantized import BLOCK

SHAPE = (64, 64)  # kept in codes at 8 bits
STEPS = 8  # by when RAdam and AdaBelief rectify
OPTIMIZERS = ("adamw", "adan", "lion", "sgdw", "radam", "adabelief", "lamb", "lars", "pnm", "acprop")
PARAMETERS = 124_439_808  # of GPT-2
FUSED = 28  # bytes per element that torch's fused AdamW moves


@dataclass(frozen=True)
class Card:
    """A GPU: multiprocessors, cycles per second, and bytes per second of a copy, of which a kernel gets 92 %."""

    name: str
    multiprocessors: int
    clock: float
    copy: float

    def memory_us(self, size: float) -> float:
        """Microseconds in which memory moves some bytes per element of GPT-2."""
        return 1e6 * PARAMETERS * size / (0.92 * self.copy)

    def issue_us(self, cycles: float) -> float:
        """Microseconds in which the instructions are issued that take these cycles for 1024 elements."""
        return 1e6 * PARAMETERS / 1024 * cycles / self.multiprocessors / self.clock


CARDS = (Card("H100", 132, 1.755e9, 3.0e12), Card("H200", 132, 1.98e9, 4.3e12))


@dataclass(frozen=True)
class Unit:
    """A unit of execution: the cycles for which an instruction of a warp occupies it, and those until the result."""

    name: str
    busy: int
    latency: int
    opcodes: str


# Cycles of a warp on one of four schedulers, from the throughputs in NVIDIA's programming guide for 9.0.
UNITS = (
    Unit("float", 1, 4, "FADD FMUL FFMA MOV CTRL BRA BSSY BSYNC CALL RET EXIT NOP WARPSYNC BREAK YIELD"),
    Unit("multiply", 2, 5, "IMAD HADD2 HFMA2 HMUL2 IDP"),
    Unit("special", 8, 22, "MUFU FCHK"),
    Unit("convert", 2, 18, "I2F F2I FRND F2F"),
    Unit("double", 2, 16, "DADD DMUL DFMA DSETP DMNMX"),
    Unit("memory", 4, 25, "LDG STG LDS STS LDSM STSM SHFL LDC BAR ATOM ATOMG RED LDL STL MEMBAR"),
    Unit("uniform", 1, 6, "R2UR S2UR VOTEU"),  # and all whose names begin with U
    Unit("integer", 2, 6, ""),  # all others
)
UNIT_OF = {opcode: unit for unit in UNITS for opcode in unit.opcodes.split()}
DRAM, L2, L1 = 900, 290, 40  # cycles until a load is there
TAKEN = 8  # cycles lost by a branch that is taken
LAUNCH = 30  # cycles between the end of one program and the first instruction of the next
ROUNDS = 6  # programs that each warp runs in a simulation


def unit_of(one: Instruction) -> Unit:
    """The unit that executes an instruction."""
    opcode = one.name.split(".")[0]
    default = UNITS[-2] if opcode.startswith("U") else UNITS[-1]
    return UNIT_OF.get(opcode, default)


@dataclass(frozen=True)
class Issue:
    """What the scheduler has to know of an instruction."""

    unit: str
    busy: int
    latency: int
    stall: int
    sets: int
    reads: int
    waits: tuple[int, ...]


def issues(path: Sequence[Instruction]) -> list[Issue]:
    """The instructions of a path as the scheduler sees them. Loads of addresses come before those of elements."""
    found = []
    first = next((i for i, one in enumerate(path) if _moves_elements(one)), len(path))
    for i, one in enumerate(path):
        unit, taken = unit_of(one), i + 1 < len(path) and path[i + 1].address - one.address != 16
        busy, latency = unit.busy, unit.latency
        if one.name.startswith(("LDG", "STG")):
            busy = 16 if ".128" in one.name else 8 if ".64" in one.name else 4
        if one.name.startswith("LDG"):
            latency = DRAM if _moves_elements(one) else L2 if i < first else L1
        waits = tuple(bit for bit in range(6) if one.waits >> bit & 1)
        stall = max(one.stall, 1) + (TAKEN if taken else 0)
        found.append(Issue(unit.name, busy, latency, stall, one.sets, one.reads, waits))
    return found


def _moves_elements(one: Instruction) -> bool:
    return one.name.startswith("LDG") and any(width in one.name for width in (".128", ".U8", ".U16"))


def cycles(code: Sequence[Issue], warps: int) -> float:
    """Cycles that a scheduler takes for one warp of a program, while it has `warps` of them at a time.

    A warp begins the next program when it has ended one. The mean is taken over several ways to begin.
    """
    return sum(_cycles(code, warps, shift) for shift in range(4)) / 4


def _cycles(code: Sequence[Issue], warps: int, shift: int) -> float:
    ready = [(w * len(code) * (shift + 2) // (2 * warps)) for w in range(warps)]
    at, barriers = [0] * warps, [[0] * 8 for _ in range(warps)]
    free = dict.fromkeys((unit.name for unit in UNITS), 0)
    ends: list[int] = []
    now = last = 0
    while len(ends) < warps * ROUNDS:
        soonest = math.inf
        for turn in range(warps):
            w = (last + turn) % warps  # the same warp goes on as long as it can
            one = code[at[w]]
            when = max(ready[w], free[one.unit], *(barriers[w][bit] for bit in one.waits), 0)
            if when <= now:
                break
            soonest = min(soonest, when)
        else:
            now = int(soonest)
            continue
        free[one.unit] = now + one.busy
        ready[w] = now + one.stall
        barriers[w][one.sets] = max(barriers[w][one.sets], now + one.latency)
        barriers[w][one.reads] = max(barriers[w][one.reads], now + min(one.latency, 20))
        at[w] += 1
        if at[w] == len(code):
            at[w], barriers[w], ready[w] = 0, [0] * 8, now + LAUNCH
            ends.append(now)
        last = w if one.stall <= 1 else w + 1
        now += 1
    half = len(ends) // 2
    return (ends[-1] - ends[half - 1]) / (len(ends) - half)


def programs_per_multiprocessor(used: dict[str, int], warps: int) -> int:
    """How many programs a multiprocessor runs at a time."""
    registers = 256 * math.ceil(used["registers"] * 32 / 256)  # of a warp
    by_shared = 228 * 1024 // (used["shared"] + 1024)
    return min(65536 // (registers * warps), 64 // warps, 32, by_shared)


# ---------------------------------------------------------------------------------------------- kernels


def kernels(name: str, bits: int, form: str | None, dtype: torch.dtype) -> list[tuple[Kernel, Signature]]:
    """The kernels of a late step of an optimizer, for aligned tensors."""
    params = make_params((SHAPE,), dtype)
    options: dict[str, Any] = {"state_bits": bits, "engine": "reference"}
    options |= {"state_format": form} if form else {}
    optimizer = build(name, params, weight_decay=0.1, **options)
    for grads in gradients(STEPS, (SHAPE,), dtype):
        apply(optimizer, params, grads)
    found: list[tuple[Kernel, Signature]] = []
    for what in optimizer._programs.values():
        program = list(what.programs.values())[-1]
        rows = [LocalParameter.of(p, optimizer.state[p], optimizer.all_slots()) for p in params]
        for row, p in zip(rows, params, strict=True):
            row.grad = p.grad
        for launch in engine.BACKEND.launches(Batch.of(program, {}, params=rows)):
            found += [(kernel, launch.signature) for kernel, _ in launch.kernels[program].values()]
    return found


def bytes_per_element(kernel: Kernel, signature: Signature) -> float:
    """The bytes that a kernel reads and writes per element."""
    total = 0.0
    for name, stored in signature.operands:
        moves = len(re.findall(rf"\b(?:load|store|\w+quantize)\({name}_at\b", kernel.text))
        of_one = stored.itemsize if isinstance(stored, torch.dtype) else 1 + 4 * stored.scales_per_block / BLOCK
        total += moves * of_one
    return total


def row(kernel: Kernel, signature: Signature) -> dict[str, Any]:
    """What the model says of a kernel."""
    cubin = compiled(kernel).asm["cubin"]
    used, warps = resources(cubin), engine.options(kernel)["num_warps"]
    path = path_of_a_tile(instructions(cubin))
    programs = programs_per_multiprocessor(used, warps)
    of_warp = cycles(issues(path), programs * warps // 4)
    return {
        "kernel": kernel.name,
        **used,
        "warps": warps,
        "programs": programs,
        "instructions": len(path) * warps * 32 / engine.printer.TILE,
        "units": dict(Counter(unit_of(one).name for one in path)),
        "bytes": bytes_per_element(kernel, signature),
        "cycles": of_warp * warps / 4 * 1024 / engine.printer.TILE,
    }


def model(names: Sequence[str]) -> dict[str, Any]:
    """The rows of some optimizers, each with a format after its bits where it is not the default: `lion:8:dynamic`."""
    found: dict[str, Any] = {}
    for word in names:
        name, bits, form, *_ = [*word.split(":"), "", ""]
        for one in (bits,) if bits else ("32", "8"):
            label = f"{name} {one}" + (f" {form}" if form else "")
            found[label] = [row(*each) for each in kernels(name, int(one), form or None, torch.float32)]
            print(label, json.dumps(found[label]), flush=True)
    return found


# ---------------------------------------------------------------------------------------------- the page


def ratio(rows: Sequence[dict[str, Any]], card: Card) -> tuple[float, str]:
    """The time of a step relative to torch's fused AdamW in 32 bits, and what decides it."""
    times = [(card.memory_us(x["bytes"]), card.issue_us(x["cycles"])) for x in rows]
    total = sum(max(pair) for pair in times)
    return total / card.memory_us(FUSED), "memory" if all(a >= b for a, b in times) else "instructions"


def page(results: dict[str, Any]) -> str:
    """The table, with the cycles and the ratios of the kernels as they were before in brackets."""
    head = ["optimizer", "registers, programs", "instructions", "bytes", "cycles", *(card.name for card in CARDS)]
    lines = []
    for label, rows in results["after"].items():
        before = results.get("before", {}).get(label, [])
        cells = [label.replace("_", " "), " + ".join(f"{x['registers']}, {x['programs']}" for x in rows)]
        cells += [_sum("instructions", rows), _sum("bytes", rows, 1), _sum("cycles", rows)]
        cells[-1] += f" ({_sum('cycles', before)})" if before else ""
        for card in CARDS:
            now, by = ratio(rows, card)
            cells.append(f"{now:.2f}" + (f" ({ratio(before, card)[0]:.2f})" if before else "") + f", {by}")
        lines.append(cells)
    return f"Triton {results['triton']}.\n\n" + table(head, lines)


def _sum(what: str, rows: Sequence[dict[str, Any]], digits: int = 0) -> str:
    return " + ".join(f"{x[what]:.{digits}f}" for x in rows)


def main(args: Sequence[str] | None = None) -> None:
    """Model kernels, and write down what came out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_model", description=__doc__)
    parser.add_argument("names", nargs="*", default=OPTIMIZERS, help="optimizers, as adamw, adamw:32 or lion:8:dynamic")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernel_model.json")
    parser.add_argument("--as", dest="label", default="after", choices=("before", "after"))
    parser.add_argument("--page", action="store_true", help="write the table to docs/gpu.md")
    given = parser.parse_args(args)
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("unset TRITON_INTERPRET: the interpreter compiles nothing")
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    results["triton"] = triton.__version__
    results[given.label] = results.get(given.label, {}) | model(given.names)
    given.out.write_text(json.dumps(results, indent=1) + "\n")
    if given.page:
        write_part("gpu.md", "model", page(results))


if __name__ == "__main__":
    main()
