"""Functions of whole matrices end where one process does, however the matrices are spread, and in few messages."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, distribute_tensor
from torch.distributed.tensor import Shard as Along
from torch.nn.parallel import DistributedDataParallel

from benchmarks.communication import counted
from benchmarks.scale import exchanged
from lightning_optim import AdamW, OptionError
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed import exchange, ranks
from lightning_optim.distributed.owners import Indices, Owners, assign, cost
from lightning_optim.distributed.placement import local
from lightning_optim.distributed.shard import Shard
from lightning_optim.language import Options, Slot, Slots, Value, View, ema, matrix_view, norm, rounded, whole
from tests.harness.nets import Odd
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.worlds import BATCH, World, batches, spread
from tests.harness.worlds import whole as weights

BLOCKS: dict[int, int | Sequence[int]] = {13: [5, 8], 332: 4}
ENGINES = ("reference", "blocked", "compiled")


def product(x: Tensor, y: Tensor, *, share: float) -> Tensor:
    """Each element depends on all elements of both matrices."""
    return share * (x @ y.mT @ x) + y.flip(1)


def squared(x: Tensor) -> Tensor:
    return x @ x.mT @ x


class Spread(Optimizer):
    """A page with two cuts of one level and one behind both; vectors have a rule of their own."""

    lr: float = 0.1

    exp_avg = Slot("m")

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape, blocks=BLOCKS.get(shape[0], 1)) if len(shape) > 1 else None

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"matrix": len(shape) > 1}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        s.exp_avg = m = ema(s.exp_avg, g, 0.5)
        if not h.matrix:
            return p - h.lr * m
        one = whole(product, m, p, share=1.0 / (1.0 + norm(m)))
        other = whole(squared, g)
        return p - h.lr * (0.1 * whole(squared, one / (1.0 + norm(one)) + other) + m)


FAILS = [-1]  # the rank on which `failing` fails


def failing(x: Tensor) -> Tensor:
    if dist.get_rank() == FAILS[0]:
        raise ZeroDivisionError("by the test")
    return x


@rounded(lambda dtype, device, **_: torch.bfloat16)
def coarse(x: Tensor) -> Tensor:
    return x.flip(1)


class Once(Optimizer):
    """A page with one function of one argument, and `experts` where a tensor has three axes."""

    lr: float = 0.1
    kind: str = "squared"

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        return matrix_view(shape, experts=len(shape) == 3, blocks=2 if len(shape) == 3 else 1)

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        return {"matrix": len(shape) > 1}

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        function: Any = {"squared": squared, "failing": failing, "coarse": coarse}[str(h.kind)]
        return p - h.lr * (whole(function, g) if h.matrix else g)


for _page in (Spread, Once):
    del OPTIMIZERS[_page.__name__.lower()]  # no pages of the package


def train(world: World, engine: str, steps: int = 3, parts: int = 1, **options: Any) -> dict[str, Tensor]:
    """The weights after some steps, two batches each, which may come in parts."""
    model = spread(Odd(torch.float64), world)
    mine, size = (0, 1) if world == "single" else (dist.get_rank(), dist.get_world_size())
    optimizer = Spread(model.parameters(), engine=engine, **options)
    stream = batches(torch.float64, mine, size)
    for _ in range(steps):
        optimizer.zero_grad()
        for _ in range(2):
            for x, y in zip(*(values.chunk(parts) for values in next(stream)), strict=True):
                ((model(x) - y).square().sum() * size / BATCH / 2).backward()  # parts are not of equal size
        optimizer.step()
    return weights(model)


@functools.cache
def alone() -> dict[str, Tensor]:
    return train("single", "reference")


def everywhere(world: World, engines: tuple[str, ...], **options: Any) -> dict[str, dict[str, Tensor]]:
    dist.init_process_group("gloo")
    return {engine: train(world, engine, parts=2, **options) for engine in engines}


WORLDS: list[Any] = [
    ("fsdp2", 2, {}),
    ("fsdp2", 3, {}),
    ("fsdp1", 2, {}),
    ("fsdp1", 3, {}),
    ("ddp", 2, {}),
    ("ddp", 3, {"owners": True}),
    *(pytest.param(world, 4, {}, marks=pytest.mark.full) for world in ("hybrid fsdp1", "hybrid fsdp2")),
]


@pytest.mark.parametrize(("world", "size", "options"), WORLDS)
def test_shards_end_where_one_process_does(world: World, size: int, options: dict[str, Any]) -> None:
    """With rows that do not divide, ranks without an element, a frozen matrix and a branch without gradients.

    Two micro-batches here are four there: a step is a step, and not a function of what accumulates in it.
    """
    start = weights(Odd(torch.float64))
    for found in run_ranks(everywhere, world, ENGINES, world_size=size, **options):
        for engine, got in found.items():
            for name, value in alone().items():
                assert torch.equal(value, start[name]) == name.startswith(("frozen", "unused"))
                torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8, msg=f"{engine}, {name}")


# ------------------------------------------------------------------ messages


def net(layers: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(8, 8) for _ in range(layers)), nn.Linear(8, 5))


def sent(world: World, layers: int, **options: Any) -> list[int]:
    """The bytes of each message of the second step."""
    dist.init_process_group("gloo")
    model: nn.Module = net(layers)
    if world == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = DistributedDataParallel(model)
    optimizer = Once(model.parameters(), **options)
    model(torch.ones(2, 8)).square().mean().backward()
    optimizer.step()
    with counted() as found:
        optimizer.step()
    return found


@pytest.mark.parametrize("layers", [1, 6])
def test_messages_do_not_grow_with_the_number_of_tensors(layers: int) -> None:
    """Two between shards, one between replicas that share the work, none where each computes for itself."""
    shapes = [(8, 8)] * layers + [(5, 8)]
    assert run_ranks(sent, "fsdp2", layers) == list(map(list, exchanged(shapes, 2, 4)))
    assert run_ranks(sent, "fsdp2", layers, kind="coarse") == list(map(list, exchanged(shapes, 2, 2)))
    for found in run_ranks(sent, "ddp", layers, owners=True):
        assert found == [4 * {1: 64 + 1, 6: 3 * 64 + 40 + 1}[layers]]  # as the rank with the most
    for owners in ("auto", False):
        assert run_ranks(sent, "ddp", layers, owners=owners) == [[], []]


def sent_alone() -> list[int]:
    """The bytes of each message of a step that one rank takes by itself, of replicas that share the work."""
    dist.init_process_group("gloo")
    model = DistributedDataParallel(net(1))
    optimizer = Once(model.parameters(), owners=True)
    model(torch.ones(2, 8)).square().mean().backward()
    with counted() as found:
        if dist.get_rank() == 1:
            with ranks.alone():
                optimizer.step()
    return found


def test_a_rank_that_steps_alone_waits_for_no_other() -> None:
    assert run_ranks(sent_alone) == [[], []]


def split_along_columns() -> list[Tensor]:
    """The weights of a step on shards along each axis, on each engine, and of one on whole tensors."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    generator = torch.Generator().manual_seed(0)
    shapes = ((6, 5), (4, 6, 5), (4, 6, 5), (4, 6, 5), (1, 7), (2, 2, 2))
    wholes = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    axes = (1, 0, 1, 2, 0, 1)
    found = []
    for engine in (*ENGINES, "whole"):
        params = [nn.Parameter(x.clone()) for x in wholes]
        grads = [x.sin() for x in wholes]
        if engine in ENGINES:
            placed = [(x, [Along(axis)]) for x, axis in zip(wholes, axes, strict=True)]
            params = [nn.Parameter(distribute_tensor(x, mesh, placements)) for x, placements in placed]
            grads = [distribute_tensor(x.sin(), mesh, placements) for x, placements in placed]
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        Once(params, engine=engine if engine in ENGINES else "auto").step()
        found += [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]
    return found


def test_a_tensor_may_be_split_along_any_axis() -> None:
    """Also where its matrices are cut along that axis: halves of the rows of each expert."""
    for found in run_ranks(split_along_columns, world_size=3):
        count = len(found) // (len(ENGINES) + 1)
        for i, got in enumerate(found):
            torch.testing.assert_close(got, found[-count:][i % count], rtol=1e-12, atol=1e-12)


def in_rounds() -> tuple[dict[str, Tensor], int]:
    dist.init_process_group("gloo")
    exchange.ROUND = 8 * 332 * 13  # bytes, less than the largest matrices
    with counted() as found:
        got = train("fsdp2", "blocked", steps=1)
    return got, len(found)


def test_rounds_bound_what_an_owner_holds() -> None:
    right = train("single", "blocked", steps=1)
    for got, messages in run_ranks(in_rounds):
        assert messages > 10
        for name, value in right.items():
            torch.testing.assert_close(got[name], value, rtol=1e-8, atol=1e-8)


def test_a_round_holds_whole_matrices_of_each_owner() -> None:
    home: Any = None
    sizes = [5, 3, 4, 1, 9, 2]
    parts = [
        exchange.Part(home, i % 2, 0, n, torch.float64, (torch.empty(n),), torch.empty(n), i)
        for i, n in enumerate(sizes)
    ]
    assert [[part.tag for part in of_round] for of_round in exchange.rounds(parts, 8 * 9)] == [[0, 1, 2, 3, 5], [4]]
    assert len(exchange.rounds(parts, 8 * 18)) == 1


# ------------------------------------------------------------------ owners


def test_the_elements_of_a_shard_in_a_range() -> None:
    """As a search among all its global indices finds them."""
    shape = torch.Size([3, 4, 5])
    ranges = list(itertools.combinations(range(0, 61, 4), 2))
    for axis, size in enumerate(shape):
        for offset, length in itertools.product(range(size), range(size + 1)):
            if offset + length > size:
                continue
            offsets, sizes = [0, 0, 0], list(shape)
            offsets[axis], sizes[axis] = offset, length
            shard = Shard(shape, shape, tuple(offsets), tuple(sizes))
            every = shard.global_indices()
            own = Indices(*shard.runs(), every.numel())
            for low, high in ranges:
                inside = every[(every >= low) & (every < high)] - low
                first, last = own.before(low), own.before(high)
                assert (first, last) == (int((every < low).sum()), int((every < high).sum()))
                assert torch.equal(torch.arange(high - low)[own.within(low, high, every.device)], inside)


def test_owners_have_much_the_same_to_do() -> None:
    """At most 4/3 of what the best division can need, which is no less than the mean and the largest matrix."""
    generator = torch.Generator().manual_seed(0)
    for size in (2, 3, 8):
        sides = torch.randint(1, 40, (60, 2), generator=generator).tolist()
        views = [View((rows,), columns) for rows, columns in sides]
        loads = [(0.0, 0, rank) for rank in range(size)]
        owners = assign(views, loads)
        work = [cost(*side) for side in sides]
        of_ranks = [sum(x for x, (own,) in zip(work, owners, strict=True) if own == rank) for rank in range(size)]
        assert sorted(of_ranks) == pytest.approx(sorted(load for load, _, _ in loads))
        assert max(of_ranks) <= 4 / 3 * max(sum(work) / size, max(work))


def owners_that_stay() -> tuple[Any, Any]:
    dist.init_process_group("gloo")
    model: Any = spread(Odd(torch.float64), "fsdp2")
    params = [(p, matrix_view(p.shape)) for p in model.parameters()]
    owners = Owners()
    owners.follow(params[2:])
    before = {p: owners.home(p) for p, _ in params[2:]}
    owners.follow(params)
    assert all(owners.home(p) is home for p, home in before.items())
    found = [owners.home(p) for p, _ in params]
    return [home and home.owners for home in found], [home and len(home.held) for home in found]


def test_owners_stay_where_others_join() -> None:
    first, second = run_ranks(owners_that_stay)
    assert first == second
    assert {rank for owners in first[0] if owners for rank in owners} == {0, 1}
    assert set(first[1]) == {None, 2}, "a home for each matrix, which knows what both ranks hold"


# ------------------------------------------------------------------ what goes wrong


Placed = Callable[[int, DeviceMesh], Sequence[Placement] | None]
# Where each of the four matrices lies on a mesh (2, ranks / 2): one owner fails, and all ranks hear of it.
ARRANGED: dict[str, tuple[int, Placed]] = {
    "sharded": (2, lambda i, mesh: [Replicate(), Along(0)]),
    "one on each rank": (2, lambda i, mesh: [Replicate(), Along(0)] if i else None),
    "two groups": (4, lambda i, mesh: [Along(0), Replicate()] if i < 2 else [Replicate(), Along(0)]),
}


def failing_on_one_rank(arranged: str, **options: Any) -> list[tuple[str, bool]]:
    """What a rank hears if the function fails on each rank in turn, and whether a weight has moved then."""
    dist.init_process_group("gloo")
    shapes = [(8, 3), (5, 8), (7, 8), (8, 8)]
    params = [nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes]
    if arranged == "ddp":
        module = DistributedDataParallel(nn.ParameterList(params))
        params = list(module.parameters())
    else:
        size = dist.get_world_size()
        mesh = init_device_mesh("cpu", (2, size // 2) if size > 2 else (1, 2))
        places = [ARRANGED[arranged][1](i, mesh) for i in range(len(params))]
        params = [
            p if to is None else nn.Parameter(distribute_tensor(p.detach(), mesh, to))
            for p, to in zip(params, places, strict=True)
        ]
    optimizer, found = Once(params, kind="failing", **options), []
    for FAILS[0] in range(dist.get_world_size()):
        for p in params:
            p.grad = torch.ones_like(p)
        with pytest.raises((ZeroDivisionError, RuntimeError)) as error:
            optimizer.step()
        found.append((str(error.value), all(bool((local(p) == 1).all()) for p in params)))
        dist.barrier()
    FAILS[0] = -1
    optimizer.step()
    assert all(bool((local(p) == 0.9).all()) for p in params), "it goes on when nothing fails"
    return found


@pytest.mark.parametrize(
    ("arranged", "size", "options"),
    [("ddp", 2, {"owners": True}), *((name, size, {}) for name, (size, _) in ARRANGED.items())],
)
def test_all_ranks_know_of_a_function_that_failed(arranged: str, size: int, options: dict[str, Any]) -> None:
    """Nobody waits for ever or writes a part of a step, in whatever group and on whatever matrix it was."""
    found = run_ranks(failing_on_one_rank, arranged, world_size=size, **options)
    for failed in range(size):
        for rank, of_rank in enumerate(found):
            words, unchanged = of_rank[failed]
            assert unchanged
            assert ("by the test" if rank == failed else "a function of whole matrices has failed on rank") in words


def with_a_gradient_missing(world: World, steps: int, **options: Any) -> str:
    """What a rank hears if a gradient is missing on one rank, in the first step or a later one."""
    dist.init_process_group("gloo")
    layers: Any = net(3)
    model: nn.Module = layers
    if world == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    else:
        model = DistributedDataParallel(layers)
    optimizer = Once(model.parameters(), **options)
    model(torch.ones(2, 8)).square().mean().backward()
    for _ in range(steps):
        optimizer.step()
    if dist.get_rank() == 1:
        layers[0].weight.grad = None
    elif steps:
        layers[2].weight.grad = None  # of the same size and owner
    try:
        optimizer.step()
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("world", "options"), [("fsdp2", {}), ("ddp", {"owners": True})])
def test_gradients_must_be_those_of_the_same_parameters(world: World, options: dict[str, Any]) -> None:
    """Another number is found before anything is sent; other matrices of the same sizes by what is sent."""
    with pytest.raises(RankFailure, match=r"the number of parameters with gradients is [78] on rank"):
        run_ranks(raising, with_a_gradient_missing, world, 0, **options)
    for words in run_ranks(with_a_gradient_missing, world, 1, **options):
        assert "has gradients of other matrices than this one" in words


def raising(function: Callable[..., str], *args: Any, **options: Any) -> None:
    if words := function(*args, **options):
        raise RuntimeError(words)


def test_only_optimizers_with_matrices_have_owners() -> None:
    params = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(OptionError, match="AdamW has no option 'owners'"):
        AdamW(params, owners=True)
    with pytest.raises(OptionError, match="owners is one for all groups"):
        Once([{"params": params, "owners": True}])
    assert Once(params).defaults["owners"] == "auto"
    assert "owners" not in Once(params).param_groups[0], "a file does not say how to run"


def unlike() -> str:
    dist.init_process_group("gloo")
    model = DistributedDataParallel(net(1))
    model(torch.ones(2, 8)).square().mean().backward()
    try:
        Once(model.parameters(), owners=False if dist.get_rank() == 0 else "auto").step()
    except RuntimeError as error:
        return str(error)
    return ""


def test_ranks_must_choose_alike() -> None:
    said = " ".join(run_ranks(unlike))  # of the rank that came second
    assert (
        "owners is False on rank 0 and auto on rank 1" in said or "owners is auto on rank 1 and False on rank 0" in said
    )


def refused(world: World) -> str:
    dist.init_process_group("gloo")
    with pytest.raises(RuntimeError) as error:
        train(world, "auto", steps=1)
    return str(error.value)


def test_flat_parameters_are_refused() -> None:
    for words in run_ranks(refused, "fsdp1 fused"):
        assert "needs a whole matrix, and FSDP1 with use_orig_params=False shows flat parameters" in words


@pytest.mark.full
def test_tensor_parallel_and_fsdp2_on_one_tensor_are_refused() -> None:
    for words in run_ranks(refused, "tensor fsdp2", world_size=4):
        assert "is split along two dimensions of a device mesh (tensor parallel and FSDP2)" in words
