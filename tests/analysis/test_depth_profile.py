"""Slopes, ratios and verdicts of profiles: by hand, and of networks whose arrangement is known."""

from __future__ import annotations

import json
import math
import re
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lightning_optim.analysis.blocks import find_stacks
from lightning_optim.analysis.depth_profile import DepthProfile
from lightning_optim.nn import TransformerBlock
from lightning_optim.training.block_norms import Look


def profile(norms: tuple[float, ...], residual: tuple[float, ...] = ()) -> DepthProfile:
    return DepthProfile(3, "blocks", tuple(map(str, range(len(norms)))), {"block": norms}, residual)


def test_slope_and_ratio_are_those_of_numpy() -> None:
    norms, residual = (0.9, 0.4, 0.7, 0.2, 0.1), (1.0, 1.7, 2.1, 3.9, 4.0)
    found = profile(norms, residual)
    assert found.slope("block") == pytest.approx(np.polyfit(range(5), np.log(norms), 1)[0], rel=1e-12)
    assert found.growth() == pytest.approx(np.polyfit(range(5), residual, 1)[0], rel=1e-12)
    assert found.last_over_first("block") == pytest.approx(1 / 9)
    some = profile((0.9, math.nan, 0.7, 0.0, 0.1))
    assert some.slope("block") == pytest.approx(np.polyfit([0, 2, 4], np.log([0.9, 0.7, 0.1]), 1)[0], rel=1e-12)


RISING, FALLING, FLAT = (0.2, 0.3, 0.4, 0.6, 0.8), (0.8, 0.6, 0.4, 0.3, 0.2), (0.5, 0.6, 0.5, 0.4, 0.5)
GROWING, CONSTANT = (1.6, 2.3, 3.2, 4.1, 5.0), (1.0, 1.0, 1.1, 1.0, 1.0)


@pytest.mark.parametrize(
    ("norms", "residual", "pattern"),
    [
        (FALLING, GROWING, "pre"),
        (RISING, CONSTANT, "post"),
        (FLAT, CONSTANT, "post"),
        (RISING, GROWING, "neither"),
        (FALLING, CONSTANT, "neither"),
        (FALLING, GROWING[::-1], "neither"),
        ((0.53, 0.49), (1.6, 2.32), "pre"),  # the residual decides
        ((0.57, 0.53), (1.0, 1.0), "post"),
        (FALLING, (), "unknown"),
        ((0.5,), (1.0,), "unknown"),
        ((math.nan,) * 5, GROWING, "unknown"),
    ],
)
def test_patterns(norms: tuple[float, ...], residual: tuple[float, ...], pattern: str) -> None:
    found = profile(norms, residual)
    assert found.pattern() == pattern
    words = {
        "pre": "trains without a warm-up",
        "post": "needs a warm-up",
        "neither": "neither",
        "unknown": "no verdict",
    }
    assert words[pattern] in found.verdict()
    assert ("the residual alone decides" in found.verdict()) == (len(norms) == 2)


@pytest.mark.parametrize("residual", [(1.6, math.nan, 3.2, 4.1, 5.0), (math.nan, 2.3, 3.2, 4.1, 5.0)])
def test_a_block_that_was_not_seen(residual: tuple[float, ...]) -> None:
    """As under stochastic depth: sentence and pattern are those of the other blocks."""
    found = profile(FALLING, residual)
    assert found.pattern() == "pre"
    assert "nan" not in found.verdict()
    assert re.search(r"grows \((1.6|2.3) to 5\)", found.verdict())


def test_a_profile_survives_a_file() -> None:
    found = profile(FALLING, GROWING)
    assert DepthProfile.of_plain(json.loads(json.dumps(found.as_plain()))) == found


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("depth", [2, 6, 16])
def test_networks_of_the_paper(norm: Literal["pre", "post"], depth: int) -> None:
    """The setting of the theory: Xavier weights, an inner size of the width, a loss on random labels."""
    torch.manual_seed(0)
    blocks = [TransformerBlock(64, 4, norm, mlp_ratio=1, activation="relu") for _ in range(depth)]
    net = nn.Sequential(*blocks, nn.LayerNorm(64) if norm == "pre" else nn.Identity(), nn.Linear(64, 50))
    look = Look(find_stacks(net), 0)
    look.residuals.open()
    for _ in range(3):
        loss = cross_entropy(net(torch.randn(8, 16, 64)).flatten(0, 1), torch.randint(50, (128,)))
        look.begin_pass()
        look.read(look.params, torch.autograd.grad(loss, look.params))
    look.residuals.close()
    [found] = look.profiles()
    assert found.pattern() == norm
    assert found.part == "feed_forward_output"
    assert len(found.residual) == depth
