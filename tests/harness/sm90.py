"""Compiles the kernels of optimizers for sm_90 without a GPU, and reports on each in a line of JSON.

To be run by itself (`python -m tests.harness.sm90 adamw lamb:32 adamw+moments lion:8@gradients combine_tiles`), where
Triton compiles and does not interpret: the kernels of all programs of an optimizer, those with state in 32 or 8 bits
only, those with stages in the same pass, those for gradients or for everything that begins between multiples of 16
bytes, and the one that adds up the sums of tiles.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import kernel_checks
from benchmarks.kernel_checks import Case, build_for, params_of
from benchmarks.sass import TARGET, compiled, resources
from lightning_optim.engines import triton as engine
from lightning_optim.engines.kernels import Kernel
from lightning_optim.engines.step import LocalParameter
from lightning_optim.engines.triton.levels import MOST
from lightning_optim.engines.triton.printer import TILE
from lightning_optim.language.program import Program
from tests.harness.columns import races, stored_elsewhere
from tests.harness.engines import steps_of_every_program
from tests.harness.problems import make_params

SHAPES = ((64, 64), (4096,))  # kept in codes at 8 bits; a matrix and a vector, which pages treat apart
CPU = torch.device("cpu")


def kernels(case: Case, shapes: Sequence[tuple[int, ...]] | None = None, shifted: str = "") -> list[Kernel]:
    """The kernels of all programs of a case, of each text once: update, prediction and the weights to evaluate.

    Args:
        case: The case.
        shapes: The shapes of parameters that all are aligned; None for those that are compared on a device.
        shifted: Whether "gradients", or "all" but the codes of slots, begin between multiples of 16 bytes.
    """
    params = make_params(shapes, case.dtype) if shapes else params_of(case, kernel_checks.SHAPES, CPU)
    if shifted == "all":
        params = [torch.nn.Parameter(between(p)) for p in params]
    optimizer = build_for(case, params, "reference")
    found: dict[str, Kernel] = {}

    def take(program: Program, rows: Sequence[LocalParameter]) -> None:
        for row in rows:
            row.grad = row.source.grad
            if program.normals:
                row.global_index = optimizer.stages[0].global_index_of(row.source)
        found.update({kernel.text: kernel for kernel in engine.BACKEND.kernels(program, rows)})

    for _ in steps_of_every_program(optimizer, params):
        for kept in optimizer._runner.cached.values():
            for batch in kept.batches:
                take(batch.program, batch.params)
        for p in params if shifted else ():
            assert p.grad is not None
            p.grad = between(p.grad)
        for state in optimizer.state.values() if shifted == "all" else ():
            state.update({slot: between(x) for slot, x in state.items() if isinstance(x, Tensor) and x.dim()})
    if optimizer.evaluates():
        h = optimizer._runner.cached["update"].active[0].h
        rows = [LocalParameter.of(p, optimizer.state[p], optimizer.all_slots()) for p in params]
        for what in ("evaluate", "resume"):
            take(optimizer.program(what, h), rows)
    return list(found.values())


def between(x: Tensor) -> Tensor:
    """A copy that does not begin at a multiple of 16 bytes."""
    room = torch.zeros(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x.detach())


def combine_tiles(maximum: bool) -> Any:
    """The kernel that adds up the sums of tiles, or finds the largest of their maxima, compiled."""
    signature = {"partials": "*fp64", "starts": "*i64", "results": "*fp64"}
    constants = {"COUNT": 2, "MAXIMUM": maximum, "MOST": MOST}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    given = {(i,): value for i, value in enumerate(constants.values(), 3)}
    kernel = engine._functions()["combine_tiles"]
    source = triton.compiler.ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), given, aligned)
    options = engine.options(Kernel("combine_tiles", "", {}, {}, {}, ()))
    return triton.compile(source, target=TARGET, options=options)


def widths(ptx: str, what: str) -> list[int]:
    """Bytes of each access to global memory, `what` being ld or st."""
    sizes = {"b8": 1, "u8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "f32": 4, "b64": 8, "u64": 8, "f64": 8}
    found = re.findall(rf"\b{what}\.global\S*?(\.v\d)?\.(b\d+|u\d+|f\d+)\s", ptx)
    return [sizes[kind] * int(vector[2:] or 1) for vector, kind in found]


def wide(text: str) -> dict[str, int]:
    """How many accesses of 16 bytes it takes to load and store the columns that a kernel takes for aligned."""
    share = TILE // (32 * engine.WARPS)  # elements of a thread
    aligned = set(re.findall(r"(\w+)_at = tl.multiple_of", text))
    loads = re.findall(r"= tl.load\((\w+)_at \+ index, mask=inside, other=0.0\)(.*)", text)
    stores = re.findall(r"tl.store\((\w+)_at \+ index, (.*), mask=inside[,)]", text)
    return {
        "wide_loads": sum(share * (2 if ".to(" in rest else 4) // 16 for name, rest in loads if name in aligned),
        "wide_stores": sum(share * (2 if "float16" in new else 4) // 16 for name, new in stores if name in aligned),
    }


def printed(word: str) -> Iterator[tuple[str, Kernel]]:
    """The kernels of a word, of each text once, and the case that they are for."""
    word, _, shifted = word.partition("@")
    word, _, only = word.partition(":")
    name, _, stages = word.partition("+")
    found = kernel_checks.cases(name, quick=bool(only))
    if only or stages or shifted:
        found = [replace(case, stages=stages) for case in found if not case.stages and str(case.bits).startswith(only)]
    seen: set[str] = set()
    for case in found:
        for kernel in kernels(case, SHAPES if only else None, shifted):
            if kernel.text not in seen:
                seen.add(kernel.text)
                yield f"{case}{shifted and ', shifted: '}{shifted}", kernel


def reports(word: str) -> Iterator[dict[str, Any]]:
    if word == "combine_tiles":
        for maximum in (False, True):
            report = {"kernel": word, "maximum": maximum, **resources(combine_tiles(maximum).asm["cubin"])}
            yield {**report, "bound": engine.REGISTERS, **wide("")}
        return
    for case, kernel in printed(word):
        assembled = compiled(kernel).asm
        loads, stores = widths(assembled["ptx"], "ld"), widths(assembled["ptx"], "st")
        yield {
            **{"case": case, "kernel": kernel.name, "calls": sorted(set(re.findall(r"\b(\w+)\(", kernel.text)))},
            **resources(assembled["cubin"]),
            "bound": engine.options(kernel)["maxnreg"],
            **wide(kernel.text),
            "loads": {width: loads.count(width) for width in sorted(set(loads))},
            "stores": {width: stores.count(width) for width in sorted(set(stores))},
            "races": list(races(assembled["ttgir"])),
            "exchanged": stored_elsewhere(assembled["ttgir"]),
        }


if __name__ == "__main__":
    for word in sys.argv[1:]:
        for report in reports(word):
            print(json.dumps(report), flush=True)
