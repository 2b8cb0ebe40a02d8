"""The diagonal of the Hessian against the matrix itself, and R_med against worked numbers, whole and sharded."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from lightning_optim import OptionError
from lightning_optim.analysis.diagonal import Diagonal, hessian_diagonal, r_med
from lightning_optim.distributed.placement import is_dtensor
from tests.harness.ranks import run_ranks
from tests.harness.strategies import shard
from tests.harness.tiny_net import TinyNet, exact_hessian, loss_of, six


def estimate(probes: int, seed: int = 0, model: TinyNet | None = None) -> Diagonal:
    model = TinyNet() if model is None else model
    return hessian_diagonal(lambda: loss_of(model, six()), list(model.parameters()), probes, seed)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.reshape(-1) for x in tensors])


def test_worked_numbers_of_r_med() -> None:
    model = TinyNet()
    diagonal = exact_hessian(model, six()).diagonal()
    assert diagonal[:3].tolist() == pytest.approx([0.7388228512, 0.0104363926, 0.6688348835], abs=1e-10)
    parts = list(torch.split(diagonal, [p.numel() for p in model.parameters()]))
    found = r_med(parts)
    assert (float(found), found.largest, found.median) == pytest.approx((6.1091999718, 0.7388228512, 0.1209361053))
    assert (found.error, found.zeros, int((diagonal < 0).sum())) == (0, 0, 4)
    layers = [float(r_med([part])) for part in parts]
    assert layers == pytest.approx([4.2340978858, 2.0085733942, 1.2808239303, 1.1327785834], abs=1e-9)


@pytest.mark.parametrize("probes", [10, 100, 1000])
def test_errors_are_as_large_as_they_say(probes: int) -> None:
    """The root mean square error is 0.526 / sqrt(probes) in expectation; 31 elements know it to a third."""
    found = estimate(probes)
    error = flat(found) - exact_hessian(TinyNet(), six()).diagonal()
    assert error.square().mean().sqrt().item() == pytest.approx(0.526 / math.sqrt(probes), rel=0.4)
    assert (error / flat(found.standard_error)).square().mean().sqrt().item() == pytest.approx(1, abs=0.5)
    assert abs(r_med(found) - 6.1091999718) < 3 * r_med(found).error


def test_a_separable_loss_is_exact_after_one_probe() -> None:
    x = torch.tensor([0.0, 1.0, 2.0, -3.0], requires_grad=True)
    found = hessian_diagonal(lambda: (x**4).sum(), [x], probes=1)
    assert found[0].tolist() == [0, 12, 48, 108]
    assert found.standard_error[0].tolist() == [math.inf] * 4
    assert r_med(found).error == math.inf
    exact = r_med(hessian_diagonal(lambda: (x**4).sum(), [x], probes=2))
    assert (exact, exact.error, exact.zeros) == (108 / 30, 0, 1)
    assert r_med(found, nonzero_only=True) == 108 / 48


def test_a_median_of_zero_makes_it_infinite() -> None:
    found = r_med([torch.tensor([0.0, 0.0, 0.0, -2.0])])
    assert (found, found.zeros, found.largest) == (math.inf, 3, 2)
    with pytest.raises(OptionError, match="no element that is not zero"):
        r_med([torch.zeros(3)], nonzero_only=True)


def test_probes_leave_no_trace_and_can_be_repeated() -> None:
    model = TinyNet()
    before = torch.get_rng_state()
    one, again, other = (estimate(3, seed, model) for seed in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(flat(one), flat(again))
    assert not torch.equal(flat(one), flat(other))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: estimate(0), "hessian_diagonal: probes=0 must be an integer of at least 1"),
        (lambda: hessian_diagonal(lambda: torch.ones(()), []), "hessian_diagonal: params is empty"),
        (lambda: r_med([]), "must be a list of tensors"),
        (lambda: r_med([torch.tensor([1.0, math.nan])]), "not finite"),
    ],
)
def test_bad_input_gets_a_sentence(call: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        call()


def test_a_root_of_zero_is_not_differentiable_twice() -> None:
    x = torch.zeros(2, requires_grad=True)
    with pytest.raises(OptionError, match="is not finite"):
        hessian_diagonal(lambda: (x.abs() ** 1.5).sum(), [x], probes=1)


def spread_out() -> list[tuple[list[Tensor], list[float]]]:
    """Diagonal, error and R_med under DDP and FSDP2; ranks have different samples."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    x, y = six()
    mine = (x.chunk(2)[dist.get_rank()], y.chunk(2)[dist.get_rank()])
    found = []
    for sharded in (False, True):
        model = TinyNet()
        if sharded:
            shard(model, torch.nn.Linear, mesh)
        params = list(model.parameters())
        diagonal = hessian_diagonal(functools.partial(loss_of, model, mine), params, probes=5, products="differences")
        ratio = r_med(diagonal)
        whole = [t.full_tensor() if is_dtensor(t) else t for t in [*diagonal, *diagonal.standard_error]]
        found.append((whole, [float(ratio), ratio.error, ratio.median, float(r_med(diagonal.of(1)))]))
    return found


def test_ranks_find_the_same_as_one() -> None:
    """To the accuracy of central differences."""
    single = estimate(5)
    ratio = r_med(single)
    expected = [float(ratio), ratio.error, ratio.median, float(r_med(single.of(1)))]
    for of_rank in run_ranks(spread_out):
        for whole, ratios in of_rank:
            assert torch.allclose(flat(whole), flat([*single, *single.standard_error]), atol=1e-8)
            assert ratios == pytest.approx(expected, rel=1e-6)
