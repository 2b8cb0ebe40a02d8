"""The harness of the distributed tests: results, and the blame when a rank fails."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.harness.ranks import RankFailure, run_ranks


def rank() -> int:
    return int(os.environ["RANK"])


def total(mine: float, factor: float = 1.0) -> torch.Tensor:
    dist.init_process_group("gloo")
    value = torch.tensor([mine + rank()]) * factor
    dist.all_reduce(value)
    return value


def raise_on_one(waiting: bool) -> None:
    dist.init_process_group("gloo")
    if rank() == 1:
        raise ValueError("rank 1 is unhappy")
    if waiting:
        dist.barrier()


def kill_one(with_signal: signal.Signals) -> None:
    dist.init_process_group("gloo")
    if rank() == 1:
        os.kill(os.getpid(), with_signal)
    dist.barrier()


def crash_in_native_code() -> None:
    """A thread that has never run Python reads where no memory is, as a worker of gloo may."""
    dist.init_process_group("gloo")
    if rank() == 1:
        libc, thread = ctypes.CDLL(None), ctypes.c_void_p()
        libc.pthread_create(ctypes.byref(thread), None, ctypes.cast(libc.strlen, ctypes.c_void_p), ctypes.c_void_p(8))
        libc.pthread_join(thread, None)
    dist.barrier()


def crash_in_gloo(times: int, crashes: Path) -> int:
    """The thread that runs collectives of rank 1 crashes in the first runs of a job."""
    dist.init_process_group("gloo")
    dist.barrier()
    before = len(list(crashes.iterdir()))
    dist.barrier()
    if rank() == 1 and before < times:
        Path(crashes, str(before)).touch()
        names = {int(path.parent.name): path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")}
        thread = next(thread for thread, name in names.items() if name == "pt_gloo_runloop")
        ctypes.CDLL(None).tgkill(os.getpid(), thread, int(signal.SIGSEGV))
        time.sleep(10)
    dist.barrier()
    return before


def complain() -> None:
    print(f"rank {rank()} has something to say", file=sys.stderr)


def hang() -> None:
    time.sleep(60)


def leave_early() -> int:
    """Rank 0, which holds the store, is done long before rank 1 uses it."""
    dist.init_process_group("gloo")
    if rank() == 1:
        time.sleep(0.5)
        dist.new_group([1])
    return rank()


def unpicklable() -> object:
    return lambda: None


def test_ranks_reduce_together() -> None:
    results = run_ranks(total, 2.0, factor=10.0)
    assert [result.item() for result in results] == [50.0, 50.0]


def test_number_of_ranks_and_environment(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server keeps the environment it was started with; ranks see today's."""
    monkeypatch.setenv("LIGHTNING_OPTIM_A", str(tmp_path))
    assert run_ranks(os.getenv, "LIGHTNING_OPTIM_A", world_size=3) == [str(tmp_path)] * 3
    assert run_ranks(os.getenv, "LIGHTNING_OPTIM_B", env={"LIGHTNING_OPTIM_B": "b"}) == ["b", "b"]
    assert run_ranks(rank, world_size=3) == [0, 1, 2]


def test_one_that_is_done_stays_for_the_others() -> None:
    assert run_ranks(leave_early) == [0, 1]


@pytest.mark.parametrize("waiting", [True, False])
def test_an_exception_is_blamed_on_its_rank(waiting: bool) -> None:
    with pytest.raises(RankFailure, match="rank 1: ValueError: rank 1 is unhappy") as caught:
        run_ranks(raise_on_one, waiting)
    assert list(caught.value.causes) == [1]
    assert "in raise_on_one" in caught.value.causes[1]
    assert list(caught.value.consequences) == ([0] if waiting else [])


def test_a_killed_rank_is_reported_within_seconds() -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1: killed by SIGKILL") as caught:
        run_ranks(kill_one, signal.SIGKILL)
    assert list(caught.value.causes) == [1]
    assert time.monotonic() - start < 20


def test_a_crash_tells_where() -> None:
    with pytest.raises(RankFailure, match="killed by SIGSEGV") as caught:
        run_ranks(kill_one, signal.SIGSEGV)
    assert "in kill_one" in caught.value.causes[1]


@pytest.mark.skipif(sys.platform != "linux", reason="torch prints native stacks on Linux")
def test_a_crash_of_a_native_thread_tells_its_stack() -> None:
    with pytest.raises(RankFailure, match="killed by SIGSEGV") as caught:
        run_ranks(crash_in_native_code)
    assert list(caught.value.causes) == [1]
    (of_thread,) = (text for text in caught.value.causes[1].split("\n\n") if "::fatalSignalHandler" in text)
    assert "libc.so" in of_thread
    assert "python frames" not in of_thread


@pytest.mark.skipif(sys.platform != "linux", reason="torch prints native stacks on Linux")
def test_a_job_is_repeated_once_where_a_thread_of_gloo_crashes(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"(?s)A thread of gloo crashed, so the job runs again\. rank 1: killed by SIGSEGV"
    ):
        assert run_ranks(crash_in_gloo, 1, tmp_path) == [1, 1]
    with (
        pytest.warns(UserWarning, match="A thread of gloo crashed"),
        pytest.raises(RankFailure, match="rank 1: killed by SIGSEGV"),
    ):
        run_ranks(crash_in_gloo, 3, tmp_path)


def test_what_ranks_say_belongs_to_the_test_that_started_them(capsys: pytest.CaptureFixture[str]) -> None:
    run_ranks(complain)
    assert capsys.readouterr().err == "rank 0 has something to say\nrank 1 has something to say\n"


def test_a_hanging_job_is_ended_and_tells_where() -> None:
    with pytest.raises(RankFailure, match=r"rank 0: still running after 3 s") as caught:
        run_ranks(hang, timeout=3)
    assert list(caught.value.causes) == [0, 1]
    assert all("in hang" in text for text in caught.value.causes.values())


def test_a_stopped_rank_does_not_stop_the_test() -> None:
    with pytest.raises(RankFailure, match="rank 1: still running after 3 s"):
        run_ranks(kill_one, signal.SIGSTOP, timeout=3)


def test_a_result_that_does_not_pickle_is_an_error() -> None:
    with pytest.raises(RankFailure, match=r"rank 0: .*pickle"):
        run_ranks(unpicklable)


def test_a_function_without_a_name_is_refused() -> None:
    with pytest.raises(Exception, match="pickle"):
        run_ranks(lambda: None)
