"""Memory that is predicted and counted is, byte for byte, the memory that is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import OptimizerStrategy, OptionError, create_optimizer, list_optimizers
from lightning_optim.reports.memory import predicted_memory, state_memory
from tests.harness.memory import by_walk, ours
from tests.harness.modules import Make


def one_step(optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for i in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.1 + i)
        optimizer.step(lambda: 1.0)


def tensors() -> list[nn.Parameter]:
    """Small and large, of a length that fills no block, and without an element."""
    return [nn.Parameter(torch.ones(shape)) for shape in ((3, 4), (5,), (70, 71), (4096,), (0, 3))]


@pytest.mark.parametrize("bits", [32, 16, 8])
@pytest.mark.parametrize("spec", [*list_optimizers(), {"name": "sgd", "momentum": 0.9}], ids=str)
def test_it_counts_the_memory_that_is_there(spec: str | dict[str, Any], bits: int) -> None:
    try:
        optimizer: Any = OptimizerStrategy.parse(spec, state_bits=bits).create(tensors())
    except OptionError:
        pytest.skip("nothing to keep in fewer bits")
    predicted = sum(entry.bytes for entry in predicted_memory(optimizer))
    one_step(optimizer)
    found = state_memory(optimizer)
    assert sum(entry.bytes for entry in found) == by_walk(optimizer) == predicted
    if bits == 8 and any(optimizer.slots_of(i, p) for i, p in optimizer.every_parameter()):  # SGD alone keeps none
        assert any(entry.dtype.startswith("8 bits") for entry in found)


@pytest.mark.parametrize(
    "name", ["Adam", "AdamW", "Adafactor", "SGD", "RMSprop", "NAdam", "RAdam", "Rprop", "ASGD", "Adagrad"]
)
def test_it_counts_the_memory_of_torchs(name: str) -> None:
    optimizer = getattr(torch.optim, name)(tensors()[:4])
    one_step(optimizer)
    assert sum(entry.bytes for entry in state_memory(optimizer)) == by_walk(optimizer)


class Nested(torch.optim.SGD):
    """Keeps containers, a table that all parameters share, a part of a larger tensor and numbers of Python."""

    table = torch.zeros(256)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for p in self.param_groups[0]["params"]:
            if not self.state[p]:
                half = torch.zeros(2 * p.numel())[: p.numel()]
                self.state[p] = {"code": self.table, "step": 0, "parts": [half, {"more": torch.zeros(3)}]}


def test_counters_of_parameters_of_one_shape_count_each() -> None:
    params = [nn.Parameter(torch.zeros(2, 3, dtype=torch.float32, device="cpu")) for _ in range(3)]
    optimizer: Any = torch.optim.Adafactor(params)  # no step on the meta device: it asks for values
    predicted = predicted_memory(optimizer)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [(e.slot, e.bytes) for e in predicted] == [(e.slot, e.bytes) for e in state_memory(optimizer)]


def test_shared_and_nested_memory_counts_once() -> None:
    optimizer = Nested(tensors()[:4], lr=0.1)
    one_step(optimizer)
    sizes = [12, 5, 4970, 4096]
    expected = 256 * 4 + sum(2 * 4 * n + 3 * 4 for n in sizes)
    assert sum(entry.bytes for entry in state_memory(optimizer)) == by_walk(optimizer) == expected


@pytest.mark.parametrize("make", [ours("adan"), lambda params: torch.optim.AdamW(params)])
def test_a_frozen_parameter_of_an_optimizer_gets_no_state(make: Make) -> None:
    params = tensors()[:4]
    params[2].requires_grad_(False)
    optimizer = make(params)
    predicted = predicted_memory(optimizer)
    for p in (params[0], params[1], params[3]):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert predicted == state_memory(optimizer)
    assert {entry.name for entry in predicted} == {"0.0", "0.1", "0.3"}


def transformer(width: int, layers: int, words: int) -> nn.Module:
    """Embeddings and blocks, as in a small language model."""
    block = nn.TransformerEncoderLayer(width, 4, 4 * width, batch_first=True)
    blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
    return nn.ModuleDict({"embedding": nn.Embedding(words, width), "blocks": blocks, "norm": nn.LayerNorm(width)})


LIMITS = [("adamw", 32, 8.0), ("adamw", 8, 2.1), ("adan", 32, 16.0), ("adan", 8, 7.2)]  # bytes for each parameter


@pytest.mark.parametrize(
    ("width", "layers", "words", "at_least"),
    [(256, 10, 10_000, 10_000_000), pytest.param(768, 9, 50_000, 100_000_000, marks=pytest.mark.full)],
)
def test_bytes_for_each_parameter_of_a_transformer(width: int, layers: int, words: int, at_least: int) -> None:
    """With the embedding in 8 bits too. The model is made once and each optimizer let go before the next."""
    model = transformer(width, layers, words)
    count = sum(p.numel() for p in model.parameters())
    assert at_least <= count < 1.1 * at_least
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    for name, bits, limit in LIMITS:
        spec = {"name": name, "lr": 1e-4, "state_bits": bits, "full_precision": ["bias", "norm"]}
        optimizer = create_optimizer(spec, model)
        predicted = sum(entry.bytes for entry in predicted_memory(optimizer))
        optimizer.step()
        size = sum(entry.bytes for entry in state_memory(optimizer))
        assert size == by_walk(optimizer) == predicted
        per_parameter = (size - 4 * len(optimizer.state)) / count  # without the step counters
        assert per_parameter <= limit if bits == 8 else per_parameter == limit
        del optimizer
