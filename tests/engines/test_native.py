"""The C++ that looks at tensors: what it sees, when it is compiled, and what happens where it cannot be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.engines import native
from lightning_optim.errors import EngineError
from tests.harness.processes import Machine

LONG = 120.0  # seconds after which a test gives up


@pytest.fixture
def library() -> native.Native:
    found = native.native()
    if found is None:
        pytest.skip("no C++ compiler, or no header files")
    return found


@pytest.fixture
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory() as folder:
        yield Machine(Path(folder), Path(folder))


# ------------------------------------------------------------------ what it sees


def state_of() -> dict[Any, Any]:
    return {"p": {"step": torch.zeros(()), "m": torch.ones(2)}, "q": {"step": torch.zeros(())}, "r": {}}


CHANGES: dict[str, Callable[[dict[Any, Any]], Any]] = {
    "another value": lambda state: state["p"].update(m=torch.ones(2)),
    "one more value": lambda state: state["r"].update(m=torch.ones(2)),
    "one value less": lambda state: state["q"].clear(),
    "another order of values": lambda state: state["p"].update(step=state["p"].pop("step")),
    "another dict": lambda state: state.update(q=dict(state["q"])),
    "no dict": lambda state: state.update(r=0),
    "one more key": lambda state: state.update(s={}),
    "one key less": lambda state: state.pop("r"),
    "another order of keys": lambda state: state.update(p=state.pop("p")),
    "a value moved to the next dict": lambda state: state["q"].update(m=state["p"].pop("m")),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_holds_other_objects_is_told(change: str, library: native.Native) -> None:
    state = state_of()
    kept = list(state), list(state.values()), [value for of in state.values() for value in of.values()]
    assert library.holds(state, *kept)
    CHANGES[change](state)
    assert not library.holds(state, *kept)


def test_references_are_counted_as_before(library: native.Native) -> None:
    state = state_of()
    values = [value for of in state.values() for value in of.values()]
    kept = list(state), list(state.values()), values
    params: list[torch.Tensor] = [torch.nn.Parameter(torch.ones(2))]
    grad = params[0].grad = torch.ones(2)
    facts = library.describe(params)
    assert facts is not None
    addresses = native.numbers(1, [grad.data_ptr()])
    counted = [*values, *state.values(), params[0], grad, None]
    before = [sys.getrefcount(one) for one in counted]
    for _ in range(1000):
        library.holds(state, *kept)
        library.describe(params)
        library.look(params, True, facts, addresses, native.numbers(1))
    after = [sys.getrefcount(one) for one in counted]
    assert [abs(x - y) < 500 for x, y in zip(before, after, strict=True)] == [True] * len(before)


def test_gradients_that_python_has_not_seen_are_read(library: native.Native) -> None:
    """The backward pass makes tensors of C++; an object of Python for each would be made and dropped in each step."""
    p = torch.nn.Parameter(torch.ones(3))
    torch.autograd.backward((2 * p).sum())
    other = torch.zeros(3)
    facts, before = library.describe([other]), native.numbers(1, [other.data_ptr()])
    now = native.numbers(1)
    assert facts is not None
    assert library.look([p], True, facts, before, now) == native.MOVED
    assert p.grad is not None
    assert now[0] == p.grad.data_ptr()


def test_what_has_no_memory_is_left_to_python(library: native.Native) -> None:
    facts = library.describe([torch.ones(2)])
    assert facts is not None
    zero = native.numbers(1)
    for strange in (torch.eye(2).to_sparse(), torch.nn.UninitializedParameter(), torch.ones(2, device="meta")):
        assert library.look([strange], False, facts, zero, native.numbers(1)) > native.MOVED


# ------------------------------------------------------------------ when it is compiled


def in_the_background() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lightning_optim native"]


def after_tensors() -> tuple[bool, bool]:
    """Whether a new process has the functions after its first step, and after it has looked at many tensors."""
    native._native, native._looked, native.PATIENCE = None, 0, 100
    native.count(90)
    at_once = native.native() is not None
    assert not in_the_background()
    native.count(10)
    for thread in in_the_background():
        thread.join(LONG)
        assert not thread.is_alive()
    native.count(100)  # nothing begins again
    assert not in_the_background()
    return at_once, native.native() is not None


def test_many_tensors_start_the_compiler_in_the_background_once_on_a_machine(machine: Machine) -> None:
    assert machine.run(after_tensors) == (False, True)
    assert machine.compilations == 1
    assert machine.run(after_tensors) == (True, True)
    assert machine.compilations == 1
    assert machine.litter() == []


def test_a_compiler_that_fails_leaves_the_looking_to_python(machine: Machine) -> None:
    machine.set_compiler("echo it has no header files >&2; exit 1")
    assert machine.run(after_tensors) == (False, False)

    def loaded() -> str:
        native._native = None
        try:
            native.load()
        except EngineError as error:
            return str(error)
        return ""

    assert "it has no header files" in machine.run(loaded)


def test_a_source_that_is_missing_leaves_the_looking_to_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_native", None)
    monkeypatch.setattr(native, "_looked", 0)
    monkeypatch.setattr(native, "_source", native._source.__wrapped__)
    monkeypatch.setattr("importlib.resources.files", lambda _: Path("/nowhere"))
    native.count(1)
    assert native.native() is None
    with pytest.raises(EngineError, match="cannot be read"):
        native.load()


def test_a_child_of_a_fork_has_no_thread_that_compiles(machine: Machine) -> None:
    def looked() -> int:
        return native._looked

    native._looked, before = -1, native._looked
    try:
        assert machine.run(looked) == 0
    finally:
        native._looked = before


def environ_of(machine: Machine) -> dict[str, str]:
    return {**os.environ, **{name: value for name, value in machine.environ.items() if value is not None}}


SCRIPT = """
import time
from lightning_optim.engines import native
native.count(native.PATIENCE)
deadline = time.monotonic() + 60
while not __import__("os").path.exists({note!r}) and time.monotonic() < deadline:
    time.sleep(0.05)
"""


def test_a_process_that_ends_stops_the_compiler(machine: Machine, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    machine.set_compiler(f"sleep 1000 & echo $! > {note}; wait")
    subprocess.run(
        [sys.executable, "-c", SCRIPT.format(note=str(note))], env=environ_of(machine), timeout=LONG, check=True
    )
    assert ended(int(note.read_text()))
    assert machine.litter() == []


def test_a_process_that_ends_does_not_wait_for_another_that_compiles(machine: Machine, tmp_path: Path) -> None:
    note = tmp_path / "pid"
    machine.set_compiler(f"sleep 1000 & echo $! > {note}; wait")
    code = SCRIPT.format(note=str(note))
    times = "import atexit\natexit.register(lambda: print(time.monotonic() - ended))\n"
    waits = f"{times}{code}\ntime.sleep(1)\nended = time.monotonic()"
    with subprocess.Popen([sys.executable, "-c", f"{code}\ntime.sleep(1000)"], env=environ_of(machine)) as first:
        try:
            said = subprocess.run(
                [sys.executable, "-c", waits], env=environ_of(machine), timeout=LONG, check=True, stdout=subprocess.PIPE
            )
        finally:
            first.kill()
    os.kill(int(note.read_text()), signal.SIGKILL)
    assert float(said.stdout) < 4  # the thread would be waited for five seconds


def ended(pid: int) -> bool:
    """Whether a process has ended, or does so within a few seconds."""
    for _ in range(100):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    return False
