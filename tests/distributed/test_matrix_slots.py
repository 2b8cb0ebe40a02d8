"""Slots of matrices lie at the owners of these under FSDP2 and DDP, and travel between numbers of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import OptionError
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.placement import is_dtensor, local
from lightning_optim.optimizers import SOAP, Muon
from lightning_optim.reports.memory import predicted_memory, state_memory
from tests.harness.ranks import RankFailure, run_ranks

Spread = Literal["single", "ddp", "fsdp2"]
OPTIONS: dict[str, Any] = {"lr": 0.02, "frequency": 2, "owners": True}
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


class Net(nn.Module):
    """Rows that no number of ranks divides, ranks without an element, three axes, and a vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = {"tall": (7, 3), "wide": (2, 6), "square": (5, 5), "image": (4, 2, 3), "one_row": (1, 4), "bias": (5,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, dtype=torch.float64)))

    def forward(self) -> Tensor:
        return torch.stack([p.sum() for p in self.parameters()]).sum()


def spread(kind: Spread) -> nn.Module:
    model: nn.Module = Net()
    if kind == "ddp":
        return DistributedDataParallel(model)
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return model


def go_on(model: nn.Module, optimizer: Optimizer, first: int, last: int) -> None:
    """Steps with the same gradients on every rank and under every strategy, to the bit."""
    for k in range(first, last):
        generator = torch.Generator().manual_seed(k)
        for p in model.parameters():
            g = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            p.grad = distribute_tensor(g, p.device_mesh, p.placements, src_data_rank=None) if is_dtensor(p) else g
        optimizer.step()


def weights(model: nn.Module) -> list[Tensor]:
    params: list[Any] = list(model.parameters())
    return [(p.full_tensor() if is_dtensor(p) else p).detach().clone() for p in params]


def train(kind: Spread, save: Path | None = None, load: Path | None = None, view: str = "matrix") -> list[Tensor]:
    """Six steps: all of them, or those before a file, or those after it."""
    if kind != "single":
        dist.init_process_group("gloo")
    model = spread(kind)
    optimizer = SOAP(model.parameters(), view=view, **OPTIONS)  # type: ignore[arg-type]
    if load is not None:
        file = torch.load(load)
        with torch.no_grad():
            for p, value in zip(model.parameters(), file["weights"], strict=True):
                local(p).copy_(
                    local(distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None))
                    if is_dtensor(p)
                    else value
                )
        if kind == "fsdp2":
            names = [name for name, _ in model.named_parameters()]
            groups = [{**group, "params": names} for group in file["optimizer"]["param_groups"]]
            state = {names[i]: slots for i, slots in file["optimizer"]["state"].items()}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)  # as Lightning loads
            set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)
        else:
            optimizer.load_state_dict(file["optimizer"])
    go_on(model, optimizer, 0 if load is None else 3, 6 if save is None else 3)
    if save is not None:
        found = weights(model)
        if kind == "fsdp2":
            names = [name for name, _ in model.named_parameters()]
            given: Any = get_optimizer_state_dict(model, optimizer, options=FULL)
            if dist.get_rank() == 0:
                groups = [{**group, "params": list(range(len(names)))} for group in given["param_groups"]]
                given = {"state": {i: given["state"][name] for i, name in enumerate(names)}, "param_groups": groups}
        else:
            optimizer.consolidate_state_dict()
            given = optimizer.state_dict() if kind == "single" or dist.get_rank() == 0 else None
        if kind == "single" or dist.get_rank() == 0:
            torch.save({"weights": found, "optimizer": given}, save)
    return weights(model)


PLACES: list[tuple[Spread, int]] = [("fsdp2", 2), ("fsdp2", 3), ("ddp", 2), ("ddp", 3)]


@pytest.mark.parametrize("view", ["matrix", "axes"])
@pytest.mark.parametrize(("kind", "ranks"), PLACES)
def test_shards_end_where_one_process_does(kind: Spread, ranks: int, view: str) -> None:
    expected = train("single", view=view)
    for found in run_ranks(train, kind, view=view, world_size=ranks):
        for got, value in zip(found, expected, strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("kind", "ranks"), [("single", 1), ("fsdp2", 2), ("ddp", 2)])
def test_a_file_goes_on_on_any_number_of_ranks(kind: Spread, ranks: int, tmp_path: Path) -> None:
    path, expected = tmp_path / "file.pt", train("single")
    if kind == "single":
        train(kind, save=path)
    else:
        run_ranks(train, kind, save=path, world_size=ranks)
    state = torch.load(path)["optimizer"]["state"]
    assert [tuple(state[0][name].shape) for name in ("factor_0", "basis_1", "exp_avg_sq")] == [(7, 7), (3, 3), (7, 3)]
    for got, value in zip(train("single", load=path), expected, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=1e-10)
    for other, size in (("fsdp2", 3), ("ddp", 2), ("fsdp2", 2)):
        for found in run_ranks(train, other, load=path, world_size=size):
            for got, value in zip(found, expected, strict=True):
                torch.testing.assert_close(got, value, rtol=0, atol=1e-10, msg=f"{other} {size}")


def held(kind: Spread) -> tuple[list[int], int, int]:
    dist.init_process_group("gloo")
    model = spread(kind)
    optimizer = SOAP(model.parameters(), **OPTIONS)
    predicted = sum(entry.bytes for entry in predicted_memory(optimizer))
    go_on(model, optimizer, 0, 2)
    states = [optimizer.state[p] for p in model.parameters()]
    found = [state["factor_0"].numel() for state in states if "factor_0" in state]
    return found, predicted, sum(entry.bytes for entry in state_memory(optimizer))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_each_slot_lies_at_one_rank(kind: Spread) -> None:
    one, other = run_ranks(held, kind)
    assert [a + b for a, b in zip(one[0], other[0], strict=True)] == [49, 4, 25, 16]
    assert all(0 in pair for pair in zip(one[0], other[0], strict=True))
    assert all(predicted == exact for _, predicted, exact in (one, other))


def changed(kind: Spread) -> list[Tensor]:
    """Parameters that come late, a reset, and options that say of other axes that they are turned."""
    if kind != "single":
        dist.init_process_group("gloo")
    model = spread(kind)
    every = list(model.parameters())
    optimizer = SOAP(every[:3], **OPTIONS)
    go_on(model, optimizer, 0, 3)
    optimizer.add_param_group({"params": every[3:]})
    go_on(model, optimizer, 3, 6)
    optimizer.param_groups[1].update(view="axes", precondition_1d=True)
    with pytest.warns(UserWarning, match="for 2 parameters, the first of shape .* starts anew"):
        go_on(model, optimizer, 6, 9)
    optimizer.reset()
    go_on(model, optimizer, 9, 12)
    return weights(model)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_what_changes_during_training_changes_alike_on_every_rank(kind: Spread) -> None:
    expected = changed("single")
    for found in run_ranks(changed, kind):
        for got, value in zip(found, expected, strict=True):
            torch.testing.assert_close(got, value, rtol=0, atol=1e-10)


def save_without_all_ranks() -> None:
    dist.init_process_group("gloo")
    model = spread("ddp")
    optimizer = SOAP(model.parameters(), **OPTIONS)
    go_on(model, optimizer, 0, 2)
    optimizer.state_dict()


def test_replicas_that_share_the_work_say_how_to_save() -> None:
    with pytest.raises(RankFailure, match=r"Call its consolidate_state_dict\(\) on all ranks first"):
        run_ranks(save_without_all_ranks)


def saved_with_an_idle_matrix() -> list[tuple[int, ...]]:
    dist.init_process_group("gloo")
    model = spread("ddp")
    optimizer = SOAP(model.parameters(), **OPTIONS)
    for p in [*model.parameters()][1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    with pytest.raises(OptionError, match=r"brings slots of matrices to rank 7, .* is on the ranks \[0, 1\]"):
        optimizer.consolidate_state_dict(to=7)
    optimizer.consolidate_state_dict(to=1)
    found = optimizer.state_dict()["state"][0] if dist.get_rank() == 1 else {}
    return [(*found[name].shape,) for name in ("factor_0", "basis_1") if found]


def test_a_file_holds_a_matrix_that_had_no_gradient_yet() -> None:
    """In Lightning too: a branch that no batch has used so far."""
    assert run_ranks(saved_with_an_idle_matrix) == [[], [(7, 7), (3, 3)]]


def load_as_another_rule() -> list[float]:
    """The counters after a load of a file that FSDP1 filled up with zeros, of which one rank has only zeros."""
    dist.init_process_group("gloo")
    model = spread("fsdp2")
    optimizer = Muon(model.parameters(), matrix=False)
    go_on(model, optimizer, 0, 1)
    file = optimizer.state_dict()
    for slots in file["state"].values():
        local(slots["exp_avg_sq"]).zero_()
        if dist.get_rank() == 1:
            local(slots["exp_avg"]).zero_()
    optimizer.load_state_dict(file)
    return [float(optimizer.state[p]["step"]) for p in model.parameters()]


def test_ranks_load_alike_what_only_one_of_them_holds() -> None:
    assert run_ranks(load_as_another_rule) == [[0.0] * 6] * 2
