"""Kernels compiled for sm_90 without a GPU, and their machine code as a list of instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from lightning_optim.engines import triton as engine
from lightning_optim.engines.kernels import Kernel

TARGET = GPUTarget("cuda", 90, 32)
FIRST = re.compile(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?)\s*;\s+/\* 0x[0-9a-f]{16} \*/")
SECOND = re.compile(r"^\s+/\* 0x([0-9a-f]{16}) \*/")
CALL = 12  # instructions within which a branch to a slow path calls it


@dataclass(frozen=True)
class Instruction:
    """An instruction with what it tells the scheduler.

    Attributes:
        address: Its address.
        predicated: Whether a predicate decides if it takes effect.
        name: Its opcode with modifiers, such as "LDG.E.128".
        operands: The rest of its text.
        stall: Cycles before the next instruction of the warp may be issued.
        sets: The barrier that is released when its result is there; 7 for none.
        reads: The barrier that is released when its operands have been read; 7 for none.
        waits: The barriers that must be released before it, one bit each.
    """

    address: int
    predicated: bool
    name: str
    operands: str
    stall: int
    sets: int
    reads: int
    waits: int

    @property
    def target(self) -> int | None:
        """The address that a branch leads to."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.name.startswith("BRA") else None
        return int(found[1], 16) if found else None


def compiled(kernel: Kernel) -> Any:
    """A printed kernel, compiled for sm_90 as a GPU would compile it."""
    signature = {"table": "*i64", "tiles": "*i32", **kernel.arguments}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = triton.compiler.ASTSource(engine.load(kernel.name, kernel.text, kernel.formats), signature, {}, aligned)
    return triton.compile(source, target=TARGET, options=engine.options(kernel))


def _dump(cubin: bytes, *words: str) -> str:
    """What the tool for object files, which comes with Triton, prints of an assembled kernel."""
    from triton import knobs  # of newer versions

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, *words, str(file)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """What an assembled kernel takes: registers of a thread, and bytes of stack, where spills would go."""
    report = _dump(cubin, "--dump-resource-usage")
    words = {"registers": r"REG:(\d+)", "stack": r"STACK:(\d+)", "local": r"LOCAL:(\d+)", "shared": r"SHARED:(\d+)"}
    return {word: max(map(int, re.findall(pattern, report))) for word, pattern in words.items()}


def instructions(cubin: bytes) -> list[Instruction]:
    """The instructions of an assembled kernel."""
    return parse(_dump(cubin, "-sass"))


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing. What they tell the scheduler lies in the upper half of each."""
    found: list[Instruction] = []
    begun: re.Match[str] | None = None
    for line in listing.splitlines():
        if match := FIRST.match(line):
            begun = match
        elif begun and (match := SECOND.match(line)):
            control, words = int(match[1], 16) >> 41, begun[2].split()
            predicate = words.pop(0) if words[0].startswith("@") else ""
            fields = control & 15, control >> 5 & 7, control >> 8 & 7, control >> 11 & 63
            found.append(Instruction(int(begun[1], 16), bool(predicate), words[0], " ".join(words[1:]), *fields))
            begun = None
    return found


def path_of_a_tile(code: Sequence[Instruction]) -> list[Instruction]:
    """The instructions that a warp runs for a whole tile whose addresses are aligned and whose values are usual."""
    at = {one.address: i for i, one in enumerate(code)}
    path: list[Instruction] = []
    i, turns = 0, 0
    while True:
        one = code[i]
        path.append(one)
        if one.name.startswith("EXIT") and not one.predicated:
            return path
        target = one.target
        if target is None:
            i += 1
            continue
        jumps = not one.predicated or _rather(code, at[target], i + 1)
        turns += jumps and at[target] <= i
        if turns > 1000:
            raise ValueError("the kernel has a loop that does not end")
        i = at[target] if jumps else i + 1


def _rather(code: Sequence[Instruction], jump: int, on: int) -> bool:
    """Whether to follow a branch: away from slow paths, and to where 16 bytes move at a time."""
    slow = [_calls(code[start : start + CALL]) for start in (jump, on)]
    if slow[0] != slow[1]:
        return slow[1]
    wide = [_wide(code, start) for start in (jump, on)]
    return jump > on and wide[0] > wide[1]


def _calls(code: Sequence[Instruction]) -> bool:
    for one in code:
        if one.name.startswith(("CALL", "BSYNC", "EXIT", "BRA")):
            return one.name.startswith("CALL")
    return False


def _wide(code: Sequence[Instruction], start: int) -> int:
    """Accesses of 16 bytes from an instruction to the end of the kernel that follows."""
    count = 0
    for one in code[start:]:
        count += one.name.startswith(("LDG", "STG")) and ".128" in one.name
        if one.name.startswith("EXIT") and not one.predicated:
            break
    return count
