"""Every optimizer ends in the same parameters, however its tensors are spread over ranks.

The model has what goes wrong in practice: sizes that no number of ranks divides, ranks that hold no element of a
tensor, a frozen weight, a tied weight, and a branch that gets no gradient.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from docs.parts.facts import strategies
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.errors import OptionError
from tests.harness.nets import Odd
from tests.harness.ranks import run_ranks
from tests.harness.worlds import World, train, whole

Case = tuple[str, dict[str, Any], int]  # the optimizer, its options, and how many batches make a step

CASES: dict[str, Case] = {
    **{name: (name, {"lr": 0.01}, 1) for name in OPTIMIZERS},
    "adafactor": ("adafactor", {"lr": 0.01, "min_dim_size_to_factor": 1}, 1),
    "adan, clipped, accumulated": ("adan", {"lr": 0.01, "max_grad_norm": 0.05}, 2),
    "lamb, clipped, accumulated": ("lamb", {"lr": 0.01, "max_grad_norm": 0.05}, 2),
    "lars, with decay": ("lars", {"lr": 0.1, "weight_decay": 0.1}, 1),
    "muon, accumulated": ("muon", {"lr": 0.01}, 2),
    "muon, even rows": ("muon", {"lr": 0.01, "normalize_rows": True}, 1),
    "adamw, cautious": ("adamw", {"lr": 0.01, "weight_decay": 0.1, "cautious": True, "cautious_decay": True}, 2),
}
WORLDS: tuple[tuple[World, int], ...] = (("ddp", 2), ("fsdp1", 2), ("fsdp1 fused", 2), ("fsdp2", 2))
MORE: tuple[tuple[World, int], ...] = (
    ("fsdp1", 4),
    ("fsdp2", 4),
    ("hybrid fsdp1", 4),
    ("hybrid fsdp2", 4),
    ("tensor fsdp2", 4),
)
OF_MATRICES = dict.fromkeys(("soap", "muon, even rows"), "checkpoints of FSDP1 cannot hold")
ON_TWO_CUTS = dict.fromkeys(("muon", "muon, accumulated", "muon, even rows", "soap"), "split along two dimensions")
REFUSED = {
    "tensor fsdp2": ON_TWO_CUTS,
    "fsdp1": {"adafactor": "row and column means, and FSDP1 splits", **OF_MATRICES},
    "hybrid fsdp1": {"adafactor": "row and column means, and FSDP1 splits", **OF_MATRICES},
    "fsdp1 fused": dict.fromkeys(("muon", "muon, accumulated", "muon, even rows"), "so there are no matrices")
    | dict.fromkeys(
        (
            "adafactor",
            "koala_m",
            "koala_v",
            "lamb",
            "lamb, clipped, accumulated",
            "lars",
            "lars, with decay",
            "adamw, cautious",
            "mars",
            "soap",
        ),
        "use_orig_params=False shows flat parameters",
    ),
}
# Sums in another order differ in the last bits of float64; KOALA's recursion and five steps multiply that.
TOLERANCE = 1e-8


def options_of(world: World, options: dict[str, Any]) -> dict[str, Any]:
    """Fused parameters cannot be told apart, so there all are treated alike."""
    return {**options, "no_decay": [], "full_precision": []} if world == "fsdp1 fused" else options


def spread_out(world: World, cases: dict[str, Case], dtype: torch.dtype) -> dict[str, Any]:
    """What each case ends in on this rank: parameters, or the words of a refusal."""
    dist.init_process_group("gloo")
    found: dict[str, Any] = {}
    for label, (name, options, batches) in cases.items():
        try:
            found[label] = train(world, name, options_of(world, options), dtype, accumulate=batches)
        except (RuntimeError, OptionError) as error:  # noqa: PERF203
            found[label] = str(error)
    dist.destroy_process_group()
    return found


@functools.cache
def alone(label: str, fused: bool) -> dict[str, Tensor]:
    name, options, batches = CASES[label]
    own = options_of("fsdp1 fused" if fused else "single", options)
    return train("single", name, own, accumulate=batches)


def check(world: World, ranks: int) -> None:
    start = whole(Odd(torch.float64))
    refused = REFUSED.get(world, {})
    for found in run_ranks(spread_out, world, CASES, torch.float64, world_size=ranks, timeout=400):
        for label, got in found.items():
            if label in refused:
                assert refused[label] in got, label
                continue
            assert isinstance(got, dict), (label, got)
            right = alone(label, world == "fsdp1 fused")
            moved = {name for name, value in right.items() if not torch.equal(value, start[name])}
            assert {"inward.weight", "large.weight", "square.weight"} <= moved
            assert not moved & {"frozen.weight", "frozen.bias", "unused.weight"}
            for name, value in right.items():
                torch.testing.assert_close(got[name], value, rtol=TOLERANCE, atol=TOLERANCE, msg=f"{label}, {name}")


def test_pages_of_optimizers_say_what_is_refused() -> None:
    words = {
        **{"ddp": "DDP", "fsdp1": "FSDP1", "fsdp1 fused": "FSDP1, `use_orig_params=False`"},
        **{"fsdp2": "FSDP2", "tensor fsdp2": "FSDP2 with tensor parallelism"},
    }
    for world, strategy in words.items():
        said = {name for name, cls in OPTIMIZERS.items() if strategies(cls)[strategy]}
        assert said == OPTIMIZERS.keys() & REFUSED.get(world, {}).keys(), world


@pytest.mark.timeout(400)
@pytest.mark.parametrize(("world", "ranks"), WORLDS)
def test_every_optimizer_ends_where_one_process_does(world: World, ranks: int) -> None:
    check(world, ranks)


@pytest.mark.full
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "ranks"), MORE)
def test_on_more_ranks_and_meshes(world: World, ranks: int) -> None:
    check(world, ranks)


QUANTIZED: dict[str, Case] = {
    name: (name, {"lr": 0.01, "state_bits": 8, "full_precision": []}, 1) for name in ("adamw", "adan", "lamb", "pnm")
}


@pytest.mark.timeout(200)
@pytest.mark.parametrize("world", ["ddp", "fsdp1", "fsdp2"])
def test_state_in_8_bits(world: World) -> None:
    """As far from 32 bits as one process in 8 bits is, to a factor of 2 in the median over elements.

    Pieces have blocks of their own, and so other codes; elements with tiny second moments then go their own ways.

    The tensor that is kept in codes has 4316 elements, and its pieces have less than the 4096 from which on there are
    codes: what counts is the whole tensor.
    """
    for found in run_ranks(spread_out, world, QUANTIZED, torch.float32, timeout=150):
        for label, got in found.items():
            name, options, batches = QUANTIZED[label]
            right = train("single", name, options, torch.float32, accumulate=batches)
            exact = train("single", name, {**options, "state_bits": 32}, torch.float32, accumulate=batches)
            errors = [(run["large.weight"] - exact["large.weight"]).abs().median() for run in (right, got)]
            assert 0.5 * errors[0] < errors[1] < 2 * errors[0], (label, errors)
            torch.testing.assert_close(got["inward.weight"], exact["inward.weight"], rtol=0.02, atol=0.002)


DISTANCES = {"prodigy": {"d0": 1e-4}, "prodigy, safe": {"d0": 1e-4, "safeguard_warmup": True, "weight_decay": 0.1}}


def distances(world: World, options: dict[str, Any]) -> list[float]:
    """d after each step on this rank."""
    found: list[float] = []
    train(world, "prodigy", options, steps=12, watch=lambda made: found.append(float(made.param_groups[0]["d"])))
    return found


def distances_in(world: World) -> dict[str, list[float]]:
    dist.init_process_group("gloo")
    return {label: distances(world, options_of(world, options)) for label, options in DISTANCES.items()}


@pytest.mark.parametrize("world", ["ddp", "fsdp1", "fsdp1 fused", "fsdp2"])
def test_prodigy_finds_the_same_distance_everywhere(world: World) -> None:
    """To ten digits after every step, on ranks without an element of a tensor too."""
    for found in run_ranks(distances_in, world, timeout=150):
        for label, options in DISTANCES.items():
            right = distances("single", options_of("fsdp1 fused" if "fused" in world else "single", options))
            assert right[-1] > 20 * right[0]
            assert found[label] == pytest.approx(right, rel=1e-10)
