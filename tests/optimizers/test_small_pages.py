"""AdEMAMix, ADOPT and MARS: what their pages promise beside the arithmetic, and their peers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import ADOPT, MARS, AdEMAMix, OptionError
from lightning_optim.core.optimizer import OPTIMIZERS


def leaves(*shapes: tuple[int, ...]) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def step(optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
    optimizer.step()


# ---------------------------------------------------------------- MARS


def test_mars_keeps_a_copy_of_the_last_gradient() -> None:
    """A gradient that is zeroed or filled in place, as zero_grad(set_to_none=False) and DDP do, is not read again."""
    ends = []
    for in_place in (False, True):
        p = leaves((3, 4))[0]
        optimizer = MARS([p], lr=0.1, gamma=0.5)
        p.grad = torch.zeros_like(p)
        for seed in range(4):
            g = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            if in_place:
                optimizer.zero_grad(set_to_none=False)
                p.grad.copy_(g)
            else:
                p.grad = g
            optimizer.step()
        assert optimizer.state[p]["last_grad"].data_ptr() != p.grad.data_ptr()
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_mars_takes_adamw_for_vectors_and_its_own_rule_for_convolutions() -> None:
    shapes = ((4, 2, 3, 3), (5,), ())
    params, others = leaves(*shapes), leaves(*shapes)
    optimizer = MARS(params, lr=0.1, lr_1d=0.02, betas_1d=(0.8, 0.9), weight_decay_1d=0.3)
    adamw = torch.optim.AdamW(others, lr=0.02, betas=(0.8, 0.9), weight_decay=0.3)
    for seed in range(5):
        step(optimizer, seed)
        step(adamw, seed)
    for p, q in zip(params[1:], others[1:], strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    assert ["last_grad" in optimizer.state[p] for p in params] == [True, False, False]


def test_schedules_of_mars_act_on_both_rates() -> None:
    """Also in a group with rates of its own, and after a checkpoint is loaded into an optimizer of another rate."""
    params, others = leaves((5,), (3,)), leaves((5,), (3,))
    groups: list[dict[str, Any]] = [{"params": params[:1]}, {"params": params[1:], "lr": 0.2, "lr_1d": 0.05}]
    optimizer = MARS(groups, lr=0.1, lr_1d=0.02)
    of_torch: list[dict[str, Any]] = [{"params": others[:1]}, {"params": others[1:], "lr": 0.05}]
    adamw = torch.optim.AdamW(of_torch, lr=0.02, betas=(0.9, 0.95), weight_decay=0.1)
    schedules = [torch.optim.lr_scheduler.LambdaLR(each, lambda t: t / 4) for each in (optimizer, adamw)]
    for seed in range(6):
        if seed == 3:
            again = MARS([{"params": params[:1]}, {"params": params[1:]}], lr=7.0, lr_1d=3.0)
            again.load_state_dict(optimizer.state_dict())
            schedules[0].optimizer = optimizer = again
        step(optimizer, seed)
        step(adamw, seed)
        for schedule in schedules:
            schedule.step()
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


# ---------------------------------------------------------------- ADOPT


@pytest.mark.parametrize("decoupled", [True, False])
def test_the_first_step_of_adopt_stores_the_square_alone(decoupled: bool) -> None:
    p = leaves((3, 4))[0]
    start = p.detach().clone()
    optimizer = ADOPT([p], lr=0.1, weight_decay=0.5, decoupled=decoupled)
    step(optimizer, 0)
    assert isinstance(p.grad, Tensor)
    g = p.grad if decoupled else p.grad + 0.5 * start
    assert torch.equal(p, start)
    assert torch.equal(optimizer.state[p]["exp_avg"], torch.zeros_like(p))
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], g * g, rtol=1e-15, atol=0)


def test_adopt_clips_to_a_power_of_the_steps_before() -> None:
    """After a tiny gradient, a large one moves a parameter by no more than its bound."""
    p = Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = ADOPT([p], lr=1.0, betas=(0.0, 0.999), clip_power=0.5)
    moved = []
    for k in range(5):
        before = float(p.detach())
        p.grad = torch.full((1,), 1e-3 * 100.0**k, dtype=torch.float64)
        optimizer.step()
        moved.append(before - float(p.detach()))
    assert moved == pytest.approx([0.0, 1.0, 2**0.5, 3**0.5, 2.0], rel=1e-12)


# ---------------------------------------------------------------- AdEMAMix


def test_the_half_life_of_the_slow_mean_of_ademamix_grows_by_the_same_in_each_step() -> None:
    h: Any = AdEMAMix([leaves((2,))[0]], t_beta3=100.0).param_groups[0]
    view: Any = type("Options", (), dict(h))
    decays = [float(AdEMAMix.scalars(view, t)["slow"]) for t in (1, 50, 99, 100, 101, 1000)]  # type: ignore[arg-type]
    lives = [
        float(torch.tensor(0.5, dtype=torch.float64).log() / torch.tensor(b, dtype=torch.float64).log()) for b in decays
    ]
    first, last = lives[3] - (lives[3] - lives[1]) * 2, lives[3]
    assert lives[:3] == pytest.approx([first + (last - first) * u for u in (0.01, 0.5, 0.99)], rel=1e-9)
    assert decays[3:] == [0.9999] * 3


def test_ademamix_without_a_slow_mean_has_no_schedule_of_it() -> None:
    with pytest.raises(OptionError, match=r"t_beta3=10.0 needs a third beta above 0"):
        AdEMAMix(leaves((2,)), betas=(0.9, 0.999, 0.0), t_beta3=10.0)


# ---------------------------------------------------------------- peers


PEERS: tuple[tuple[str, str, dict[str, Any], dict[str, Any], float], ...] = (
    ("AdEMAMix", "ademamix", {"weight_decay": 0.1, "weight_decouple": True}, {"weight_decay": 0.1}, 1e-10),
    ("AdEMAMix", "ademamix", {"t_alpha_beta3": 30}, {"t_alpha": 30.0, "t_beta3": 30.0}, 1e-10),
    ("MARS", "mars", {"lr_1d": 0.05, "weight_decouple": True}, {"lr_1d": 0.05}, 1e-5),  # it corrects eps for bias
)


@pytest.mark.parametrize(("peer", "name", "theirs", "options", "tolerance"), PEERS)
def test_equals_pytorch_optimizer(
    peer: str, name: str, theirs: dict[str, Any], options: dict[str, Any], tolerance: float
) -> None:
    package = pytest.importorskip("pytorch_optimizer")
    params, others = leaves((3, 4), (5,)), leaves((3, 4), (5,))
    ours = OPTIMIZERS[name](params, **{"lr": 0.05, **options})
    other = getattr(package, peer)(others, lr=0.05, **theirs)
    for seed in range(50):
        step(ours, seed)
        step(other, seed)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance)


def test_adopt_equals_timm() -> None:
    package = pytest.importorskip("timm.optim")
    params, others = leaves((3, 4), (5,)), leaves((3, 4), (5,))
    ours = ADOPT(params, lr=0.05, weight_decay=0.1)
    other = package.Adopt(others, lr=0.05, weight_decay=0.1, clip_exp=0.25, decoupled=True)
    for seed in range(50):
        step(ours, seed)
        step(other, seed)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)
