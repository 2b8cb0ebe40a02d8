"""What is estimated before a training is, byte for byte, what each rank of a real one then holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lightning_optim import OptimizerStrategy, OptionError, estimate_memory, list_optimizers
from tests.harness.data import batches
from tests.harness.memory import by_walk
from tests.harness.modules import Plain
from tests.harness.nets import WIDTH, Odd, Wide
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer

RANKS = 3
OPTIONS = {"lr": 1e-4, "engine": "reference"}  # the slowest engine, but the one that compiles nothing
GROUPS = [{"params": "net.back.*", "state_bits": 32}, {"params": "net.inward.*", "lr": 1e-3}]
Sizes = dict[str, int]


class Words(Odd):
    """Beside weights that are tied, frozen and of uneven shards: an embedding, whose state stays in 32 bits."""

    def __init__(self) -> None:
        super().__init__(torch.float32)
        del self.unused  # what gets no gradient in a run cannot be known before it
        self.words = nn.Embedding(401, WIDTH)
        self.inward = Wide(4, WIDTH)
        self.out = Wide(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(torch.tanh(self.inward(x))) + self.words(x[:, 0].long().abs() % 401)
        x = x + self.back(torch.relu(self.large(x))) + self.frozen(x)
        return self.out(torch.tanh(self.tied(torch.relu(self.square(x)))))  # type: ignore[no-any-return]


class Model(Plain):
    unit = Wide

    def __init__(self) -> None:
        super().__init__(Words)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.0)


def specs() -> list[dict[str, Any]]:
    """Every optimizer, at 32 and 8 bits, and one with groups."""
    found: list[dict[str, Any]] = [{"name": name, **OPTIONS} for name in list_optimizers()]
    for spec in found:
        if spec["name"] in ("muon", "soap"):
            spec["owners"] = False  # under DDP, where asking costs a second
    return [*found, {"name": "adamw", "groups": GROUPS, **OPTIONS}]


class Every(Callback):
    """After a backward pass of a training, lets every optimizer take a step and counts what is there."""

    def __init__(self) -> None:
        self.found: dict[tuple[int, int], Sizes | str] = {}

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        held = {"parameter": pl_module.parameters(), "gradient": [p.grad for p in pl_module.parameters()]}
        model: Sizes = {kind: sum(map(size, tensors)) for kind, tensors in held.items()}
        for i, spec in enumerate(specs()):
            for bits in (32, 8):
                state = state_after_a_step(pl_module, spec, bits)
                self.found[i, bits] = state if isinstance(state, str) else {**model, "state": state}


def state_after_a_step(module: nn.Module, spec: dict[str, Any], bits: int) -> int | str:
    """Bytes of the state, or what was said instead of a step."""
    try:
        optimizer: Any = OptimizerStrategy.parse(spec, state_bits=bits).create(module)
        if optimizer.inputs:
            optimizer.set_loss(1.0)
        optimizer.compared = True  # what the first step asks other ranks takes half a second
        optimizer.step()
    except (OptionError, RuntimeError) as error:
        return str(error)
    return by_walk(optimizer)


def size(x: Tensor | None) -> int:
    """Bytes of the values of a tensor that are here."""
    if x is None:
        return 0
    local = x.to_local() if isinstance(x, DTensor) else x
    return int(local.numel() * local.element_size())


def train(kind: Kind, precision: Any, options: dict[str, Any]) -> dict[tuple[int, int], Sizes | str]:
    every = Every()
    strategy = strategy_of(kind, unit=Wide, **options)
    run = trainer(every, strategy=strategy, max_steps=1, max_epochs=1, precision=precision)
    run.fit(Model(), batches())
    return every.found


@pytest.mark.parametrize(
    ("kind", "precision", "options"),
    [
        ("ddp", "32-true", {}),
        ("fsdp1 full", "32-true", {}),
        ("fsdp2 full", "32-true", {}),
        pytest.param("fsdp1 full", "bf16-mixed", {"sharding_strategy": "SHARD_GRAD_OP"}, marks=pytest.mark.full),
        pytest.param("fsdp1 full", "bf16-true", {"sharding_strategy": "NO_SHARD"}, marks=pytest.mark.full),
        pytest.param("fsdp2 full", "bf16-true", {}, marks=pytest.mark.full),
    ],
)
def test_every_rank_holds_what_was_estimated(kind: Kind, precision: str, options: dict[str, Any]) -> None:
    ranks = run_ranks(train, kind, precision, options, world_size=RANKS)
    strategy: Any = {"ddp": "ddp", "fsdp2 full": "model_parallel"}.get(kind)
    strategy = strategy or FSDPStrategy(auto_wrap_policy={Wide}, **options)
    where = {"strategy": strategy, "devices": RANKS, "precision": precision}
    estimate = estimate_memory(Model, specs(), bits=[32, 8], **where)
    compared = refused = 0
    for i, spec in enumerate(specs()):
        found = [one for one in estimate.optimizers if one.name.split()[0] == spec["name"]]
        found = [one for one in found if ("groups" in one.name) == ("groups" in spec)]
        if not found:
            assert [f"{spec['name']} was left out: {by_rank[i, 32]}" in estimate.notes for by_rank in ranks] == [
                True
            ] * 3
            refused += 1
        for one in found:
            for rank, by_rank in enumerate(ranks):
                expected = by_rank[i, one.bits or 32]
                kinds: tuple[Any, ...] = ("parameter", "gradient", "state")
                assert {kind: one.of(kind, rank) for kind in kinds} == expected, (spec, one.bits, rank)
                compared += 1
    assert compared > 5 * len(list_optimizers())
    few = 1 if options.get("sharding_strategy") == "NO_SHARD" else 2  # SOAP, and Adafactor where rows are split
    assert refused == (few if kind.startswith("fsdp1") else 0)
