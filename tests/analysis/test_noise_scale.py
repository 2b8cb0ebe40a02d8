"""The gradient noise scale against closed forms, and its standard error against the scatter of estimates."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from lightning_optim import OptionError
from lightning_optim.analysis.noise_scale import noise_scale
from lightning_optim.analysis.running_noise_scale import RunningNoiseScale
from tests.harness.ranks import run_ranks

SAMPLES = torch.tensor(
    [(1, 0), (0, 2), (3, 1), (-1, 1), (2, 2), (0, 1), (1, -1), (2, 0)], dtype=torch.float64, device="cpu"
)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(
    ("parts", "size", "signal", "trace", "estimate"),
    [
        (SAMPLES, 1, 1.214285714286, 2.785714285714, 2.294117647059),
        (SAMPLES.view(4, 2, 2).mean(1), 2, 1.333333333333, 1.833333333333, 1.375),
    ],
)
def test_worked_numbers(parts: Tensor, size: int, signal: float, trace: float, estimate: float) -> None:
    found = noise_scale(parts, size)
    assert (found.signal, found.trace, found.estimate) == pytest.approx((signal, trace, estimate), abs=1e-11)
    split = noise_scale([[part[:1], None, part[1:].view(1, 1)] for part in parts], [size] * len(parts))
    assert tuple(split) == pytest.approx(tuple(found), rel=1e-12)


@pytest.mark.parametrize("sizes", [[4] * 16, [1, 2, 4, 8] * 4])
def test_estimates_scatter_around_the_exact_value_by_their_standard_error(sizes: list[int]) -> None:
    """Of 300 batches; four standard errors of the mean, and the scatter within a quarter."""
    signal, spread = normal(0, 30) / 3, normal(1, 30).abs() / 2 + 0.2
    b = torch.tensor(sizes, dtype=torch.float64)
    noise = normal(2, 300, len(sizes), 30) * spread / b.sqrt()[:, None]
    found = [noise_scale(signal + one, b) for one in noise]
    for name, exact in (("trace", (spread**2).sum()), ("signal", (signal**2).sum())):
        values = torch.tensor([vars(one)[name] for one in found])
        errors = torch.tensor([vars(one)[f"{name}_error"] for one in found])
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(len(found))
        assert errors.square().mean().sqrt() == pytest.approx(float(values.std()), rel=0.35)
    ratios, errors = torch.tensor([tuple(one) for one in found]).T
    assert errors.square().mean().sqrt() == pytest.approx(float(ratios.std()), rel=0.35)


def test_units_do_not_matter_to_the_estimate() -> None:
    parts = normal(0, 8, 5) + 3
    found = noise_scale(parts, 4)
    for factor in (2.0**-400, 1024, 2.0**400):  # whose fourth power is no number any more
        other = noise_scale(parts * factor, 4)
        assert tuple(found) == tuple(other)
        assert found.trace_error * factor**2 == other.trace_error
        assert found.resolved is other.resolved is True
    assert noise_scale(list(parts.numpy()), 4) == found


def test_noise_that_hides_the_gradient_is_not_resolved() -> None:
    found = noise_scale(torch.tensor([[1.0, 0.0], [-1.0, 0.1]], dtype=torch.float64), 3)
    assert math.isnan(found.estimate)
    assert found.standard_error == math.inf
    assert not found.resolved
    assert found.signal < 0 < found.trace
    assert "not resolved" in str(found)


@pytest.mark.parametrize(
    ("parts", "sizes", "words"),
    [
        ([], 1, "0 parts given"),
        ([torch.ones(2)], 1, "1 part given"),
        ([torch.ones(2), torch.ones(3)], 1, "part 1 has other tensors"),
        ([[None], [None]], 1, "no part has a gradient"),
        ([torch.ones(2), torch.tensor([1.0, math.nan])], 1, "NaN or infinity"),
        ([torch.ones(2), torch.ones(2)], 0, "sizes=0 must be"),
        ([torch.ones(2), torch.ones(2)], [1, 2, 3], "for each of the 2 parts"),
        ([torch.ones(2), torch.ones(2)], None, "sizes=None must be"),
        ([torch.ones(2), torch.ones(2)], math.nan, "sizes=nan must be"),
        (None, 1, "gradients_of_parts holds None|0 parts|1 part"),
        ([{"w": torch.ones(2)}] * 2, 1, "gradients_of_parts holds 'w'; it must have one entry for each part"),
        (torch.ones(2, 3, dtype=torch.complex64), 1, "a real tensor"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(parts: Any, sizes: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        noise_scale(parts, sizes)


def test_shards_are_summed() -> None:
    whole = tuple(noise_scale([[part[:, 0], part[:, 1]] for part in 1 + normal(3, 6, 5, 2)], 2))
    for found in run_ranks(of_shards):
        assert found == pytest.approx(whole, rel=1e-12)


def of_shards() -> tuple[float, ...]:
    mesh = init_device_mesh("cpu", (2,))
    parts = [[distribute_tensor(part[:, 0], mesh, [Shard(0)]), part[:, 1]] for part in 1 + normal(3, 6, 5, 2)]
    return tuple(noise_scale(parts, 2))


def test_averages_resolve_what_single_measurements_do_not() -> None:
    """Against the plain mean at decay near 1, and the scatter over repetitions."""
    signals, traces = 1 + 3 * normal(0, 200, 400), 20 + 2 * normal(1, 200, 400)
    found = []
    for signal, trace in zip(signals.tolist(), traces.tolist(), strict=True):
        running = RunningNoiseScale(0.99)
        for one in zip(trace, signal, strict=True):
            running.add(*one)
        found.append(running.value)
        again = RunningNoiseScale(0.99)
        again.load(running.state())
        assert again.value == running.value
    estimates = torch.tensor([one.signal for one in found])
    errors = torch.tensor([one.signal_error for one in found])
    assert estimates.mean() == pytest.approx(1, abs=4 * float(estimates.std()) / math.sqrt(200))
    assert errors.mean() == pytest.approx(float(estimates.std()), rel=0.2)
