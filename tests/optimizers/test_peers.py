"""Ours against independent libraries: where they agree, and by how much they differ where they do not.

A disagreement that is pinned here is a decision, not a bug: the other library errs, or follows another convention,
and the size of the difference says which. Whoever "fixes" ours in its direction meets a test.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_optim.core.optimizer import OPTIMIZERS
from tests.harness.driver import Array, run
from tests.harness.problems import gradients, make_params
from tests.optimizers.goldens import (
    FIVE_GRADIENTS,
    MATRIX,
    MATRIX_GRADIENTS,
    TINY_MATRIX_GRADIENTS,
    VECTOR,
    VECTOR_GRADIENTS,
    Tensors,
)

ADABELIEF, LION = "adabelief_pytorch.AdaBelief", "lion_pytorch.Lion"
DISTRIBUTIONS = {
    "adabelief_pytorch": "adabelief-pytorch",
    "lion_pytorch": "lion-pytorch",
    "pytorch_optimizer": "pytorch_optimizer",
    "torch_optimizer": "torch-optimizer",
}
STEPS = 40
SHAPES = ((), (5,), (3, 4), (4, 2, 3, 3))
MATRICES, VECTORS = SHAPES[2:], SHAPES[1:]


def peer(name: str) -> Any:
    """A class of another library, by `module.Class`; the test is skipped where that is not installed."""
    module, _, cls = name.rpartition(".")
    reason = f"{DISTRIBUTIONS.get(module, module)} is not installed"
    return getattr(pytest.importorskip(module, reason=reason), cls)


def po(name: str) -> str:
    return f"pytorch_optimizer.{name}"


# ---------------------------------------------------------------------------------------------- agreement


@dataclass(frozen=True)
class Case:
    """An optimizer of ours and one of another library that are the same algorithm under these options.

    Attributes:
        name: Ours.
        peer: Theirs, as `module.Class`.
        ours: Options that only ours has, or that it calls by another name.
        theirs: The same for theirs.
        both: Options that both have.
        shapes: What the peer can serve, or serves as we do.
        scheduled: Whether the rate may change from step to step.
        tolerance: Largest difference of a parameter over all steps.
    """

    name: str
    peer: str
    ours: dict[str, Any] = field(default_factory=dict)
    theirs: dict[str, Any] = field(default_factory=dict)
    both: dict[str, Any] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    scheduled: bool = True
    tolerance: float = 1e-13

    def __str__(self) -> str:
        words = {**self.both, **self.ours}
        return ",".join([self.peer, *(f"{key}={value}" for key, value in words.items())])


DECAY: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
PLAIN: dict[str, Any] = {"lr": 0.01}
CENTRED = {**DECAY, "betas": (0.8, 0.95)}
DECOUPLED: dict[str, Any] = {"decoupled_weight_decay": True}
AMS: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.9), "eps": 1e-8}
QUIET: dict[str, Any] = {"print_change_log": False}
PAPER: dict[str, Any] = {"mode": "paper"}
EXTERNAL: dict[str, Any] = {"lr": 0.01, "relative_step": False, "scale_parameter": False}
NO_MOMENTUM: dict[str, Any] = {"betas": (None, 0.999)}
SIGNUM: dict[str, Any] = {"betas": (0.9, 0.0), "eps": 0.0}
NO_DEBIAS: dict[str, Any] = {"bias_correction": False, "always_adapt": True}
WIDE = {"clamp_value": 1e4}  # the lineage clamps the norm of the weights at 10

CASES = [
    Case("adamw", po("AdamW"), both=DECAY),
    Case("adamax", po("AdaMax"), both=DECAY),
    Case("radam", po("RAdam"), DECOUPLED, {"degenerated_to_sgd": True}, DECAY),
    Case("radam", po("RAdam"), {**DECOUPLED, "fallback": "skip"}, {}, DECAY),
    Case("radam", po("RAdam"), {"threshold": 4.0}, {"degenerated_to_sgd": True, "n_sma_threshold": 4}, PLAIN),
    Case("adabelief", po("AdaBelief"), both={**CENTRED, "rectify": True, "eps": 1e-16}),
    Case("adabelief", po("AdaBelief"), both={**CENTRED, "rectify": False, "eps": 1e-8}),
    Case("adabelief", po("AdaBelief"), {"amsgrad": True}, {"ams_bound": True}, {**AMS, "rectify": True}),
    Case("adabelief", ADABELIEF, {}, QUIET, {**DECAY, "rectify": True, "eps": 1e-16}),
    Case("adabelief", ADABELIEF, {}, QUIET, {**DECAY, "rectify": False, "eps": 1e-16}),
    Case("adabelief", ADABELIEF, {}, QUIET, {**CENTRED, "rectify": True, "eps": 1e-8}),
    Case("adabelief", ADABELIEF, {}, QUIET, {**AMS, "rectify": False, "amsgrad": True}),
    Case("adabelief", ADABELIEF, {"decoupled": False}, {**QUIET, "weight_decouple": False}, {**DECAY, "eps": 1e-8}),
    Case("adan", po("Adan"), both=DECAY),
    Case("adan", po("Adan"), {"no_prox": True}, {"weight_decouple": True}, DECAY),
    # its norm over all gradients is computed in float32 (6e-8 of it); it cannot clip tensors without an axis
    Case("adan", po("Adan"), both={**DECAY, "max_grad_norm": 0.5}, shapes=VECTORS, tolerance=2e-8),
    Case("pnm", po("PNM"), both=DECAY),
    Case("pnm", po("PNM"), {"decoupled": False}, {"weight_decouple": False}, {**DECAY, "betas": (0.8, 0.5)}),
    # without eps AdaPNM and diffGrad are the same but for the 1e-15 that theirs adds to the mean square
    Case("adapnm", po("AdaPNM"), both={**DECAY, "eps": 0.0}, tolerance=1e-9),
    Case("diffgrad", po("DiffGrad"), {}, {"weight_decouple": False}, DECAY, tolerance=1e-11),
    Case("diffgrad", "torch_optimizer.DiffGrad", both=DECAY),
    Case("sgdw", po("SGDW"), both={**DECAY, "momentum": 0.9}),
    Case("sgdw", po("SGDW"), both={**DECAY, "momentum": 0.9, "nesterov": True}),
    Case("sgdw", po("SGDW"), both={**DECAY, "momentum": 0.8, "dampening": 0.3}),
    Case("sgdw", po("SGDW"), both={**DECAY, "momentum": 0.0}),
    Case("lars", po("LARS"), both={"lr": 0.5, "weight_decay": 0.1}, shapes=MATRICES, scheduled=False),
    Case("lars", po("LARS"), {"lr_inside_buffer": False}, {}, {"lr": 0.5, "weight_decay": 0.1}, shapes=MATRICES),
    Case("lars", po("LARS"), both={"lr": 0.01, "weight_decay": 0.0, "nesterov": True}, scheduled=False),
    Case("generalized_signsgd", po("SignSGD"), SIGNUM, {"momentum": 0.9}, PLAIN),
    Case("generalized_signsgd", po("SignSGD"), {**SIGNUM, "decoupled": True}, {"momentum": 0.9}, DECAY),
    Case("padam", po("PAdam"), {"amsgrad": False}, {}, {**DECAY, "partial": 0.125}),
    Case("padam", po("PAdam"), {"amsgrad": False, "decoupled": True}, {"weight_decouple": True}, DECAY),
    Case("adafactor", po("AdaFactor"), PAPER, NO_MOMENTUM, {"weight_decay": 0.1}, scheduled=False),
    Case("adafactor", po("AdaFactor"), {**PAPER, "d": 1.5}, {**NO_MOMENTUM, "clip_threshold": 1.5}, EXTERNAL),
    Case("adafactor", po("AdaFactor"), PAPER, NO_MOMENTUM, {"warmup_init": True}, scheduled=False),
    Case(
        "adafactor",
        po("AdaFactor"),
        {**PAPER, "beta1": 0.9, "beta2_decay": -0.6, "eps": (1e-2, 0.5)},
        {"betas": (0.9, 0.999), "decay_rate": -0.6, "eps1": 1e-2, "eps2": 0.5, "momentum_dtype": torch.float64},
        {"weight_decay": 0.1},
        scheduled=False,
    ),
    Case("lion", po("Lion"), both=DECAY),
    Case("lion", LION, both={**DECAY, "betas": (0.8, 0.95)}),
    Case("lamb", "torch_optimizer.Lamb", NO_DEBIAS, WIDE, {**DECAY, "eps": 1e-6}),
    Case("lamb", "torch_optimizer.Lamb", {**NO_DEBIAS, "phi": (0.0, 2.0)}, {"clamp_value": 2}, DECAY),
]


def together(
    ours: torch.optim.Optimizer, theirs: torch.optim.Optimizer, grads: Sequence[Tensor], factor: float, lr: float
) -> float:
    """One step of both on the same gradients, each on copies of its own; the largest difference after it."""
    pairs = [[p for group in one.param_groups for p in group["params"]] for one in (ours, theirs)]
    for optimizer, params in zip((ours, theirs), pairs, strict=True):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad.clone()  # several peers write into it
        if factor != 1.0:
            optimizer.param_groups[0]["lr"] = lr * factor
        optimizer.step()
    return max(float((p.detach() - q.detach()).abs().max()) for p, q in zip(*pairs, strict=True))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_agrees(case: Case) -> None:
    """Over random gradients of three magnitudes, in float64, the rate falling and rising where the peer can."""
    theirs = peer(case.peer)(make_params(case.shapes), **case.both, **case.theirs)
    ours = OPTIMIZERS[case.name](make_params(case.shapes), **case.both, **case.ours)
    lr = float(ours.defaults["lr"])
    worst = 0.0
    for k, grads in enumerate(gradients(STEPS, case.shapes)):
        factor = 1.1 + math.cos(k) if case.scheduled else 1.0
        worst = max(worst, together(ours, theirs, grads, factor, lr))
    assert worst < case.tolerance


# ---------------------------------------------------------------------------------------------- disagreement


def gap(one: Sequence[Array], other: Sequence[Array]) -> float:
    """The largest difference over all steps."""
    return max(float(np.abs(p - q).max()) for p, q in zip(one, other, strict=True))


def size(one: Sequence[Array], other: Sequence[Array]) -> str:
    """The largest difference over all steps, in two digits."""
    return f"{gap(one, other):.1e}"


def ours(
    name: str,
    options: dict[str, Any],
    params: Tensors = VECTOR,
    grads: Sequence[Tensors] = VECTOR_GRADIENTS,
    steps: int | None = None,
    lrs: Sequence[float] | None = None,
    losses: Sequence[tuple[float, float]] | None = None,
) -> list[Array]:
    """Our iterates on the golden problem, whose gradients repeat."""
    arrays = [[np.array(g) for g in each] for each in itertools.islice(itertools.cycle(grads), steps or len(grads))]
    history = run(name, [np.array(p) for p in params], arrays, lrs=lrs, losses=losses, **options)
    return [iterate for (iterate,) in history]


def theirs(
    name: str,
    options: dict[str, Any],
    params: Tensors = VECTOR,
    grads: Sequence[Tensors] = VECTOR_GRADIENTS,
    sign: float = 1.0,
) -> list[Array]:
    """A peer's iterates on the golden problem."""
    p = torch.nn.Parameter(torch.tensor(params[0], dtype=torch.float64))
    optimizer = peer(name)([p], **options)
    iterates = []
    for (grad,) in grads:
        p.grad = sign * torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        iterates.append(p.detach().numpy().copy())
    return iterates


STEP: dict[str, Any] = {"lr": 0.1}


def test_adan_of_pytorch_optimizer_starts_wrong_when_it_maximizes() -> None:
    """Its previous gradient is taken before the sign is flipped, so the first change is -2g."""
    up = {**STEP, "maximize": True}
    assert gap(ours("adan", STEP), theirs(po("Adan"), STEP)) < 1e-14
    assert size(ours("adan", STEP), theirs(po("Adan"), up, sign=-1.0)) == "4.9e-02"
    negated = [tuple((-np.array(g)).tolist() for g in grads) for grads in VECTOR_GRADIENTS]
    assert gap(ours("adan", STEP), ours("adan", up, grads=negated)) < 1e-14


def test_adan_of_pytorch_optimizer_clips_by_a_float32_norm() -> None:
    clip = {**STEP, "max_grad_norm": 0.3}
    torch.set_default_dtype(torch.float64)
    try:
        assert size(ours("adan", clip), theirs(po("Adan"), clip)) == "1.5e-09"
    finally:
        torch.set_default_dtype(torch.float32)


def test_adapnm_of_pytorch_optimizer_divides_eps_by_the_bias_correction() -> None:
    assert size(ours("adapnm", STEP), theirs(po("AdaPNM"), STEP)) == "5.2e-07"


def test_pnm_of_pytorch_optimizer_swaps_its_momenta_after_a_missed_step() -> None:
    """Its counter is the group's: a tensor that misses a step feeds the wrong momentum from then on."""

    def second_misses(optimizer: Any, params: list[Tensor]) -> Array:
        for k in range(4):
            for p in params:
                p.grad = torch.tensor(VECTOR_GRADIENTS[k % 3][0], dtype=torch.float64)
            if k == 1:
                params[1].grad = None
            optimizer.step()
        return params[1].detach().numpy()

    def params() -> list[Tensor]:
        return [torch.nn.Parameter(torch.tensor(VECTOR[0], dtype=torch.float64)) for _ in range(2)]

    mine, other = params(), params()
    a = second_misses(OPTIMIZERS["pnm"](mine, lr=0.1), mine)  # type: ignore[call-arg]
    b = second_misses(peer(po("PNM"))(other, lr=0.1), other)
    assert 1e-4 < float(np.abs(a - b).max()) < 1e-2
    alone = ours("pnm", STEP, grads=(VECTOR_GRADIENTS[0], VECTOR_GRADIENTS[2], VECTOR_GRADIENTS[0]))
    assert gap([a], alone[-1:]) < 1e-14


def test_diffgrad_of_pytorch_optimizer_adds_to_the_mean_square() -> None:
    assert size(ours("diffgrad", STEP), theirs(po("DiffGrad"), STEP)) == "2.6e-12"


def test_lamb_of_pytorch_optimizer_decays_outside_the_ratio() -> None:
    """And corrects the first moment only, and clamps the norm of the weights."""
    decay = {**STEP, "weight_decay": 0.01}
    assert size(ours("lamb", decay), theirs(po("Lamb"), decay)) == "1.4e+00"


def test_lamb_of_torch_optimizer_has_no_bias_correction() -> None:
    decay = {**STEP, "weight_decay": 0.01}
    assert size(ours("lamb", decay), theirs("torch_optimizer.Lamb", decay)) == "2.6e-03"
    assert gap(ours("lamb", {**decay, "bias_correction": False}), theirs("torch_optimizer.Lamb", decay)) < 1e-14


def test_lars_of_pytorch_optimizer_leaves_vectors_alone() -> None:
    """Neither ratio nor decay; ours leaves vectors alone in a model that has matrices, and decays them."""
    decay = {**STEP, "weight_decay": 1e-4}
    assert size(ours("lars", decay), theirs(po("LARS"), decay)) == "8.2e-02"


def test_padam_of_pytorch_optimizer_has_no_running_maximum() -> None:
    options = {**STEP, "betas": (0.9, 0.9), "partial": 0.125}
    found = theirs(po("PAdam"), options, grads=FIVE_GRADIENTS)
    assert size(ours("padam", options, grads=FIVE_GRADIENTS), found) == "6.2e-04"
    assert gap(ours("padam", {**options, "amsgrad": False}, grads=FIVE_GRADIENTS), found) < 1e-14


def test_radam_of_pytorch_optimizer_skips_its_first_steps() -> None:
    assert size(ours("radam", STEP), theirs(po("RAdam"), STEP)) == "2.1e-02"


def test_signsgd_has_no_eps() -> None:
    """The limit of generalized SignSGD; its eps of 1e-8, against a momentum of 0.01 at first, is the difference."""
    limit = {**STEP, "betas": (0.9, 0.0)}
    assert size(ours("generalized_signsgd", limit), theirs(po("SignSGD"), {**STEP, "momentum": 0.9})) == "1.0e-07"


@pytest.mark.parametrize(
    ("params", "grads", "difference"),
    [(VECTOR, VECTOR_GRADIENTS, "1.9e-02"), (MATRIX, MATRIX_GRADIENTS, "3.7e-02")],
)
def test_adafactor_of_pytorch_optimizer_has_momentum_by_default(
    params: Tensors, grads: Sequence[Tensors], difference: str
) -> None:
    found = theirs(po("AdaFactor"), {}, params, grads)
    assert size(ours("adafactor", PAPER, params, grads), found) == difference


def test_adafactor_of_torch_damps_tiny_gradients() -> None:
    """Its eps1 is a floor near the precision of the dtype, where the paper's 1e-30 leaves the update at unit size."""
    torchs = theirs("torch.optim.Adafactor", {}, MATRIX, TINY_MATRIX_GRADIENTS)
    assert gap(ours("adafactor", {}, MATRIX, TINY_MATRIX_GRADIENTS), torchs) < 1e-14
    assert size(ours("adafactor", PAPER, MATRIX, TINY_MATRIX_GRADIENTS), torchs) == "2.6e-03"
    plain = ours("adafactor", PAPER, MATRIX, MATRIX_GRADIENTS)
    assert gap(ours("adafactor", PAPER, MATRIX, TINY_MATRIX_GRADIENTS), plain) < 1e-12


def test_adafactor_of_torch_takes_one_eps1_for_all_dtypes() -> None:
    """That of the first tensor: a float32 tensor behind a bfloat16 one moves by a quarter of what it should."""

    def moved(cls: Any, *dtypes: torch.dtype) -> float:
        params = [torch.nn.Parameter(torch.ones(4, dtype=dtype)) for dtype in dtypes]
        for p in params:
            p.grad = torch.full((4,), 2.0**-9, dtype=p.dtype)
        cls(params).step()
        return float((1 - params[-1].detach().double()).max())

    theirs, ours = torch.optim.Adafactor, OPTIMIZERS["adafactor"]
    alone = moved(theirs, torch.float32)
    assert moved(ours, torch.float32) == moved(ours, torch.bfloat16, torch.float32) == pytest.approx(alone, rel=1e-5)
    assert moved(theirs, torch.bfloat16, torch.float32) == pytest.approx(alone / 4, rel=1e-5)


def test_adabelief_package_forgets_amsgrad_when_it_rectifies() -> None:
    """Its rectified branch reads the mean square instead of the largest one; ours and pytorch_optimizer's do not."""
    options = {**AMS, "amsgrad": True, "rectify": True}

    def difference(amsgrad: bool) -> float:
        official = peer(ADABELIEF)(make_params(SHAPES), **options, **QUIET)
        mine = OPTIMIZERS["adabelief"](make_params(SHAPES), **{**options, "amsgrad": amsgrad})
        return max(together(mine, official, grads, 1.0, 0.01) for grads in gradients(STEPS, SHAPES))

    assert difference(amsgrad=False) < 1e-13
    assert difference(amsgrad=True) > 1e-2


def test_centred_rmsprop_of_torch_takes_roots_of_negative_numbers() -> None:
    """Where gradients hardly change, what is left of the mean square is rounding error; ours stops at zero."""

    def last(cls: Any) -> Tensor:
        p = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
        optimizer = cls([p], lr=1e-3, centered=True, eps=1e-3)
        grad = torch.linspace(0.1, 3.0, 64).bfloat16()
        for _ in range(500):
            p.grad = grad.clone()
            optimizer.step()
        return p.detach()

    assert torch.isnan(last(torch.optim.RMSprop)).any()
    assert torch.isfinite(last(OPTIMIZERS["rmsprop"])).all()


# ---------------------------------------------------------------------------------------------- conventions

Rule = Callable[[Array, Array, dict[str, Any], int], Array]


def literal(rule: Rule, grads: Sequence[Tensors] = VECTOR_GRADIENTS, steps: int | None = None) -> list[Array]:
    """The iterates of a rule written out here, on the golden vector."""
    p, iterates = np.array(VECTOR[0]), []
    state: dict[str, Any] = {}
    cycle = itertools.islice(itertools.cycle(grads), steps or len(grads))
    for t, (grad,) in enumerate(cycle, start=1):
        p = rule(p, np.array(grad), state, t)
        iterates.append(p)
    return iterates


def ema(state: dict[str, Any], name: str, x: Any, beta: float, start: float = 0.0) -> Any:
    state[name] = beta * state.get(name, start) + (1 - beta) * x
    return state[name]


def test_amsgrad_of_optax_takes_the_maximum_of_the_corrected_mean_square() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int, b2: float = 0.999) -> Array:
        m, v = ema(s, "m", g, 0.9) / (1 - 0.9**t), ema(s, "v", g * g, b2) / (1 - b2**t)
        s["max"] = np.maximum(s.get("max", 0.0), v)
        return np.asarray(p - 0.1 * m / (np.sqrt(s["max"]) + 1e-8))

    ams: dict[str, Any] = {**STEP, "amsgrad": True}
    assert size(ours("adam", ams), literal(rule)) == "4.8e-03"
    fast = literal(lambda p, g, s, t: rule(p, g, s, t, 0.9), FIVE_GRADIENTS)
    assert size(ours("adam", {**ams, "betas": (0.9, 0.9)}, grads=FIVE_GRADIENTS), fast) == "1.4e-02"


def test_adam_of_tensorflow_adds_eps_before_the_correction() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int) -> Array:
        m, v = ema(s, "m", g, 0.9), ema(s, "v", g * g, 0.999)
        return np.asarray(p - 0.1 * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (np.sqrt(v) + 0.01))

    assert size(ours("adam", {**STEP, "eps": 0.01}), literal(rule)) == "6.7e-02"


def test_adamax_of_the_paper_has_no_eps() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int) -> Array:
        m, s["u"] = ema(s, "m", g, 0.9), np.maximum(0.999 * s.get("u", 0.0), np.abs(g))
        return np.asarray(p - 0.1 / (1 - 0.9**t) * m / s["u"])

    assert size(ours("adamax", STEP), literal(rule)) == "1.0e-08"


def test_radam_of_optax_adds_eps_after_the_correction() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int) -> Array:
        m, v = ema(s, "m", g, 0.9) / (1 - 0.9**t), ema(s, "v", g * g, 0.999) / (1 - 0.999**t)
        last = 2 / (1 - 0.999) - 1
        rho = last - 2 * t * 0.999**t / (1 - 0.999**t)
        if rho <= 5:
            return np.asarray(p - 0.1 * m)
        r = math.sqrt((rho - 4) * (rho - 2) * last / ((last - 4) * (last - 2) * rho))
        return np.asarray(p - 0.1 * r * m / (np.sqrt(v) + 1e-8))

    assert size(ours("radam", STEP, steps=8), literal(rule, steps=8)) == "1.5e-09"


def test_adan_of_optax_weighs_the_change_by_the_other_beta() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int, weight: float) -> Array:
        change = g - s.get("g", g)
        m, d = ema(s, "m", g, 0.98), ema(s, "d", change, 0.92)
        n = ema(s, "n", (g + weight * change) ** 2, 0.99)
        s["g"] = g
        u = m / (1 - 0.98**t) + weight * d / (1 - 0.92**t)
        return np.asarray(p - 0.1 * u / (np.sqrt(n / (1 - 0.99**t)) + 1e-8))

    assert gap(ours("adan", STEP), literal(lambda p, g, s, t: rule(p, g, s, t, 0.92))) < 1e-14
    assert size(ours("adan", STEP), literal(lambda p, g, s, t: rule(p, g, s, t, 0.08))) == "2.8e-02"


def test_adan_of_the_paper_starts_at_the_first_gradient() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int) -> Array:
        change = g - s.get("g", g)
        s["g"] = g
        m = s["m"] = g if t == 1 else 0.98 * s["m"] + 0.02 * g
        d = ema(s, "d", change, 0.92)
        n = s["n"] = g * g if t == 1 else 0.99 * s["n"] + 0.01 * (g + 0.92 * change) ** 2
        return np.asarray(p - 0.1 * (m + 0.92 * d) / (np.sqrt(n) + 1e-8))

    assert size(ours("adan", STEP), literal(rule)) == "2.4e-01"


def test_diffgrad_of_the_paper_and_of_version_1() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int, paper: bool) -> Array:
        m, v = ema(s, "m", g, 0.9) / (1 - 0.9**t), ema(s, "v", g * g, 0.999)
        before = s.get("g", 0.0) if paper or t == 1 else g  # version 1 keeps a reference to the buffer of g
        s["g"] = g
        m = m / (1 + np.exp(-np.abs(before - g)))
        root = math.sqrt(1 - 0.999**t)
        return np.asarray(p - 0.1 * m / (np.sqrt(v) / root + 1e-8 / (1.0 if paper else root)))

    assert size(ours("diffgrad", STEP), literal(lambda p, g, s, t: rule(p, g, s, t, True))) == "1.6e-07"
    assert size(ours("diffgrad", STEP), literal(lambda p, g, s, t: rule(p, g, s, t, False))) == "8.7e-03"


def test_lars_of_tensorflow_takes_the_norm_of_the_sum() -> None:
    def rule(p: Array, g: Array, s: dict[str, Any], t: int) -> Array:
        d = g + 1e-4 * p
        r = 1e-3 * np.linalg.norm(p) / np.linalg.norm(d)
        s["b"] = 0.9 * s.get("b", 0.0) + 0.1 * r * d
        return np.asarray(p - s["b"])

    assert size(ours("lars", {**STEP, "weight_decay": 1e-4}), literal(rule)) == "4.5e-07"


def test_sgdw_of_the_paper_keeps_the_rate_inside_the_buffer() -> None:
    """Equal at a constant rate, with its decay divided by the rate; after a drop they part."""
    lrs = (0.1, 0.05, 0.02)

    def rule(p: Array, g: Array, s: dict[str, Any], t: int, falls: bool) -> Array:
        eta = lrs[t - 1] / lrs[0] if falls else 1.0
        s["b"] = 0.9 * s.get("b", 0.0) + eta * 0.1 * g
        return np.asarray(p - s["b"] - eta * 1e-3 * p)

    options = {**STEP, "weight_decay": 0.01}
    assert gap(ours("sgdw", options), literal(lambda p, g, s, t: rule(p, g, s, t, False))) < 1e-14
    assert size(ours("sgdw", options, lrs=lrs), literal(lambda p, g, s, t: rule(p, g, s, t, True))) == "1.1e-02"


EXPERIMENTS = {"lr": 0.1, "eps": 1e-16}
FALLING = (0.1, 0.05, 0.02)
LOSSES = ((1.5, 2.5), (1.2, 1.6), (0.9, 1.0))


@pytest.mark.parametrize(
    ("name", "options", "other", "extra", "difference"),
    [
        ("acprop", EXPERIMENTS, {"rectify": True}, {}, "3.8e-01"),
        ("adafactor", {}, {"lr": 0.1}, {}, "1.7e-01"),
        ("koala_v", {"weight_decay": 0.1}, {"wd_in_direction": False}, {"losses": LOSSES}, "1.4e+00"),
        ("lars", {"weight_decay": 1e-4}, {"lr_inside_buffer": False}, {"lrs": FALLING}, "1.7e-04"),
        ("radam", STEP, {"fallback": "skip"}, {}, "2.1e-02"),
        ("radam", {**STEP, "weight_decay": 0.01}, {"decoupled_weight_decay": True}, {"steps": 8}, "5.8e-03"),
        ("rmsprop", STEP, {"eps_in_sqrt": True}, {}, "4.9e-05"),
    ],
)
def test_an_option_for_another_convention_makes_its_difference(
    name: str, options: dict[str, Any], other: dict[str, Any], extra: dict[str, Any], difference: str
) -> None:
    assert size(ours(name, options, **extra), ours(name, {**options, **other}, **extra)) == difference
