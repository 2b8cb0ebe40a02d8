"""Nothing that the package makes follows torch's default dtype or default device.

Lightning sets the default dtype inside `training_step` under `bf16-true`, and a user may set either at any time. A step
counter in bfloat16 would stop at 256. So each tensor is made with both named, and a run under other defaults is the run
without them, bit for bit.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import pickle
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils._device import _device_constructors

from lightning_optim.core.foreign_stages import attach
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.optimizers import AdamW
from lightning_optim.stages.average import Average
from lightning_optim.stages.lookahead import Lookahead
from lightning_optim.stages.noise import Noise
from lightning_optim.storage import Quantized
from lightning_optim.training.trial_step import norm_of
from tests.harness import problems
from tests.harness.engines import quantizes, serving
from tests.harness.problems import NAMES, apply, gradients, make_params

ROOT = Path(__file__).parents[2]
SHAPES = ((), (5,), (3, 4), (0,), (70, 61))  # the last one has codes
DEFAULTS = [torch.bfloat16, torch.float64, "meta"]
pytestmark = pytest.mark.usefixtures("quiet_interpreter")
every_default = pytest.mark.parametrize("default", DEFAULTS, ids=str)


@contextlib.contextmanager
def defaults(dtype_or_device: torch.dtype | str) -> Iterator[None]:
    """Inside, torch makes tensors of another dtype or on another device, and no table is left from before."""
    for module in [module for name, module in sys.modules.items() if name.startswith("lightning_optim.")]:
        for thing in list(vars(module).values()):
            if hasattr(thing, "cache_clear") and module.__name__.split(".")[1] in ("storage", "distributed"):
                thing.cache_clear()
    before = torch.get_default_dtype()
    try:
        if isinstance(dtype_or_device, str):
            torch.set_default_device(dtype_or_device)
        else:
            torch.set_default_dtype(dtype_or_device)
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(before)


def trajectory(optimizer: Any, params: Sequence[Tensor], steps: Sequence[Sequence[Tensor]]) -> None:
    for step, grads in enumerate(steps):
        apply(optimizer, params, grads, step)


def everything(optimizer: Any, params: Sequence[Tensor]) -> list[Tensor]:
    """All that a run has left: parameters, slots, codes, scales, counters."""
    found = list(params)
    for p in params:
        for value in optimizer.state[p].values():
            found += [value.codes, value.scales] if isinstance(value, Quantized) else [value]
    if isinstance(optimizer, Optimizer):
        found += optimizer.shared_slots().values()
    return found


def equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_default
@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
def test_a_run_does_not_follow_the_defaults(name: str, engine: str, default: Any) -> None:
    """Construction, steps, a checkpoint and its load."""
    for state_bits in (32, 8) if quantizes(name) else (32,):
        options: dict[str, Any] = {"engine": engine, "state_bits": state_bits}
        steps = list(gradients(6, SHAPES, torch.float32))
        params, others = make_params(SHAPES, torch.float32), make_params(SHAPES, torch.float32)
        resumed = [torch.nn.Parameter(p.detach().clone()) for p in others]
        optimizer = problems.build(name, params, **options)
        trajectory(optimizer, params, steps)
        with defaults(default):
            other = problems.build(name, others, **options)
            trajectory(other, others, steps[:3])
            for p, q in zip(resumed, others, strict=True):
                p.data.copy_(q.detach())
            last = problems.build(name, resumed, **options)
            last.load_state_dict(copy.deepcopy(other.state_dict()))
            for step in (3, 4, 5):
                apply(last, resumed, steps[step], step)
            saved = last.state_dict()
        assert equal(everything(last, resumed), everything(optimizer, params))
        assert str(saved) == str(optimizer.state_dict())


@every_default
@pytest.mark.parametrize("of_torch", [False, True])
def test_stages_do_not_follow_the_defaults(of_torch: bool, default: Any) -> None:
    """What callbacks add to a step, on our optimizers and on those of torch."""

    def run(params: list[Tensor]) -> Any:
        make: Any = torch.optim.AdamW if of_torch else AdamW
        optimizer = make(params, lr=0.01)
        indices = global_indices([(str(i), p) for i, p in enumerate(params)], optimizer)
        for stage in (Noise(indices, "moments"), Lookahead(k=2), Average(window=2)):
            attach(stage, optimizer)
        for grads in steps:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
        return optimizer

    steps = list(gradients(5, SHAPES, torch.float32))
    params, others = make_params(SHAPES, torch.float32), make_params(SHAPES, torch.float32)
    optimizer = run(params)
    with defaults(default):
        other = run(others)
    found, expected = everything(other, others), everything(optimizer, params)
    if of_torch:  # its own counter does follow them
        found, expected = ([x.float() for x in values if x.dim()] for values in (found, expected))
    assert equal(found, expected)


@every_default
def test_the_trial_steps_of_grad_init_do_not_follow_the_defaults(default: Any) -> None:
    seen = []

    def first_step(theta: Any, grads: Any, loss: Tensor) -> Any:
        seen.append(grads["w"])
        assert loss.dtype == torch.float32
        assert loss.device.type == "cpu"
        return {name: p - grads[name] for name, p in theta.items()}

    params = {"w": torch.zeros(300)}
    with defaults(default):
        assert norm_of(first_step, params, "SGD") == 2
    assert torch.equal(seen[0], (torch.arange(300) % 4 + 1).float())


def test_manual_optimization_in_bf16_true_counts_on(tmp_path: Path) -> None:
    """Lightning calls `training_step`, and with it the step, under the default dtype bfloat16."""

    class Net(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.layer = torch.nn.Linear(2, 1)

        def training_step(self, batch: Tensor, _: int) -> None:
            optimizer: Any = self.optimizers()
            for _ in range(20):
                optimizer.zero_grad()
                self.manual_backward(self.layer(batch).square().mean())
                optimizer.step()

        def configure_optimizers(self) -> Optimizer:
            return AdamW(self.parameters(), lr=1e-3)

    net = Net()
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    trainer = Trainer(
        accelerator="cpu", precision="bf16-true", max_epochs=1, default_root_dir=tmp_path, **quiet,
        enable_model_summary=False,
    )  # fmt: skip
    batches: Any = torch.ones(14, 2)
    trainer.fit(net, torch.utils.data.DataLoader(batches))
    (optimizer,) = trainer.optimizers
    assert [float(state["step"]) for state in optimizer.state.values()] == [280.0, 280.0]
    assert {state["step"].dtype for state in optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_counter_that_was_saved_in_few_bits_counts_on(dtype: torch.dtype) -> None:
    """It may have stopped, so a load says where; from there on it counts."""
    params = make_params(((3, 4),), torch.float32)
    optimizer = problems.build("adamw", params)
    trajectory(optimizer, params, list(gradients(1, ((3, 4),), torch.float32)))
    last = 256.0 if dtype == torch.bfloat16 else 2048.0
    for value, stopped in ((7.0, False), (last, True)):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"] = torch.tensor(value, dtype=dtype)
        other = problems.build("adamw", params)
        with (
            pytest.warns(UserWarning, match=f"counter .* stops at {last:.0f}") if stopped else contextlib.nullcontext()
        ):
            other.load_state_dict(saved)
        trajectory(other, params, list(gradients(2, ((3, 4),), torch.float32)))
        assert other.state[params[0]]["step"].dtype == torch.float32
        assert float(other.state[params[0]]["step"]) == value + 2


def test_a_pickled_optimizer_with_a_counter_in_few_bits_counts_on() -> None:
    params = make_params(((3, 4),), torch.float32)
    optimizer = problems.build("adamw", params)
    trajectory(optimizer, params, list(gradients(1, ((3, 4),), torch.float32)))
    optimizer.state[params[0]]["step"] = torch.tensor(256.0, dtype=torch.bfloat16)
    other = pickle.loads(pickle.dumps(optimizer))
    (p,) = other.param_groups[0]["params"]
    for _ in range(2):
        p.grad = torch.ones_like(p)
        other.step()
    assert float(other.state[p]["step"]) == 258


def test_each_tensor_is_made_with_its_dtype_and_device_named() -> None:
    """In the source: calls of torch's factories, which are the functions that follow a default device."""
    factories = {function.__name__ for function in _device_constructors()}
    found, calls = [], 0
    for folder in ("lightning_optim", "callbacks"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                    continue
                if ast.unparse(node.func.value) != "torch" or node.func.attr not in factories:
                    continue
                calls += 1
                if missing := {"dtype", "device"} - {keyword.arg for keyword in node.keywords}:
                    found.append(f"{file.relative_to(ROOT)}:{node.lineno} lacks {', '.join(sorted(missing))}")
    assert calls > 30
    assert not found
