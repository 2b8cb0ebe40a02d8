"""The model of the time of kernels: what it reads in machine code, and its scheduler."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("triton")

from benchmarks.kernel_model import CARDS, DRAM, FUSED, Issue, cycles, issues, programs_per_multiprocessor, ratio
from benchmarks.sass import Instruction, parse, path_of_a_tile


def listing(*lines: tuple[str, dict[str, int]]) -> str:
    """A listing as `cuobjdump -sass` prints it, of instructions with what they tell the scheduler."""
    found = []
    for i, (text, told) in enumerate(lines):
        control = (
            told.get("stall", 1) | told.get("sets", 7) << 5 | told.get("reads", 7) << 8 | told.get("waits", 0) << 11
        )
        found += [f"        /*{16 * i:04x}*/   {text} ;   /* 0x{i:016x} */", f"    /* 0x{control << 41:016x} */"]
    return "\n".join(found)


def test_instructions_are_read_with_what_they_tell_the_scheduler() -> None:
    load, add = parse(
        listing(
            ("@!P0 LDG.E.128 R8, desc[UR4][R4.64]", {"stall": 2, "sets": 3}),
            ("FADD R1, R8, R9", {"stall": 5, "reads": 1, "waits": 0b1001}),
        )
    )
    assert load == Instruction(0, True, "LDG.E.128", "R8, desc[UR4][R4.64]", 2, 3, 7, 0)
    assert add == Instruction(16, False, "FADD", "R1, R8, R9", 5, 7, 1, 0b1001)


def test_the_path_avoids_slow_divisions_and_narrow_accesses() -> None:
    code = parse(
        listing(
            ("@P0 BRA 0x80", {}),  # to the tile whose size is no multiple of 8
            ("LDG.E.128 R0, R4", {}),
            ("@P1 BRA 0x50", {}),  # past a slow division
            ("MOV R1, R2", {}),
            ("CALL.REL.NOINC 0x90", {}),
            ("STG.E.128 R0, R4", {}),
            ("EXIT", {}),
            ("NOP", {}),
            ("LDG.E R0, R4", {}),
            ("EXIT", {}),
        )
    )
    assert [one.address for one in path_of_a_tile(code)] == [0x00, 0x10, 0x20, 0x50, 0x60]


def issue(unit: str = "float", busy: int = 1, latency: int = 4, sets: int = 7, waits: Sequence[int] = ()) -> Issue:
    return Issue(unit, busy, latency, 1, sets, 7, tuple(waits))


def test_units_that_are_busy_bound_many_warps() -> None:
    assert cycles([issue()] * 200, 8) == pytest.approx(200, rel=0.05)
    assert cycles([issue("integer", busy=2)] * 200, 8) == pytest.approx(400, rel=0.05)
    mixed = [issue("integer", busy=2), issue(), issue()] * 100
    assert cycles(mixed, 8) == pytest.approx(300, rel=0.1)  # one instruction in each cycle


def test_warps_hide_the_latency_of_each_other() -> None:
    code = [issue("memory", busy=4, latency=DRAM, sets=0), issue(waits=[0]), *[issue()] * 100]
    alone, beside = cycles(code, 1), cycles(code, 4)
    assert alone == pytest.approx(DRAM + 100, rel=0.1)
    assert alone / 4 <= beside < alone / 3


def test_wide_accesses_occupy_their_unit_longer() -> None:
    wide, narrow = issues(parse(listing(("LDG.E.128 R0, R4", {}), ("LDG.E R0, R4", {}))))
    assert wide.busy == 4 * narrow.busy


def test_registers_and_shared_memory_bound_the_programs_of_a_multiprocessor() -> None:
    assert programs_per_multiprocessor({"registers": 128, "shared": 0}, 4) == 4
    assert programs_per_multiprocessor({"registers": 16, "shared": 0}, 4) == 16
    assert programs_per_multiprocessor({"registers": 16, "shared": 100 << 10}, 4) == 2


def test_the_longer_of_memory_and_instructions_counts() -> None:
    for card in CARDS:
        assert ratio([{"bytes": FUSED, "cycles": 1}], card) == (1.0, "memory")
        slow, by = ratio([{"bytes": FUSED, "cycles": 10_000}], card)
        assert by == "instructions"
        assert slow > 2


@pytest.mark.timeout(300)
def test_a_kernel_is_modelled_without_a_gpu(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    out = tmp_path / "model.json"
    command = [sys.executable, "-m", "benchmarks.kernel_model", "lion:32", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])
    assert not done.returncode, done.stderr[-2000:]
    (row,) = json.loads(out.read_text())["after"]["lion 32"]
    assert (row["bytes"], row["stack"]) == (20, 0)
    assert row["instructions"] > 15
    assert 100 < row["cycles"] < 700
