"""A step that is captured and replayed goes on like steps that are taken.

A CUDA graph repeats what reached the device, and nothing of what the host did. `Tape` does the same on a CPU: it keeps
the calls of torch and the launches of a step, refuses any look at a value, and repeats them.
"""

from __future__ import annotations

import gc
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_optim import SGDW, AdamW
from lightning_optim.core import batches as batches_module
from lightning_optim.core import runner as runner_module
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.engines import captures
from lightning_optim.engines import launch as launch_module
from lightning_optim.engines import triton as engine
from lightning_optim.errors import OptionError
from lightning_optim.stages import Average
from tests.harness.engines import QUANTIZED, differences
from tests.harness.problems import NAMES, build, loss_of, make_params

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("torch_functions")
interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="the interpreter is for machines without GPU"
)

REFUSED = ("muon", "soap")
SHAPES = ((64, 70), (7,), (0,))


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """What a step did, to be repeated."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Any] = []
        self.launching = False
        self.launch = engine.run_kernel
        monkeypatch.setattr(engine, "run_kernel", self._launched)
        for word in ("item", "tolist", "numpy", "__float__", "__int__", "__bool__", "__index__"):
            monkeypatch.setattr(Tensor, word, self._refused(word, getattr(Tensor, word)))
        for word in ("tensor", "as_tensor"):  # which copies from memory that is not pinned
            monkeypatch.setattr(torch, word, self._refused(word, getattr(torch, word)))
        self.recording = False

    def _refused(self, word: str, usual: Any) -> Any:
        def look(*args: Any, **options: Any) -> Any:
            assert self.launching or not self.recording, f"the host looks at a value or hands one over, by {word}"
            return usual(*args, **options)

        return look

    def _launched(self, function: Any, count: int, *args: Any, **options: Any) -> None:
        if self.recording:
            self.calls.append(lambda: self.launch(function, count, *args, **options))
        self.launching = True
        self.launch(function, count, *args, **options)
        self.launching = False

    @contextmanager
    def record(self) -> Iterator[None]:
        self.recording = True
        with self:
            yield
        self.recording = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not self.launching:
            self.calls.append(lambda: _repeat(func, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        for call in self.calls:
            call()


def _repeat(func: Any, args: Any, kwargs: Any, result: Any) -> None:
    """Call again, and put what comes where the first result was."""
    again = func(*args, **kwargs)
    for old, new in zip(_tensors(result), _tensors(again), strict=True):
        if old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _tensors(result: Any) -> list[Tensor]:
    found = list(result) if isinstance(result, list | tuple) else [result]
    return [x for x in found if isinstance(x, Tensor)]


def give(params: list[Tensor], step: int) -> None:
    """Gradients where those of the step before were."""
    generator = torch.Generator().manual_seed(step)
    for p in params:
        grad = torch.randn(p.shape, generator=generator) * (1 + step % 3)
        p.grad = grad if p.grad is None else p.grad.copy_(grad)


def rate(step: int) -> float:
    return 0.01 * (1 + step % 4)


def tell(optimizer: Optimizer, loss: Tensor, step: int) -> None:
    """The loss of the step, in the memory where the last one was."""
    loss.fill_(loss_of(step)[0])
    if optimizer.inputs:
        optimizer.set_loss(loss)


def expected(name: str, steps: int, **options: Any) -> list[Any]:
    params = make_params(SHAPES, torch.float32)
    optimizer = build(name, params, engine="triton", weight_decay=0.1, **options)
    loss = torch.zeros(())
    for step in range(steps):
        give(params, step)
        tell(optimizer, loss, step)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return [optimizer, params]


def replayed(name: str, steps: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> list[Any]:
    """Two steps as usual, one that is recorded, and the rest from the record."""
    params = make_params(SHAPES, torch.float32)
    optimizer = build(name, params, engine="triton", weight_decay=0.1, capturable=True, **options)
    lr = optimizer.param_groups[0]["lr"] = torch.tensor(0.0, dtype=torch.float64)
    tape, loss = Tape(monkeypatch), torch.zeros(())
    for step in range(steps):
        give(params, step)
        tell(optimizer, loss, step)
        lr.fill_(rate(step))
        if step == 2:
            with tape.record():
                optimizer.step()
        elif step > 2:
            tape.replay()
        else:
            optimizer.step()
    return [optimizer, params]


@interpreted
@pytest.mark.parametrize("name", [name for name in NAMES if name not in REFUSED])
def test_a_replayed_step_goes_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, through the sixth step, where RAdam begins to rectify, and with another learning rate each time."""
    assert differences(*expected(name, 9), *replayed(name, 9, monkeypatch)) == []


@interpreted
def test_a_single_parameter_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its counter shares no memory. What predicts looks at it too."""
    monkeypatch.setitem(globals(), "SHAPES", ((9, 5),))
    assert differences(*expected("koala_m", 5), *replayed("koala_m", 5, monkeypatch)) == []


@interpreted
@pytest.mark.parametrize("name", [name for name in QUANTIZED if name not in REFUSED][::4])
@pytest.mark.parametrize("state_format", ["log", "dynamic"])
def test_random_bits_are_new_in_each_step(name: str, state_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"state_bits": 8, "state_format": state_format}
    assert differences(*expected(name, 5, **options), *replayed(name, 5, monkeypatch, **options)) == []


@interpreted
def test_counters_live_on_the_device_and_are_saved() -> None:
    optimizer, params = expected("adamw", 2, capturable=True)
    steps = [optimizer.state[p]["step"] for p in params]
    assert all(step.device == p.device and step == 2 for step, p in zip(steps, params, strict=True))
    twin = build("adamw", make_params(SHAPES, torch.float32), capturable=True)
    twin.load_state_dict(optimizer.state_dict())
    assert all(state["step"] == 2 for state in twin.state.values())


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A context in which the package takes what it does for captured."""

    @contextmanager
    def capture() -> Iterator[None]:
        with monkeypatch.context() as patch:
            for module in (batches_module, launch_module, runner_module):
                patch.setattr(module, "capturing", lambda: True)
            yield

    return capture


def optimized(steps: int = 2, **options: Any) -> tuple[Optimizer, list[Tensor]]:
    params = make_params(SHAPES, torch.float32)
    optimizer = build("adamw", params, engine="triton", capturable=True, **options)
    for step in range(steps):
        give(params, step)
        optimizer.step()
    return optimizer, params


def copied_tables(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The tables that its next steps copy from the host."""
    found: list[Tensor] = []

    def copied_to(values: Tensor, device: torch.device) -> Tensor:
        found.append(values)
        return values.to(device, copy=True)

    monkeypatch.setattr(launch_module, "copied_to", copied_to)
    return found


def kept_launches(optimizer: Optimizer) -> list[dict[str, Any]]:
    return [one for one in optimizer._runner.kept if isinstance(one, dict) and "tiles" in one]


@interpreted
def test_moved_gradients_are_one_copy_of_a_table_that_stays(captured: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay copies it again, so no later step may write to it or let it go."""
    optimizer, params = optimized()
    tables = copied_tables(optimizer, monkeypatch)
    for p in params:
        p.grad = torch.ones_like(p)
    expected = [p.grad.data_ptr() for p in params if p.grad is not None and p.numel()]
    with captured():
        optimizer.step()
    (table,) = tables
    before = table.clone()
    assert {*expected} <= {*table.flatten().tolist()}
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert torch.equal(table, before)
    assert all(table.data_ptr() != later.data_ptr() for later in tables[1:])
    assert any(one["in_graph"] is table for one in kept_launches(optimizer))


@interpreted
def test_what_a_graph_reads_outlives_what_steps_read_later(captured: Any) -> None:
    """A parameter joins, and another moves, after the capture; the graph still reads the tables of its time."""
    optimizer, params = optimized()
    with captured():
        optimizer.step()
    tables = [weakref.ref(one[name]) for one in kept_launches(optimizer) for name in ("table", "tiles")]
    params[0].data = params[0].data.clone()
    optimizer.step()
    params[1].grad = None
    optimizer.step()
    gc.collect()
    assert tables
    assert all(one() is not None for one in tables)


@interpreted
def test_a_capture_makes_no_tables(captured: Any) -> None:
    def joins(optimizer: Optimizer, params: list[Tensor]) -> None:
        params[1].grad = None

    def turns(optimizer: Optimizer, params: list[Tensor]) -> None:
        assert params[0].grad is not None
        params[0].grad = params[0].grad.t().contiguous().t()

    def counts(optimizer: Optimizer, params: list[Tensor]) -> None:
        optimizer.state[params[0]]["step"].add_(1)

    def decays(optimizer: Optimizer, params: list[Tensor]) -> None:
        optimizer.param_groups[0].update(weight_decay=0.0, cautious=True)

    for change in (joins, turns, counts, decays):
        optimizer, params = optimized()
        change(optimizer, params)
        with captured(), pytest.raises(RuntimeError, match="tables that its kernels read would have to be made"):
            optimizer.step()
        assert float(optimizer.state[params[1]]["step"]) == 2
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        with captured():
            optimizer.step()


@interpreted
def test_tables_that_two_streams_read_are_not_used_anew_before_both_have_passed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Torch's allocator is told of every stream but the first."""
    told: list[tuple[Any, int]] = []
    monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: told.append((x, stream.cuda_stream)))
    optimizer, _ = optimized()
    (batch,) = optimizer._runner.cached["update"].batches
    (launch,) = (one for value in batch.cache.values() if isinstance(value, tuple) for one in value[1])
    tables = launch.table, launch.tiles = launch.table.to("meta"), launch.tiles.to("meta")
    launch.cached_table = launch.table
    for stream in (7, 7, 8, 7):
        captures.follow_stream([batch], SimpleNamespace(cuda_stream=stream))
    assert {stream for _, stream in told} == {7, 8}
    assert [stream for x, stream in told if x is tables[1]] == [8, 7]
    assert [stream for x, stream in told if x is tables[0]][-1] == 7


@interpreted
def test_state_must_exist_before_a_capture(captured: Any) -> None:
    optimizer, params = optimized(steps=0)
    give(params, 0)
    with captured(), pytest.raises(RuntimeError, match="Take one step as it will be captured, and capture the next"):
        optimizer.step()
    assert not any("exp_avg" in optimizer.state[p] for p in params if p in optimizer.state)


@pytest.mark.parametrize("name", REFUSED)
def test_what_needs_the_host_is_refused(name: str) -> None:
    with pytest.raises(OptionError, match="capturable=True cannot be served, for "):
        OPTIMIZERS[name](make_params(), capturable=True)


def test_stages_are_counted_on_the_host() -> None:
    optimizer = SGDW(make_params(), capturable=True)
    with pytest.raises(OptionError, match="do not go together"):
        optimizer.append(Average())
    assert not optimizer.stages


def test_a_cpu_has_no_graphs() -> None:
    params = make_params(((3,),), torch.float32)
    optimizer = AdamW(params, capturable=True, engine="blocked")
    params[0].grad = torch.ones(3)
    with pytest.raises(OptionError, match="capturable=True needs the engine triton, and blocked runs here"):
        optimizer.step()


def test_a_graph_is_of_one_device() -> None:
    params = [*make_params(((3,),), torch.float32), torch.nn.Parameter(torch.ones(3, device="meta"))]
    optimizer = AdamW(params, capturable=True)
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(OptionError, match="capturable=True serves one device, and the parameters are on cpu and meta"):
        optimizer.step()
    optimizer = AdamW(params, engine="triton")
    with pytest.raises(OptionError, match="the parameters are on cpu and meta, which an optimizer for each can serve"):
        optimizer.step()


@interpreted
def test_without_triton_a_graph_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    engine._missing.cache_clear()
    params = make_params(((3,),), torch.float32)
    params[0].grad = torch.ones(3)
    with pytest.raises(OptionError, match=r"runs here: triton is not installed \(pip install 'lightning-optim\[triton"):
        AdamW(params, capturable=True).step()
    engine._missing.cache_clear()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of the compiler, on `loss`
@pytest.mark.parametrize("whole", [True, False])
def test_a_compiled_training_step_calls_it(whole: bool) -> None:
    """Forward and backward are traced by the compiler, the step is not; nothing is compiled anew for it."""

    def train(optimizer: Optimizer, layer: Any, x: Tensor) -> Any:
        optimizer.zero_grad()
        loss = layer(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    losses: list[list[float]] = []
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    for compile_it in (False, True):
        torch.manual_seed(0)
        layer = torch.nn.Linear(5, 3)
        model = torch.compile(layer, backend="eager") if compile_it and not whole else layer
        optimizer = AdamW(layer.parameters(), lr=0.1)
        step = torch.compile(train, backend="eager") if compile_it and whole else train
        losses.append([float(step(optimizer, model, x).detach()) for _ in range(4)])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]
