"""Compiles the kernels of optimizers for sm_90 without a GPU, and reports on each in a line of JSON.

To be run by itself (`python -m tests.harness.sm90 adamw lamb:32 adamw+noise combine_tiles`), where Triton compiles and
does not interpret: all kernels of an optimizer, those with state in 32 bits only, those with stages in the same pass,
and the one that adds up the sums of tiles.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.engines import triton as engine
from lightning_optim.engines.kernels import Kernel
from lightning_optim.engines.step import LocalParameter
from lightning_optim.engines.triton.levels import MOST
from lightning_optim.engines.triton.printer import TILE
from lightning_optim.stages import Average, Lookahead, Noise
from tests.harness.problems import apply, build, gradients, make_params

SHAPES = ((64, 64),)  # kept in codes at 8 bits
TARGET = GPUTarget("cuda", 90, 32)
VARIANTS = [(32, "log"), (8, "log"), (8, "dynamic")]


def append(optimizer: Optimizer, stages: str) -> None:
    """Stages by a word: averages and slow weights, or noise with the two slots of its own."""
    if stages == "averages":
        optimizer.append(Average())
        optimizer.append(Lookahead(k=2))
    if stages == "noise":
        optimizer.append(Noise(global_indices([], optimizer), kind="moments"))


def kernels(name: str, bits: int, form: str, dtype: torch.dtype, stages: str = "") -> list[Kernel]:
    """The kernels of a second step: those of the update, and of the prediction where there is one."""
    params = make_params(SHAPES, dtype)
    optimizer = build(name, params, weight_decay=0.1, state_bits=bits, state_format=form, engine="reference")
    append(optimizer, stages)
    found: list[Kernel] = []
    for grads in gradients(2, SHAPES, dtype):
        apply(optimizer, params, grads)
    for what in optimizer._programs.values():
        program = list(what.programs.values())[-1]
        rows = [local(optimizer, p) for p in params]
        for row, p in zip(rows, params, strict=True) if program.normals else ():
            row.global_index = optimizer.stages[0].global_index_of(p)
        found += engine.BACKEND.kernels(program, rows)
    return found


def local(optimizer: Optimizer, p: Tensor) -> LocalParameter:
    """A parameter and its gradient as engines see them."""
    param = LocalParameter.of(p, optimizer.state[p], optimizer.all_slots())
    param.grad = p.grad
    return param


def compiled(kernel: Kernel) -> Any:
    signature = {"table": "*i64", "tiles": "*i32", **kernel.arguments}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = triton.compiler.ASTSource(engine.load(kernel.name, kernel.text, kernel.formats), signature, {}, aligned)
    return triton.compile(source, target=TARGET, options=engine.options(kernel))


def combine_tiles() -> Any:
    """The kernel that adds up the sums of tiles, compiled."""
    signature = {"partials": "*fp64", "starts": "*i64", "results": "*fp64"}
    constants = {"COUNT": 2, "MAXIMUM": False, "MOST": MOST}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(3)}
    given = {(i,): value for i, value in enumerate(constants.values(), 3)}
    kernel = engine._functions()["combine_tiles"]
    source = triton.compiler.ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), given, aligned)
    options = engine.options(Kernel("combine_tiles", "", {}, {}, {}, ()))
    return triton.compile(source, target=TARGET, options=options)


def resources(cubin: bytes) -> dict[str, int]:
    """What the assembled kernel takes: registers of a thread, and bytes of stack, where spills would go."""
    from triton import knobs  # of newer versions

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = {"registers": r"REG:(\d+)", "stack": r"STACK:(\d+)", "local": r"LOCAL:(\d+)", "shared": r"SHARED:(\d+)"}
    return {word: max(map(int, re.findall(pattern, report))) for word, pattern in words.items()}


def widths(ptx: str, what: str) -> list[int]:
    """Bytes of each access to global memory, `what` being ld or st."""
    sizes = {"b8": 1, "u8": 1, "b16": 2, "u16": 2, "b32": 4, "u32": 4, "f32": 4, "b64": 8, "u64": 8, "f64": 8}
    found = re.findall(rf"\b{what}\.global\S*?(\.v\d)?\.(b\d+|u\d+|f\d+)\s", ptx)
    return [sizes[kind] * int(vector[2:] or 1) for vector, kind in found]


def wide(text: str) -> dict[str, int]:
    """How many accesses of 16 bytes it takes to load and store what the text loads and stores as a tensor."""
    share = TILE // (32 * engine.WARPS)  # elements of a thread
    loads = re.findall(r"= tl.load\(\w+_at \+ index, mask=inside, other=0.0\)(.*)", text)
    stores = re.findall(r"tl.store\(\w+_at \+ index, (.*), mask=inside[,)]", text)
    return {
        "wide_loads": sum(share * (2 if ".to(" in rest else 4) // 16 for rest in loads),
        "wide_stores": sum(share * (2 if "float16" in new else 4) // 16 for new in stores),
    }


def reports(word: str) -> Iterator[dict[str, Any]]:
    if word == "combine_tiles":
        yield {"kernel": word, **resources(combine_tiles().asm["cubin"]), "bound": engine.REGISTERS, **wide("")}
        return
    name, _, only = word.partition(":")
    name, _, stages = name.partition("+")
    for bits, form in VARIANTS:
        if only and bits != int(only):
            continue
        for dtype in (torch.float32, torch.bfloat16):
            try:
                found = kernels(name, bits, form, dtype, stages)
            except ValueError:  # nothing to keep in 8 bits
                continue
            for kernel in found:
                assembled = compiled(kernel).asm
                loads, stores = widths(assembled["ptx"], "ld"), widths(assembled["ptx"], "st")
                yield {
                    **{"optimizer": name, "stages": stages, "bits": bits, "format": form},
                    **{"dtype": str(dtype), "kernel": kernel.name},
                    **resources(assembled["cubin"]),
                    "bound": engine.options(kernel)["maxnreg"],
                    **wide(kernel.text),
                    "loads": {width: loads.count(width) for width in sorted(set(loads))},
                    "stores": {width: stores.count(width) for width in sorted(set(stores))},
                }


if __name__ == "__main__":
    for word in sys.argv[1:]:
        for report in reports(word):
            print(json.dumps(report), flush=True)
