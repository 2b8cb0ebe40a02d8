"""What is read of Nsight Compute's table."""

from __future__ import annotations

import pytest

from benchmarks.one_kernel import METRICS, command, counted

PRINTED = """==PROF== Connected to process 42
==PROF== Profiling "adamw_step": 0%....50%....100% - 3 passes
{"elements": 2048000, "multiprocessors": 132}
==PROF== Disconnected from process 42
"ID","Process ID","Kernel Name","CC","dram__bytes_read.sum","gpu__time_duration.sum","sm__cycles_elapsed.max"
"","","","","byte","ns","cycle"
"0","42","adamw_step","9.0","1,990,656,000","660,128","20,000"
"""


def test_the_row_of_the_launch_is_read() -> None:
    found = counted(PRINTED)
    assert found == {
        **{"kernel": "adamw_step", "elements": 2048000, "multiprocessors": 132},
        **{"ns": 660128.0, "cycles": 20000.0, "bytes_read": 1990656000.0},
        "cycles_per_1024": 1320.0,  # 2000 blocks of 1024 elements on 132 multiprocessors
    }


def test_without_a_launch_it_says_what_ncu_said() -> None:
    with pytest.raises(ValueError, match="No kernels were profiled"):
        counted("==PROF== Connected\n==WARNING== No kernels were profiled.\n")


def test_the_command_line_counts_one_launch_and_leaves_the_clocks_alone() -> None:
    words = command("adamw", 8, ("ns", "cycles"))
    assert words[:3] == ["ncu", "--clock-control", "none"]
    assert words[words.index("--launch-count") + 1] == "1"
    assert words[words.index("--metrics") + 1] == f"{METRICS['ns']},{METRICS['cycles']}"
