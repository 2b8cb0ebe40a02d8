"""Ranks that train the same parameters in different ways are told so in the first step, and nobody waits for it."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import AdamW, Lion
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.ranks import alone
from lightning_optim.engines.cpp import compiler
from lightning_optim.errors import EngineError
from lightning_optim.stages import Average
from tests.harness.data import batches as batches_of_data
from tests.harness.modules import Made
from tests.harness.nets import Odd
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.trainers import trainer
from tests.harness.worlds import World, batches, spread

Make = Callable[[list[nn.Parameter]], Optimizer]


def in_two_groups(params: list[nn.Parameter], lr: float) -> Optimizer:
    return AdamW([{"params": params[:2]}, {"params": params[2:], "lr": lr}])


def turned(params: list[nn.Parameter]) -> Optimizer:
    return AdamW([params[0], *params[:0:-1]])


def averaged(params: list[nn.Parameter]) -> Optimizer:
    optimizer = AdamW(params)
    optimizer.append(Average())
    return optimizer


def halved(params: list[nn.Parameter]) -> Optimizer:
    """With the same rate as a number, a tensor or a number of NumPy: tensors name devices, which differ."""
    optimizer = AdamW(params)
    optimizer.param_groups[0]["lr"] = (torch.tensor(0.5), np.float32(0.5), 0.5)[dist.get_rank() % 3]
    return optimizer


def without_kernels(params: list[nn.Parameter]) -> Optimizer:
    """On a machine whose compiler has stopped working."""

    def full(source: compiler.Source) -> Any:
        raise EngineError("the disk is full.")

    warnings.simplefilter("ignore", UserWarning)
    compiler.load = full
    return AdamW(params)


# What rank 0 and the others make, and what is said of it; nothing where they are alike.
CASES: dict[str, tuple[Make, Make, str]] = {
    "alike": (AdamW, AdamW, ""),
    "class": (AdamW, Lion, "the class is "),
    "engine": (functools.partial(AdamW, engine="blocked"), functools.partial(AdamW, engine="reference"), "the engine"),
    "rate": (AdamW, functools.partial(AdamW, lr=0.5), "lr is "),
    "betas": (AdamW, functools.partial(AdamW, betas=(0.9, 0.9)), "betas is "),
    "bits": (AdamW, functools.partial(AdamW, state_bits=8), "state_bits is "),
    "groups": (AdamW, functools.partial(in_two_groups, lr=1e-3), "the number of groups is "),
    "rate of a group": (
        functools.partial(in_two_groups, lr=1e-3),
        functools.partial(in_two_groups, lr=1e-2),
        "lr of group 1 is ",
    ),
    "order": (AdamW, turned, "the order or the shapes of parameters"),
    "average": (AdamW, averaged, "what callbacks add is "),
    "alike again": (functools.partial(AdamW, lr=0.1), functools.partial(AdamW, lr=0.1), ""),
    "alike in other types": (halved, halved, ""),
    **({} if compiler.without_compiler() else {"kernels": (AdamW, without_kernels, "the engine is ")}),
}


def step(model: nn.Module, optimizer: Any) -> str:
    """Take a step on this rank's batch; what it says."""
    x, y = next(batches(torch.float32, dist.get_rank(), dist.get_world_size()))
    nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


def first_steps(world: World) -> dict[str, str]:
    """What is said in the first step of each case on this rank."""
    dist.init_process_group("gloo")
    found = {}
    for case, (first, other, _) in CASES.items():
        model = spread(Odd(torch.float32), world)
        make = first if dist.get_rank() == 0 else other
        found[case] = step(model, make([p for p in model.parameters() if p.requires_grad]))
    return found


@pytest.mark.parametrize(("world", "size"), [("ddp", 2), ("fsdp1", 2), ("fsdp2", 2), ("hybrid fsdp2", 4)])
def test_the_first_step_says_what_differs(world: World, size: int) -> None:
    """Who comes later says it: one message on two ranks."""
    ranks = run_ranks(first_steps, world, world_size=size)
    for case, (_, _, words) in CASES.items():
        said = [found[case] for found in ranks if found[case]]
        assert bool(said) == bool(words), (case, said)
        assert all(words in message and "rank 0" in message for message in said), (case, said)
        assert len(said) < size, (case, said)


def fit_with_a_rate_of_its_own() -> None:
    module = Made(lambda params: AdamW(params, lr=0.01 * (1 + dist.get_rank())))
    trainer(strategy="ddp", max_epochs=1).fit(module, batches_of_data())


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trainer_ends_with_the_message() -> None:
    with pytest.raises(RankFailure, match=r"do not train alike, .*: in AdamW, lr is 0.0[12] on rank"):
        run_ranks(fit_with_a_rate_of_its_own)


def without_knowledge() -> list[str]:
    """Ranks that need not train alike, though a process group is there."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch's, for its own script
        from torch.distributed.optim import ZeroRedundancyOptimizer
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said = []

    torch.manual_seed(0)  # each rank on its own, from the same seed and on the same batch, with another rate
    own = nn.Linear(5, 1)
    said.append(step(own, AdamW(own.parameters(), lr=0.1 * (rank + 1))))

    if rank == 0:  # one rank alone
        said.append(step(own, Lion(own.parameters())))

    part = nn.Linear(5, 1 + rank)  # a part of a model on each rank
    (part(torch.ones(2, 5)).sum()).backward()
    (AdamW if rank else Lion)(part.parameters()).step()

    model = DistributedDataParallel(Odd(torch.float32), find_unused_parameters=True)  # each rank steps a part of it
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = ZeroRedundancyOptimizer(trained, optimizer_class=AdamW, lr=0.01)
    said += [step(model, optimizer), step(model, optimizer)]

    sharded: Any = fully_shard(Odd(torch.float32), mesh=init_device_mesh("cpu", (2,)))  # beside experts of each rank
    experts = [nn.Parameter(torch.ones(3)) for _ in range(1 + rank)]
    said.append(step(sharded, AdamW([*(p for p in sharded.parameters() if p.requires_grad), *experts])))

    # What is outside of a DDP module is not known to be the same.
    said.append(step(model, AdamW([*trained, *own.parameters()], lr=0.1 * (rank + 1))))
    return said


def test_nothing_is_asked_where_ranks_may_differ() -> None:
    ranks = run_ranks(without_knowledge)
    assert not any(said for found in ranks for said in found)


def once() -> list[bool]:
    """Whether the question is asked in each of some steps, with a load in between."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(Odd(torch.float32), find_unused_parameters=True)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    with alone():  # as a dry run, which other ranks may not make
        step(model, optimizer)
    asked = [optimizer.compared]
    for i in range(3):
        before = optimizer.compared
        step(model, optimizer)
        asked.append(optimizer.compared and not before)
        if i == 1:
            optimizer.load_state_dict(optimizer.state_dict())
    return asked


def test_it_is_asked_once() -> None:
    assert run_ranks(once) == [[False, True, False, False]] * 2
