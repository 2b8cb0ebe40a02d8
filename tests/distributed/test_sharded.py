"""What a step under FSDP needs: each element summed once, few messages, pieces that know their places, clear refusals.

That every optimizer ends where one process does is in `distributed/test_worlds.py`.
"""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from lightning_optim import create_optimizer
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed.clipping import clip_gradient_norm
from lightning_optim.distributed.names import plain_name
from lightning_optim.distributed.placement import gradient_of, local, shard_of
from tests.harness.nets import Odd
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.runs import Setting, fit
from tests.harness.worlds import World, batches, spread, train, whole

Case = tuple[str, dict[str, Any]]

# All that crosses tensors and ranks: norms of tensors and of everything, means along axes, the loss; and what does not.
CASES: list[Case] = [
    ("lamb", {"lr": 0.01, "max_grad_norm": 0.1}),
    ("lars", {"lr": 0.1}),
    ("adan", {"lr": 0.01, "max_grad_norm": 0.05}),
    ("scalar_rmsprop", {"lr": 0.01}),
    ("moment_estimation_sgd", {"lr": 0.01}),
    ("koala_v", {}),
    ("koala_m", {}),
    ("adafactor", {"lr": 0.01}),
    ("adafactor", {"lr": 0.01, "mode": "paper", "beta1": 0.9, "factor_axes": "two_largest"}),
    ("adafactor", {"lr": 0.01, "factored": False}),
    ("pnm", {"lr": 0.1}),
    ("schedule_free_adamw", {"lr": 0.01, "warmup_steps": 3, "weight_decay": 0.1}),
    ("lion", {"lr": 0.01, "weight_decay": 0.1, "cautious": True, "cautious_decay": True}),
    ("prodigy", {"d0": 1e-3}),
    ("mars", {"lr": 0.01}),
]


def means_along_axes(case: Case) -> bool:
    return case[0] == "adafactor" and case[1].get("factored", True)


# ---------------------------------------------------------------------------------------------- meshes


def train_all(worlds: list[World], cases: list[Case]) -> list[dict[str, Tensor]]:
    dist.init_process_group("gloo")
    return [train(world, name, options) for world in worlds for name, options in cases]


def test_hybrid_and_tensor_parallel_meshes_sum_each_element_once() -> None:
    """Over the ranks that divide a tensor: not over its replicas, and over both axes of a mesh where both divide it."""
    worlds: list[World] = ["hybrid fsdp1", "hybrid fsdp2", "tensor fsdp2"]
    cases = [CASES[0], CASES[5], CASES[9]]
    found = iter(run_ranks(train_all, worlds, cases, world_size=4)[0])
    for world in worlds:
        for name, options in cases:
            got, expected = next(found), train("single", name, options)
            for key, value in expected.items():  # float64; the most that was seen is 1e-14
                torch.testing.assert_close(got[key], value, rtol=0, atol=1e-12, msg=f"{world} {name} {key}")


# ---------------------------------------------------------------------------------------------- messages


class Layers(nn.Sequential):
    def __init__(self, count: int) -> None:
        super().__init__(*(nn.Linear(6, 6) for _ in range(count)))


def count_messages(cases: list[Case]) -> dict[str, list[int]]:
    """How many reductions a step of two layers, and one of eight, sends."""
    dist.init_process_group("gloo")
    found: dict[str, list[int]] = {}
    send = dist.all_reduce
    for world in ("fsdp1", "fsdp2"):
        for case in cases:
            if world == "fsdp1" and means_along_axes(case):
                continue
            for layers in (2, 8):
                model: nn.Module = Layers(layers)
                if world == "fsdp1":
                    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
                else:
                    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
                optimizer = create_optimizer({"name": case[0], **case[1]}, model)
                sent: list[int] = []
                for _ in range(2):
                    loss = model(torch.ones(2, 6)).square().mean()
                    loss.backward()
                    if optimizer.inputs:
                        optimizer.set_loss(loss.detach())
                    sent.clear()

                    def counted(*args: Any, sent: list[int] = sent, **kwargs: Any) -> Any:
                        sent.append(1)
                        return send(*args, **kwargs)

                    dist.all_reduce = counted
                    optimizer.step()
                    dist.all_reduce = send
                found.setdefault(f"{world} {case[0]} {case[1]}", []).append(len(sent))
    return found


def test_messages_do_not_grow_with_the_number_of_tensors() -> None:
    found = run_ranks(count_messages, CASES)[0]
    assert all(few == many for few, many in found.values()), found
    assert found["fsdp2 pnm {'lr': 0.1}"] == [0, 0]
    # The norms of all gradients and of each weight, then of each step; and both sums of the estimate of d.
    assert found["fsdp1 lamb {'lr': 0.01, 'max_grad_norm': 0.1}"] == [2, 2]
    assert found["fsdp1 prodigy {'d0': 0.001}"] == found["fsdp2 prodigy {'d0': 0.001}"] == [1, 1]
    assert max(few for few, _ in found.values()) <= 8


# ---------------------------------------------------------------------------------------------- pieces


def look_at_pieces(world: World) -> int:
    """Check every piece against the whole tensor; how many are empty here."""
    dist.init_process_group("gloo")
    model = spread(Odd(), world)
    values = whole(model)
    x, y = next(batches(torch.float64, dist.get_rank(), dist.get_world_size()))
    nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
    empty = 0
    for name, p in model.named_parameters():
        tensor, piece = values[plain_name(name)], shard_of(p)
        part = local(p).detach().reshape(-1)
        assert piece.shape == tensor.shape
        assert piece.numel == tensor.numel()
        assert torch.equal(part, tensor.reshape(-1)[piece.global_indices()])
        first, run, stride = piece.runs()
        at = torch.arange(len(part))
        assert torch.equal(piece.global_indices(), first + at // run * stride + at % run)
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, gradient_of(p) is not None)
        assert len(set(found)) == 1  # those who hold nothing as well
        empty += len(part) == 0
    return empty


@pytest.mark.parametrize("world", ["fsdp1", "fsdp2"])
def test_pieces_know_their_places(world: World) -> None:
    assert sum(run_ranks(look_at_pieces, world)) > 0


def coded_slots(world: World) -> set[str]:
    """The parameters of which this rank keeps codes."""
    dist.init_process_group("gloo")
    model = spread(Odd(torch.float32), world)
    optimizer = create_optimizer({"name": "adan", "lr": 0.1, "state_bits": 8}, model)
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    found = {n for n, p in model.named_parameters() if hasattr(optimizer.state.get(p, {}).get("exp_avg"), "codes")}
    return {plain_name(name) for name in found}


@pytest.mark.parametrize("world", ["fsdp1", "fsdp2"])
def test_eight_bits_are_chosen_by_the_logical_tensor(world: World) -> None:
    """4316 elements are kept in codes though a rank holds 2158 of them."""
    assert run_ranks(coded_slots, world) == [{"large.weight", "back.weight"}] * 2


# ---------------------------------------------------------------------------------------------- clipping


def clip(world: World) -> tuple[float, list[Tensor]]:
    """The norm that the gradients had, and this rank's part of the clipped ones."""
    if world != "single":
        dist.init_process_group("gloo")
    model = spread(Odd(), world)
    rank, size = (0, 1) if world == "single" else (dist.get_rank(), dist.get_world_size())
    x, y = next(batches(torch.float64, rank, size))
    nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
    params = list(model.parameters())
    return clip_gradient_norm(params, 0.01), [local(p.grad).clone() for p in params if p.grad is not None]


def test_clipping_is_by_the_norm_of_all_elements() -> None:
    """As torch's, on the whole model in one process."""
    model = Odd()
    x, y = next(batches(torch.float64, 0, 1))
    nn.functional.mse_loss(model(x), y).backward()  # type: ignore[no-untyped-call]
    expected = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01))
    norm, grads = clip("single")
    theirs = [p.grad for p in model.parameters() if p.grad is not None]
    assert norm == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(grads, theirs, rtol=1e-12, atol=0)
    for world in ("ddp", "fsdp1", "fsdp1 fused", "fsdp2"):
        found = run_ranks(clip, world)
        squares = [sum(float(grad.square().sum()) for grad in grads) for _, grads in found]
        assert [norm for norm, _ in found] == pytest.approx([expected] * 2, rel=1e-12)
        after = squares[0] if world == "ddp" else sum(squares)
        assert after**0.5 == pytest.approx(0.01 * expected / (expected + 1e-6), rel=1e-9)


def fit_all(settings: list[Setting], cases: list[Case]) -> dict[str, list[float]]:
    options: dict[str, Any] = {"gradient_clip_val": 0.02, "accumulate_grad_batches": 2}
    return {
        f"{setting.kind} {case[0]}": fit(setting, {"name": case[0], **case[1]}, **options).losses
        for setting in settings
        for case in cases
        if setting.kind != "fsdp1 full" or not means_along_axes(case)
    }


def test_trainer_clips_and_accumulates_alike() -> None:
    """Also under FSDP1, where Lightning itself refuses to clip by norm. float32: the losses differ by rounding."""
    settings = [Setting(kind, 32, 2) for kind in ("ddp", "fsdp1 full", "fsdp2 full")]
    cases: list[Case] = [("lamb", {"lr": 0.02}), ("koala_v", {}), ("adafactor", {"lr": 0.02}), ("adan", {"lr": 0.02})]
    found = run_ranks(fit_all, settings, cases)[0]
    for setting in settings[1:]:
        for name, _ in cases:
            if f"{setting.kind} {name}" in found:
                assert found[f"{setting.kind} {name}"] == pytest.approx(found[f"ddp {name}"], rel=1e-6)


# ---------------------------------------------------------------------------------------------- what is refused


def too_early() -> None:
    dist.init_process_group("gloo")
    model = nn.Linear(4, 4)
    optimizer = create_optimizer("adan", model)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))

    def closure() -> Tensor:
        loss = cast(Tensor, model(torch.ones(1, 4)).sum())
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)


def test_an_optimizer_built_before_sharding_says_so() -> None:
    with pytest.raises(RankFailure, match="Adan would train nothing: none of its 2 parameters has a gradient"):
        run_ranks(too_early)


def fused_groups(options: dict[str, Any]) -> list[str]:
    dist.init_process_group("gloo")
    model = FullyShardedDataParallel(Layers(2), device_id=torch.device("cpu"), use_orig_params=False)
    return [group["name"] for group in create_optimizer({"name": "adamw", **options}, model).param_groups]


def test_roles_of_fused_tensors_are_refused_or_given_up() -> None:
    assert run_ranks(fused_groups, {"no_decay": []})[0] == ["main"]
    with pytest.raises(RankFailure, match=r"biases and norms cannot be told from weights, for no_decay\. Set"):
        run_ranks(fused_groups, {})


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_a_rehearsal_counts_nothing(name: str) -> None:
    """torch's loader takes a step with lr = 0 and zero gradients to make state; all must stay at its start."""
    p = nn.Parameter(torch.ones(3))
    optimizer: Optimizer = OPTIMIZERS[name]([p])
    _init_optim_state(optimizer)
    assert torch.equal(p, torch.ones(3))
    assert int(optimizer.state[p]["step"]) == 0
    assert not optimizer.param_groups[0].get("predicted", False)
    assert set(optimizer.slots_of(0, p)) <= {*optimizer.state[p], *optimizer.param_groups[0]}
