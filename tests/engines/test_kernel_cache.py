"""The cache of compiled kernels: a first step comes to its end whatever has happened to the cache and the compiler.

Each test runs first steps in processes of their own. The step runs on the engine that `repr` names, and nothing is left
behind.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import functools
import os
import pwd
import resource
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import AdamW
from lightning_optim.engines.cpp import compiler, dynamic_library, folders
from lightning_optim.errors import EngineError, OptionError
from tests.harness.processes import NOBODY, WHOLE, Machine, Step, first_step

pytestmark = pytest.mark.skipif(bool(compiler.without_compiler()), reason="no C++ compiler")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
EVIL = compiler.Source('extern "C" void run() {}\n//')  # moves no weight


@pytest.fixture(scope="module")
def store() -> Iterator[Path]:
    """Where the tests keep what was compiled: each kernel is compiled once."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o777)
        yield Path(folder)


@pytest.fixture
def machine(store: Path) -> Iterator[Machine]:
    """A machine with an empty cache. Its folders are open to other users, as those of pytest are not."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Machine(Path(folder), store)


@pytest.fixture
def warm(machine: Machine) -> Machine:
    """A machine whose cache holds the kernels of a first step."""
    assert machine.run() == fast()
    assert machine.compilations == 2  # whether the compiler works, and the kernel
    return machine


def fast() -> Step:
    return Step("compiled", pytest.approx(WHOLE, abs=1e-7), 1.0, [])  # type: ignore[arg-type]


def assert_slow(step: Step, reason: str, told: int = 1) -> None:
    """The blocked engine has run the step; `repr` and one warning say why."""
    assert step.engine.startswith("blocked (")
    assert reason in step.engine
    assert step.weight == pytest.approx(WHOLE, abs=1e-7)
    assert step.steps == 1
    assert len(step.warnings) == told
    assert all(reason in words for words in step.warnings)


# ------------------------------------------------------------------ what is stored


def test_a_second_process_compiles_nothing(warm: Machine) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in warm.cache.iterdir()}
    assert warm.run() == fast()
    assert warm.compilations == 2
    assert {file.name: file.stat().st_mtime_ns for file in warm.cache.iterdir()} == before
    assert warm.cache.stat().st_mode & 0o077 == 0
    assert warm.litter() == []


def flip(kernel: Path) -> None:
    contents = bytearray(kernel.read_bytes())
    contents[len(contents) // 3] ^= 16
    kernel.write_bytes(contents)


def replace_by(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace(kernel: Path) -> None:
        kernel.unlink()
        make(kernel)

    return replace


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "cut off": lambda kernel: os.truncate(kernel, 9000),
    "without its last byte": lambda kernel: os.truncate(kernel, kernel.stat().st_size - 1),
    "longer": lambda kernel: kernel.write_bytes(kernel.read_bytes() + b"\n"),
    "empty": lambda kernel: os.truncate(kernel, 0),
    "rubbish": lambda kernel: kernel.write_bytes(os.urandom(5000)),
    "one bit": flip,
    "of another name": lambda kernel: kernel.write_bytes(min(kernel.parent.glob("*.so"), key=_size).read_bytes()),
    "a folder": replace_by(lambda kernel: kernel.mkdir()),
    "a pipe": replace_by(os.mkfifo),
    "a link to nothing": replace_by(lambda kernel: kernel.symlink_to("nothing")),
    "a link to itself": replace_by(lambda kernel: kernel.symlink_to(kernel)),
}


def _size(file: Path) -> int:
    return file.stat().st_size


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_kernel_is_built_again_once(damage: str, warm: Machine) -> None:
    kernel = warm.kernels[-1]
    DAMAGES[damage](kernel)
    assert warm.run() == fast()
    assert warm.compilations == 3
    if damage != "a folder":  # which nobody has put there but the user
        assert warm.run() == fast()
        assert warm.compilations == 3
    assert warm.litter() == []


def test_a_damaged_kernel_that_cannot_be_built_again(warm: Machine) -> None:
    flip(warm.kernels[-1])
    warm.set_compiler("exit 3")
    assert_slow(warm.run(), "ends with status 3")


def test_a_kernel_that_is_cut_off_while_it_runs_harms_nobody(warm: Machine) -> None:
    """It runs from memory and not from the file, whose missing pages would end the process."""

    def steps() -> float:
        p = torch.nn.Parameter(torch.ones(9))
        optimizer = AdamW([p])
        for _ in range(3):
            p.grad = torch.ones(9)
            optimizer.step()
            for file in warm.kernels:
                os.truncate(file, 0)
        return p[0].item()

    assert warm.run(steps) < WHOLE


def test_loading_tells_kernels_apart_that_use_one_descriptor(store: Path, machine: Machine) -> None:
    """The loader of the system goes by names, and the number of a descriptor is soon used again."""
    text = 'extern "C" void run(double* to) {{ *to = {}; }}\n'

    def values() -> list[float]:
        found = []
        for value in (1.5, 2.5, 3.5):
            number = ctypes.c_double()
            compiler.load(compiler.Source(text.format(value)))(
                *[ctypes.addressof(number)] * 3, 0, 0, None, None, 0, *[None] * 3
            )
            found.append(number.value)
        return found

    assert machine.run(values) == [1.5, 2.5, 3.5]


def test_without_files_in_memory_a_temporary_folder_serves(warm: Machine) -> None:
    def step() -> Step:
        os.memfd_create = refuse(errno.ENOSYS)
        return first_step()

    assert warm.run(step) == fast()
    assert warm.litter() == []


def refuse(number: int) -> Callable[..., Any]:
    def refused(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return refused


# ------------------------------------------------------------------ compilers that fail

LATER = 'grep -q "void run() {}" kernel.cpp ||'  # it compiles what tells whether it works, and nothing else
FAILURES = {
    "ends with a status": ("exit 3", "ends with status 3 and says nothing"),
    "says why": ("{ echo license expired >&2; exit 1; }", "license expired"),
    "says it in bytes that are no text": (r"{ printf 'caf\351\n' >&2; exit 1; }", r"caf\xe9"),
    "is killed": ("kill -9 $$", "ends with status -9"),
    "writes nothing": ("exit 0", "writes nothing"),
    "writes an empty file": ("{ : > kernel.so; exit 0; }", "writes nothing"),
    "writes rubbish": ("{ echo rubbish > kernel.so; exit 0; }", "cannot be loaded"),
    "writes half a library": (
        '{ head -c 9000 "$(ls -S STORE/* | head -1)" > kernel.so; exit 0; }',
        "no whole library",
    ),
    "writes another library": (
        "{ echo 'int x;' | c++ -shared -x c++ - -o kernel.so; exit 0; }",
        "undefined symbol: run",
    ),
    "is gone": ('{ rm "$0"; exit 1; }', "No such file"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("when", ["at once", "after the first kernel"])
def test_without_a_kernel_the_blocked_engine_runs(failure: str, when: str, machine: Machine, store: Path) -> None:
    command, reason = FAILURES[failure]
    if failure == "writes half a library":
        Machine(machine.root / "other", store).run()
    machine.set_compiler(f"{LATER if when != 'at once' else ''} {command.replace('STORE', str(store))}")
    assert_slow(machine.run(), reason)
    assert machine.litter() == []
    assert len(machine.kernels) == (when != "at once")


@pytest.mark.parametrize("when", ["", LATER])
def test_a_compiler_that_hangs_is_ended_with_its_children(when: str, machine: Machine) -> None:
    note = machine.root / "child"
    machine.set_compiler(f"{when} {{ sleep 1000 & echo $! > {note}; wait; }}")

    def step() -> Step:
        compiler.SECONDS = compiler.SECONDS_OF_PROBE = 1
        return first_step()

    assert_slow(machine.run(step), "has not ended after 1 seconds")
    assert machine.compilations == (2 if when else 1)  # it is not tried again elsewhere
    assert machine.litter() == []
    assert not is_running(int(note.read_text()))


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def test_an_engine_that_was_asked_for_is_an_error_that_changes_nothing(machine: Machine) -> None:
    machine.set_compiler(f"{LATER} exit 1")

    def attempt() -> tuple[int, list[float]]:
        p = torch.nn.Parameter(torch.ones(9))
        p.grad = torch.ones(9)
        optimizer = AdamW([p], engine="compiled")
        for _ in range(2):
            with pytest.raises(OptionError, match=r"engine='compiled' cannot serve here: the C.* Use engine='auto' or"):
                optimizer.step()
        return len(optimizer.state), p.tolist()

    assert machine.run(attempt) == (0, [1.0] * 9)


def test_another_optimizer_with_its_kernels_stays_on_the_fast_engine(warm: Machine) -> None:
    warm.set_compiler("exit 1")

    def steps() -> tuple[str, str]:
        p = torch.nn.Parameter(torch.ones(9, dtype=torch.float64))
        p.grad = torch.ones_like(p)
        slow = AdamW([p])
        with pytest.warns(UserWarning, match="another engine than 'compiled' runs the step"):
            slow.step()
        return repr(slow), first_step().engine

    slow, quick = warm.run(steps)
    assert "engine: blocked (the C++ compiler" in slow
    assert quick == "compiled"


def test_kernels_in_the_cache_need_no_compiler(warm: Machine) -> None:
    warm.environ |= {"CXX": None, "PATH": str(warm.root)}
    (warm.root / "c++").unlink()
    assert warm.run() == fast()


def test_without_a_compiler_nothing_is_said(machine: Machine) -> None:
    """Whoever has none expects nothing else; `repr` says it."""
    machine.environ |= {"CXX": None, "PATH": str(machine.temporary)}
    assert_slow(machine.run(), "no C++ compiler is found", told=0)


def test_a_service_without_standard_streams(machine: Machine) -> None:
    def step() -> Step:
        for stream in range(3):
            os.close(stream)
        return first_step()

    assert machine.run(step) == fast()
    assert machine.compilations == 2
    assert machine.litter() == []


@needs_root
def test_no_process_can_be_started(machine: Machine) -> None:
    """Root may start any number, and is somebody else here, who has none."""

    def step() -> Step:
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
        return first_step()

    found = machine.run(step, user=NOBODY)
    assert found.engine.startswith("blocked (")
    assert (found.steps, len(found.warnings)) == (1.0, 1)


def test_the_compiler_may_be_a_command_with_options(machine: Machine) -> None:
    machine.set_compiler('[ "$1" = -DNAME=1 ] || exit 1', name="c++ of mine")
    machine.environ["CXX"] = f"'{machine.environ['CXX']}' -DNAME=1"
    assert machine.run() == fast()


def test_paths_may_be_any_bytes(machine: Machine) -> None:
    strange = machine.root / os.fsdecode(b"caf\xe9 \xff;x\n")
    other = Machine(strange, machine.store)
    other.set_compiler(name=os.fsdecode(b"c++\xe9"))
    other.environ["CXX"] = "'" + str(other.environ["CXX"]) + "'"
    assert other.run() == fast()
    assert other.compilations == 2
    other.set_compiler(f"{LATER} exit 1")
    other.kernels[-1].unlink()
    other.environ["CXX"] = "'" + str(other.environ["CXX"]) + "'"
    assert r"caf\xe9 \xff" in other.run().engine.encode().decode()


# ------------------------------------------------------------------ disks and homes


@pytest.mark.parametrize("largest", [0, 300, 5000])
def test_a_full_disk_costs_speed_and_nothing_else(largest: int, machine: Machine) -> None:
    """No file can be longer than so many bytes."""
    step = machine.run(largest=largest)
    assert step.engine.startswith("blocked (")
    assert (step.weight, step.steps) == (pytest.approx(WHOLE, abs=1e-7), 1.0)
    assert len(step.warnings) == 1
    assert machine.litter() == []
    assert all(file.stat().st_size for file in machine.kernels)


def test_where_the_cache_is_full_a_temporary_folder_serves(machine: Machine) -> None:
    machine.set_compiler('case "$(pwd -P)" in */lightning_optim/*) echo No space left on device >&2; exit 1;; esac')
    assert machine.run() == fast()
    assert machine.compilations == 4
    assert machine.kernels == []
    assert machine.litter() == []


def test_what_cannot_be_stored_serves_its_process(machine: Machine) -> None:
    def step() -> Step:
        os.fsync = refuse(errno.ENOSPC)
        return first_step()

    assert machine.run(step) == fast()
    assert machine.kernels == []
    assert machine.litter() == []


@pytest.mark.parametrize("kept", [0, 1, 2])
def test_a_cache_that_is_read_only(kept: int, machine: Machine) -> None:
    """What is there is used, what is not is compiled elsewhere, and nothing is left anywhere."""
    assert machine.run(user=NOBODY) == fast()
    for file in machine.kernels[kept:]:
        file.unlink()
    machine.cache.chmod(0o555)
    machine.cache.parent.chmod(0o755)
    assert machine.run(user=NOBODY) == fast()
    assert machine.compilations == 4 - kept
    assert len(machine.kernels) == kept
    assert machine.litter() == []
    machine.cache.chmod(0o755)


@pytest.mark.parametrize("home", [None, "", "relative", "/dev/null/home"])
def test_without_a_home_a_temporary_folder_serves(home: str | None, machine: Machine) -> None:
    """Nor does the user have an entry from which it could be known."""
    machine.environ |= {"XDG_CACHE_HOME": None, "HOME": home}

    def step() -> Step:
        def missing(_: int) -> Any:
            raise KeyError

        pwd.getpwuid = missing
        return first_step()

    assert machine.run(step) == fast()
    assert machine.litter() == []
    assert not Path("relative").exists()


@needs_root
def test_the_home_of_somebody_else_is_left_alone(machine: Machine) -> None:
    """`sudo` keeps the HOME of the user who calls it, in whose cache folders of root would be in the way."""
    os.chown(machine.cache.parent, NOBODY, -1)
    machine.environ |= {"XDG_CACHE_HOME": None, "HOME": str(machine.cache.parent)}
    assert machine.run(lambda: folders._cache_home()) == os.path.join(pwd.getpwuid(0).pw_dir, ".cache")
    os.chown(machine.cache.parent, 0, -1)
    assert machine.run(lambda: folders._cache_home()) == str(machine.cache.parent / ".cache")


@needs_root
def test_a_user_without_an_entry(machine: Machine) -> None:
    machine.environ |= {"XDG_CACHE_HOME": None, "HOME": None}
    assert machine.run(user=54321) == fast()
    assert machine.litter() == []


@pytest.mark.parametrize(
    ("environ", "home"),
    [
        ({"XDG_CACHE_HOME": "/x/y", "HOME": "/h"}, "/x/y"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache"),
        ({"XDG_CACHE_HOME": "x/y", "HOME": "/h"}, "/h/.cache"),  # another folder wherever a program is started
        ({"XDG_CACHE_HOME": "~/x", "HOME": "/h"}, "/h/.cache"),
        ({"HOME": ""}, os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache")),
        ({"HOME": "."}, os.path.join(pwd.getpwuid(os.geteuid()).pw_dir, ".cache")),
    ],
)
def test_where_the_cache_is(environ: dict[str, str], home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert folders._cache_home() == home


def test_no_folder_for_temporary_files_at_all(machine: Machine) -> None:
    machine.environ |= {"XDG_CACHE_HOME": "/dev/null"}

    def step() -> Step:
        folders.temporary = list
        return first_step()

    assert_slow(machine.run(step), "there is no folder for temporary files")


# ------------------------------------------------------------------ what somebody else may have planted


def plant(machine: Machine) -> Path:
    """Put a kernel that moves nothing in the place of the right one, whole and sealed."""
    kernel = machine.kernels[-1]

    def sealed() -> bytes:
        compiler.load(EVIL)
        file = Path(machine.cache, compiler._key(EVIL) + ".so")
        found = file.read_bytes()[: -len(compiler._seal("", b""))]
        file.unlink()
        return found + compiler._seal(kernel.stem, found)

    kernel.write_bytes(machine.run(sealed))
    return kernel


def test_a_planted_kernel_would_move_nothing(warm: Machine) -> None:
    """So the tests below see whether it was loaded."""
    plant(warm)
    assert warm.run().weight == 1.0


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o707, 0o1777])
def test_nothing_is_taken_from_a_folder_that_others_can_write(mode: int, warm: Machine) -> None:
    plant(warm)
    warm.cache.chmod(mode)
    step = warm.run()
    assert (step.engine, step.weight) == ("compiled", pytest.approx(WHOLE, abs=1e-7))
    assert len(step.warnings) == 1
    assert "can be written by others" in step.warnings[0]
    assert warm.litter() == []


@pytest.mark.parametrize("mode", [0o666, 0o620, 0o602])
def test_no_kernel_is_taken_that_others_can_write(mode: int, warm: Machine) -> None:
    plant(warm).chmod(mode)
    assert warm.run() == fast()
    assert warm.kernels[-1].stat().st_mode & 0o777 == 0o600  # built again


@needs_root
def test_no_kernel_of_another_user_is_taken(warm: Machine) -> None:
    os.chown(plant(warm), NOBODY, -1)
    assert warm.run() == fast()
    assert warm.kernels[-1].stat().st_uid == os.geteuid()


@needs_root
@pytest.mark.parametrize("linked", [False, True])
def test_no_folder_of_another_user_is_taken(linked: bool, warm: Machine) -> None:
    """Who can write to the parent of the folder can put another one in its place, or a link to another one."""
    plant(warm)
    theirs = warm.cache.rename(warm.root / "theirs")
    os.chown(theirs, NOBODY, -1)
    if linked:
        warm.cache.symlink_to(theirs)
    else:
        theirs.rename(warm.cache)
    step = warm.run()
    assert (step.engine, step.weight) == ("compiled", pytest.approx(WHOLE, abs=1e-7))


def test_a_link_to_a_folder_of_ones_own_is_followed(warm: Machine) -> None:
    warm.cache.symlink_to(warm.cache.rename(warm.root / "elsewhere"))
    assert warm.run() == fast()
    assert warm.compilations == 2


# ------------------------------------------------------------------ several processes and threads


def test_eight_processes_compile_once(machine: Machine) -> None:
    started = [machine.start() for _ in range(8)]
    assert [process.result() for process in started] == [fast()] * 8
    assert machine.compilations == 2
    assert machine.litter() == []


def test_eight_threads_compile_once(machine: Machine) -> None:
    def steps() -> list[Step]:
        found: list[Step] = []
        source = compiler.Source('extern "C" void run() {}\n// of threads\n')
        threads = [threading.Thread(target=lambda: found.append(compiler.load(source))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [len(found), len({id(function) for function in found})]  # type: ignore[list-item]

    assert machine.run(steps) == [8, 1]
    assert machine.compilations == 1


def waiting(machine: Machine, note: Path) -> int:
    """The id of a compiler that has been started and waits."""
    deadline = time.monotonic() + 30
    while not (note.exists() and note.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return int(note.read_text())


@pytest.fixture
def stuck(machine: Machine) -> Iterator[Callable[[], int]]:
    """A machine whose compiler waits for ever; a function that waits until it does."""
    note = machine.root / "compiler"
    machine.set_compiler(f"echo $$ > {note}; exec sleep 1000")
    yield lambda: waiting(machine, note)
    if note.exists():
        os.kill(int(note.read_text()), signal.SIGKILL)


def test_a_process_that_is_killed_blocks_nobody(machine: Machine, stuck: Callable[[], int]) -> None:
    first = machine.start()
    stuck()
    assert len(machine.litter()) == 2  # its lock and its folder
    first.kill()
    machine.set_compiler()
    assert machine.run() == fast()
    assert machine.litter() == []


def test_a_process_that_is_stopped_blocks_nobody_for_long(machine: Machine, stuck: Callable[[], int]) -> None:
    first = machine.start()
    stuck()
    first.kill(signal.SIGSTOP)
    machine.set_compiler()

    def step() -> Step:
        compiler.SECONDS_OF_PROBE = 1
        return first_step()

    assert machine.run(step) == fast()
    first.kill()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EBADF])
def test_a_filesystem_without_locks(number: int, machine: Machine) -> None:
    def step() -> Step:
        fcntl.flock = refuse(number)
        return first_step()

    assert machine.run(step) == fast()
    assert len(machine.kernels) == 2
    assert machine.litter() == []


def test_an_interrupted_compilation_changes_nothing(machine: Machine, stuck: Callable[[], int]) -> None:
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float) -> None:
        subprocess.Popen.wait = wait  # type: ignore[method-assign]
        stuck()
        signal.raise_signal(signal.SIGINT)

    def attempt() -> tuple[int, list[float], float]:
        compiler._found[compiler._key(compiler.PROBE)] = print  # it works, as far as one knows
        p = torch.nn.Parameter(torch.ones(9))
        p.grad = torch.ones(9)
        optimizer = AdamW([p])
        subprocess.Popen.wait = interrupted  # type: ignore
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
        slots, weights = len(optimizer.state), p.tolist()
        machine.set_compiler()
        optimizer.step()
        return slots, weights, p[0].item()

    assert machine.run(attempt) == (0, [1.0] * 9, pytest.approx(WHOLE, abs=1e-7))
    assert not is_running(stuck())
    assert machine.litter() == []
    (machine.root / "compiler").unlink()


def test_a_child_of_a_fork_has_threads_of_its_own(warm: Machine) -> None:
    """The threads that run tiles stay with the parent, which has used them."""

    def step() -> float:
        torch.set_num_threads(1)  # the threads of torch itself do not survive a fork
        p = torch.nn.Parameter(torch.ones(1 << 19))
        p.grad = torch.ones_like(p)
        optimizer = AdamW([p], engine="compiled", lr=0.0)
        optimizer.step()
        torch.set_num_threads(2)
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
        return round(p[-1].item(), 2)

    assert warm.run(lambda: [step(), warm.run(step)]) == [0.5, 0.5]


# ------------------------------------------------------------------ names, and what is cleared away


def test_a_kernel_is_named_after_all_that_its_code_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [compiler._key(compiler.Source("a")), compiler._key(compiler.Source("b"))]
    monkeypatch.setattr(compiler, "FLAGS", (*compiler.FLAGS, "-g"))
    keys.append(compiler._key(compiler.Source("a")))
    read = Path.read_text
    for line in (
        "model name\t: new",
        "flags\t: avx9",
        "Features\t: sve9",
        "CPU part\t: 9",
        "cpu\t\t: POWER9",
        "isa\t: v",
    ):
        monkeypatch.setattr(Path, "read_text", lambda path, line=line, **given: read(path, **given) + line + "\n")
        monkeypatch.setattr(compiler, "_processor", functools.cache(compiler._processor.__wrapped__))
        keys.append(compiler._key(compiler.Source("a")))
    assert len(set(keys)) == len(keys)


def test_old_remains_are_cleared_away_and_nothing_else(machine: Machine) -> None:
    machine.run()
    old, young = {"mine.so", "mine.lock", "lightning_optim.a.b.partial"}, {"new.so", "new.lock", "note.txt"}
    theirs = {"x.so", "x.lock", "x.partial"}
    for name in (*old, *young):
        Path(machine.cache, name).touch()
    for name in (*theirs, "lightning_optim.x.y.partial"):
        Path(machine.temporary, name).touch()
    now = time.time()

    def step() -> Step:
        stat, forget = os.stat, {*old, *theirs, "lightning_optim.x.y.partial"}

        def aged(path: Any, **given: Any) -> Any:
            """A year ago, for which no clock can be set: a file tells when it was made."""
            found = stat(path, **given)
            times = [now - 365 * 24 * 3600] * 3 if path in forget else [found.st_atime, found.st_mtime, found.st_ctime]
            return os.stat_result(
                (*found[:7], *times), {"st_atime": times[0], "st_mtime": times[1], "st_ctime": times[2]}
            )

        os.stat = aged
        return first_step()

    for file in machine.kernels:
        if len(file.stem) == 32:
            file.unlink()
    machine.set_compiler('case "$(pwd -P)" in */lightning_optim/*) exit 1;; esac')
    assert machine.run(step) == fast()
    assert {file.name for file in machine.cache.iterdir()} == young
    assert {file.name for file in machine.temporary.iterdir()} == theirs


def test_half_a_library_is_no_library() -> None:
    """However much of it is there: touching what is not there would end the process."""

    def attempt(whole: bytes, size: int) -> bool:
        try:
            dynamic_library.function_of(whole[:size])
        except EngineError:
            return False
        return True

    with tempfile.TemporaryDirectory() as folder, folders._opened(folder) as opened:
        whole = compiler._output(compiler.PROBE, opened)
    assert attempt(whole, len(whole))
    found = {size: attempt(whole, size) for size in range(0, len(whole), 97)}
    assert not any(found[size] for size in found if size < 4000)
