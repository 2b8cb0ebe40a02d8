"""State lies in memory as its parameter does, so no engine copies; files and noise know nothing of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim.core.foreign_stages import attach
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.global_index import exchange_of, global_indices
from lightning_optim.distributed.plain import memory_order
from lightning_optim.engines.blocked.blocks import Pack
from lightning_optim.engines.launch import Launch
from lightning_optim.errors import OptionError
from lightning_optim.stages.noise import Noise
from lightning_optim.storage import Quantized
from tests.harness import problems
from tests.harness.engines import QUANTIZED, differences, quantizes, serves, serving
from tests.harness.problems import NAMES, gradients, make_params

SHAPE = (16, 32, 3, 3)  # enough elements for codes
pytestmark = pytest.mark.usefixtures("quiet_interpreter")

ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "first axes exchanged": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "reversed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "contiguous": lambda x: x.contiguous(),
}
every_order = pytest.mark.parametrize("order", list(ORDERS))


def start(name: str, lay: Callable[[Tensor], Tensor], **options: Any) -> tuple[Optimizer, list[Tensor]]:
    (p,) = make_params((SHAPE,), torch.float32)
    params: list[Tensor] = [nn.Parameter(lay(p.detach()))]
    return problems.build(name, params, **options), params


def train(optimizer: Optimizer, params: Sequence[Tensor], first: int, last: int) -> None:
    """Steps with gradients that lie as the parameters do, as autograd makes them."""
    for k, grads in enumerate(gradients(last, (SHAPE,), torch.float32)):
        if k >= first:
            given = [torch.empty_like(p).copy_(grad) for p, grad in zip(params, grads, strict=True)]
            for p, grad in zip(params, given, strict=True):
                p.grad = grad
            if optimizer.inputs:
                optimizer.set_loss(*problems.loss_of(k))
            optimizer.step()


@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
def test_state_lies_as_the_parameter_does_and_nothing_is_copied(name: str, engine: str) -> None:
    for lay in ORDERS.values():
        for bits in (32, 16, 8) if quantizes(name) else (32,):
            optimizer, params = start(name, lay, engine=engine, state_bits=bits)
            train(optimizer, params, 0, 2)
            (p,) = params
            slots = {key: optimizer.slot(key, 0, p) for key in optimizer.state[p].keys() & optimizer.all_slots().keys()}
            elementwise = {key for key, slot in slots.items() if slot.per == "element" and slot.without is None}
            for key, value in optimizer.state[p].items():
                if isinstance(value, Quantized):
                    assert value.order == memory_order(p)
                elif key in elementwise:
                    assert value.stride() == p.stride(), key
            kept = [x for of in optimizer._runner.cached.values() for batch in of.batches for x in batch.cache.values()]
            launches = [x for row in kept if isinstance(row, tuple) for x in row[1] if isinstance(x, Launch)]
            packs = [x for row in kept if isinstance(row, list) for x in row if isinstance(x, Pack)]
            assert launches or packs or engine == "reference"
            assert not any(launch.copies for launch in launches)
            for pack in packs:
                operands = [pack.params[0].operand(key) for key in ("p", *elementwise)]
                assert all(isinstance(x, Quantized) or not x.dim() or x.is_contiguous() for x in operands)


@every_order
@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.usefixtures("exact_roots")
def test_engines_find_the_codes_of_the_reference(name: str, order: str) -> None:
    optimizer, params = start(name, ORDERS[order], engine="reference", state_bits=8)
    train(optimizer, params, 0, 3)
    for engine in ("blocked", "compiled"):
        if serves(engine, name):
            other, others = start(name, ORDERS[order], engine=engine, state_bits=8)
            train(other, others, 0, 3)
            if not any(program.reductions for program in other.first_programs()):  # powers may differ in the last place
                found = differences(optimizer, params, other, others)
                assert not [word for word in found if not word.startswith("p of")]
                torch.testing.assert_close(params[0], others[0], rtol=1e-6, atol=1e-7)


@every_order
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("name", QUANTIZED)
def test_a_resume_continues_bit_for_bit(name: str, bits: int, order: str) -> None:
    optimizer, params = start(name, ORDERS[order], state_bits=bits)
    train(optimizer, params, 0, 3)
    other, others = start(name, ORDERS[order], state_bits=bits)
    others[0].data.copy_(params[0].detach())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, params, 3, 6)
    train(other, others, 3, 6)
    assert differences(optimizer, params, other, others) == []


@every_order
@pytest.mark.parametrize("name", QUANTIZED)
def test_values_of_codes_are_in_the_shape_of_the_parameter(name: str, order: str) -> None:
    """A file in 8 bits is near the file in 32 bits, element by element."""
    files = []
    for bits in (32, 8):
        optimizer, params = start(name, ORDERS[order], state_bits=bits)
        train(optimizer, params, 0, 1)
        files.append(optimizer.state_dict()["state"][0])
    for key, value in files[0].items():
        assert files[1][key].shape == value.shape
        distance = (files[1][key] - value).double().norm() / value.double().norm().clamp_min(1e-12)
        assert distance < 0.1, key


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("name", "engine"), serving(["adamw", "lamb", "koala_v"]))
def test_a_model_that_changes_its_format_in_training_takes_its_state_along(name: str, engine: str, bits: int) -> None:
    bits = bits if quantizes(name) else 32
    optimizer, params = start(name, ORDERS["contiguous"], engine=engine, state_bits=bits)
    other, others = start(name, ORDERS["contiguous"], engine=engine, state_bits=bits)
    train(optimizer, params, 0, 2)
    train(other, others, 0, 2)
    for order in ("channels last", "reversed", "contiguous"):
        params[0].data = ORDERS[order](params[0].data)
        train(optimizer, params, 2, 4)
        train(other, others, 2, 4)
        assert all(x.stride() == params[0].stride() for x in optimizer.state[params[0]].values() if is_tensor(x))
    tolerance = 1e-5 if bits == 32 else 0.02  # other blocks round otherwise
    torch.testing.assert_close(params[0].contiguous(), others[0].contiguous(), rtol=tolerance, atol=tolerance)


def is_tensor(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() > 0


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("kind", ["isotropic", "second_moment", "moments"])
@pytest.mark.parametrize(("name", "engine"), serving(["adamw"]))
def test_noise_goes_by_the_index_in_the_tensor(name: str, engine: str, kind: Any, bits: int) -> None:
    """The same element gets the same noise, however it lies in memory."""
    for order in ("channels last", "first axes exchanged", "reversed"):
        runs = []
        for lay in (ORDERS["contiguous"], ORDERS[order]):
            optimizer, params = start(name, lay, engine=engine, state_bits=bits, lr=0.01)
            attach(Noise(global_indices([("w", params[0])], optimizer), kind, eta=0.1), optimizer)
            if order == "reversed" and lay is ORDERS[order] and engine != "reference":
                with pytest.raises(OptionError, match=r"shape \(16, 32, 3, 3\) has its axes in an order"):
                    train(optimizer, params, 0, 2)
                break
            train(optimizer, params, 0, 2)
            runs.append(params[0].detach().contiguous())
        else:
            near: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7} if bits == 32 else {"rtol": 0.05, "atol": 0.01}
            torch.testing.assert_close(*runs, **near)


def test_auto_serves_noise_in_any_order() -> None:
    runs = []
    for engine in ("auto", "reference"):
        optimizer, params = start("adamw", ORDERS["reversed"], engine=engine)
        attach(Noise(global_indices([("w", params[0])], optimizer)), optimizer)
        train(optimizer, params, 0, 2)
        runs.append(params[0])
    assert torch.equal(*runs)


@pytest.mark.parametrize("shape", [(4, 3, 2, 5), (4, 1, 2, 5), (2, 3, 4), (6, 4), (3,), (2, 3, 4, 2, 3)])
def test_an_exchange_is_the_order(shape: tuple[int, ...]) -> None:
    """Against the indices themselves, for every rotation of neighbouring axes."""
    from lightning_optim.distributed.global_index import GlobalIndex

    indices = torch.arange(torch.Size(shape).numel()).view(shape)
    axes, found = list(range(len(shape))), 0
    for low in axes:
        for high in range(low + 2, len(shape) + 1):
            for middle in range(low + 1, high):
                order = [*axes[:low], *axes[middle:high], *axes[low:middle], *axes[high:]]
                exchange = exchange_of(order, shape)
                assert exchange is not None
                index = GlobalIndex(0, exchange=exchange)
                expected = indices.permute(order).reshape(-1)
                assert torch.equal(index.of(0, len(expected), torch.device("cpu")), expected)
                found += 1
    assert found or len(shape) < 2
