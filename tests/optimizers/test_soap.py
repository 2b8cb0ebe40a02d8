"""SOAP: worked numbers, shapes, bases that are not unique, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim.language import eigenbases
from lightning_optim.optimizers import SOAP
from tests.harness.driver import run
from tests.oracles import ORACLES

SHAPES = {"A": (3, 2), "B": (2, 3), "C": (4, 4), "v": (3,), "K": (3, 2, 2), "D": (2, 5)}
START = {
    "A": [0, 0.3, -0.27, -0.89, -0.45, -0.99],
    "B": [0.06, 1.34, -0.49, -0.62, 0.49, 0.36],
    "C": [0.11, -0.93, -0.03, 0.7, -1.34, -0.46, -1.9, -1.29, -1.84, -0.24, -1.27, 0.27, 0.16, -0.19, -2.52, -0.54],
    "v": [-0.05, 0.11, -1.53],
    "K": [-0.48, -0.98, -0.81, 1.06, -0.81, -0.03, 0.88, -0.58, -0.11, 0.11, 0.06, -1.23],
    "D": [0.08, 1.36, -1.55, 0.86, 0.12, -0.64, 2, 0.76, -1.2, 0.07],
}
GRADIENTS = {
    "A": [
        [0.23, 0.09, 0.15, -0.08, 0.41, 0.59],
        [-0.03, -0.37, 0.31, 0.4, -0.24, 0.37],
        [-0.32, -0.69, 0.28, -0.01, 0.13, 0.44],
        [0.33, -0.26, 0.53, -0.4, 0.16, 0.43],
        [-0.08, 0.21, -0.03, 0.15, 0.66, 0.34],
    ],
    "B": [
        [-0.51, 0.04, -0.13, -0.28, -0.28, -0.43],
        [-0.39, -0.47, 0.08, 0.03, -0.33, -0.4],
        [-0.46, -0.39, -0.19, -0.25, -0.85, -0.02],
        [-0.6, 0.58, 0.3, -0.1, -0.12, -0.06],
        [-0.38, 0.12, -0.14, -0.26, -0.22, 0.43],
    ],
    "C": [
        [0.23, 0.33, 0.37, -0.57, -0.27, -0.41, -0.94, -0.03, -0.67, 0.63, -0.32, 0.13, -0.36, 0.16, 0.5, -0.59],
        [0.08, 0.11, 0.3, -0.73, -0.6, 0.59, -0.75, -0.05, -0.04, 0.24, 0.05, 0.09, -0.2, -0.12, 0.46, 0.22],
        [-0.08, 0.39, 0.05, -0.59, -0.54, -0.07, -0.54, -0.37, 0.08, 0.48, 0.81, -0.52, 0.16, -0.1, 0.45, -0.56],
        [-0.84, 0.34, 0.33, -0.37, -0.56, 0.11, -0.65, 0.22, 0.07, 0.38, 0.67, -0.26, -0.23, -0.62, 0.93, 0.16],
        [-0.14, 0.21, 0.03, -0.3, -0.61, -0.14, -0.21, -0.41, 0.3, 0.83, 0.28, 0.07, 0.48, -0.13, 0.28, -0.53],
    ],
    "v": [
        [0.28, 0.54, -0.06],
        [0.11, 0.22, -0.21],
        [-0.23, 0.33, -0.06],
        [0.18, 0.31, -0.0],
        [-0.08, 0.55, 0.25],
    ],
    "K": [
        [-0.14, -0.38, -0.3, 0.2, 0.19, 0.18, -0.25, 0.01, -0.49, 0.69, -0.05, 0.46],
        [-0.47, -0.05, 0.29, -0.18, 0.51, 0.43, 0.24, 0.48, -0.24, 0.77, -0.38, 0.43],
        [-0.03, -0.42, 0.34, -0.14, -0.31, -0.01, -0.6, -0.77, -0.26, 0.72, 0.01, -0.18],
        [0.01, -0.41, -0.06, -0.12, 0.8, 0.36, -0.02, 0.03, -0.29, 0.8, 0.15, 0.2],
        [-0.34, -0.59, -0.15, -0.05, 0.29, 0.26, 0.08, 0.11, -0.11, 0.38, -0.03, 0.33],
    ],
    "D": [
        [-0.38, -0.1, -0.6, -0.78, -0.09, -0.38, -0.04, 0.26, -0.49, 0.31],
        [-0.24, 0.37, 0.06, -0.17, -0.43, -0.78, 0.29, 0.37, -0.25, 0.06],
        [-0.67, 0.44, -0.46, -0.6, -0.11, -0.26, 0.29, 0.84, -0.18, -0.5],
        [-0.49, -0.23, -0.53, -0.35, -0.21, -0.34, -0.02, 0.71, -0.73, -0.26],
        [0.17, 0.28, -0.49, -1.12, 0.03, -0.85, -0.37, 0.93, -0.04, -0.23],
    ],
}
# After the fifth step; computed by the authors' program in float64, but for D, whose factor has no full rank.
AFTER: tuple[tuple[dict[str, Any], dict[str, list[float]]], ...] = (
    (
        {},
        {
            "A": [-0.0295668782148, 0.359591230673, -0.321402238544, -0.911929718568, -0.435409332945, -1.09707113086],
            "B": [0.16052057573, 1.38385869814, -0.489631360421, -0.637570729238, 0.573474976043, 0.387102068812],
            "C": [
                0.13535384024,
                -0.972331697339,
                -0.0415719014626,
                0.807159922295,
                -1.2570528169,
                -0.528179159026,
                -1.77842934202,
                -1.25196784694,
                -1.79516551801,
                -0.33282862255,
                -1.3465367299,
                0.278285410884,
                0.201112965752,
                -0.150687072875,
                -2.54978264648,
                -0.551933529294,
            ],
            "v": [-0.0644680507435, 0.0316781695155, -1.47785120067],
        },
    ),
    (
        {"max_precond_dim": 3},
        {
            "A": [-0.0295668782148, 0.359591230673, -0.321402238544, -0.911929718568, -0.435409332945, -1.09707113086],
            "B": [0.16052057573, 1.38385869814, -0.489631360421, -0.637570729238, 0.573474976043, 0.387102068812],
            "C": [
                0.113906461907,
                -1.00366571517,
                -0.0992537235499,
                0.777489952328,
                -1.25903937551,
                -0.510902125628,
                -1.82032262395,
                -1.2377626006,
                -1.85012903182,
                -0.316358098635,
                -1.3377867261,
                0.28586242398,
                0.186462727148,
                -0.11977243762,
                -2.59487039114,
                -0.53869629557,
            ],
        },
    ),
    (
        {"view": "axes"},
        {
            "K": [
                -0.386789602677,
                -0.940181001242,
                -0.873290137811,
                1.08920359758,
                -0.853239868786,
                -0.0587862741816,
                0.888231390746,
                -0.58394057491,
                -0.130869587309,
                0.0110300889455,
                0.0974912532079,
                -1.2337416177,
            ]
        },
    ),
    (
        {},
        {
            "D": [
                0.164184888387,
                1.31034146962,
                -1.59454184459,
                0.915002333235,
                0.169512377411,
                -0.539348969237,
                1.94546231982,
                0.655951279719,
                -1.15416373799,
                0.086671821931,
            ]
        },
    ),
)


@pytest.mark.parametrize(("options", "after"), AFTER, ids=lambda case: "".join(case) if "A" in case else "")
def test_worked_numbers(options: dict[str, Any], after: dict[str, list[float]]) -> None:
    params = [np.array(START[name], dtype=float).reshape(SHAPES[name]) for name in after]
    gradients = [[np.array(GRADIENTS[name][k]).reshape(SHAPES[name]) for name in after] for k in range(5)]
    history = run("soap", params, gradients, lr=0.02, frequency=2, **options)
    for before, theta in zip(params, history[0], strict=True):
        np.testing.assert_array_equal(theta, before)
    for theta, printed in zip(history[-1], after.values(), strict=True):
        np.testing.assert_allclose(theta.reshape(-1), printed, rtol=0, atol=1e-11)


@pytest.mark.parametrize("frequency", [1, 4])
@pytest.mark.parametrize("view", ["matrix", "axes"])
def test_agrees_with_its_oracle_on_shapes_far_from_square(view: str, frequency: int) -> None:
    rng = np.random.default_rng(2)
    shapes = ((24, 3), (3, 24), (9, 9), (16, 2, 3), (2, 3, 2, 5), (1, 7), (7, 1), (1, 1), (4,), ())
    params = [rng.normal(size=shape) for shape in shapes]
    gradients: list[Any] = [[np.asarray(rng.normal(size=shape)) for shape in shapes] for _ in range(50)]
    options: dict[str, Any] = {"view": view, "frequency": frequency, "lr": 0.01}
    for ours, theirs in zip(
        run("soap", params, gradients, **options), ORACLES["soap"](params, gradients, **options), strict=True
    ):
        for p, q in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(p, q, rtol=0, atol=1e-10)


def path(shape: tuple[int, int], noise: float, dtype: torch.dtype) -> Tensor:
    """The way of nine steps, whose gradients have a relative noise."""
    generator = torch.Generator().manual_seed(0)
    p = Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = SOAP([p], lr=0.01, frequency=2, weight_decay=0.0)
    for _ in range(9):
        g = torch.randn(shape, generator=generator, dtype=torch.float64)
        p.grad = (g * (1 + noise * torch.randn(shape, dtype=torch.float64))).to(dtype)
        optimizer.step()
    return p.detach().double()


@pytest.mark.parametrize("shape", [(8, 8), (8, 12), (8, 32), (16, 64), (4, 64)])
@pytest.mark.parametrize(
    ("dtype", "noise", "apart"), [(torch.float64, 1e-14, 1e-12), (torch.float32, 1e-6, 2e-4)], ids=str
)
def test_rounding_of_the_gradient_does_not_decide_where_a_wide_matrix_goes(
    shape: tuple[int, int], dtype: torch.dtype, noise: float, apart: float
) -> None:
    one, other = path(shape, 0.0, dtype), path(shape, noise, dtype)
    assert float((one - other).norm() / one.norm()) < apart


def test_a_factor_whose_unit_vectors_lie_in_its_range_gets_a_basis_all_the_same() -> None:
    p = Parameter(torch.zeros(4, 3))
    optimizer = SOAP([p], frequency=1)
    for k in range(4):
        p.grad = torch.zeros(4, 3)
        p.grad[0] = torch.tensor([1.0, 2.0, 3.0]) + k  # of which the first row alone has a gradient
        optimizer.step()
    for name in ("basis_0", "basis_1"):
        basis = optimizer.state[p][name]
        assert torch.allclose(basis.mT @ basis, torch.eye(len(basis)), atol=1e-5)
    assert not bool(p[1:].any())


def test_zero_gradients_move_nothing() -> None:
    p = Parameter(torch.ones(3, 2))
    optimizer = SOAP([p], weight_decay=0.0)
    for _ in range(12):
        p.grad = torch.zeros(3, 2)
        optimizer.step()
    assert torch.equal(p.detach(), torch.ones(3, 2))


def test_nan_in_the_first_gradient_is_in_the_weights_after_the_second_and_nothing_is_raised() -> None:
    p, other = Parameter(torch.ones(3, 2)), Parameter(torch.ones(3, 2))
    optimizer = SOAP([p, other], frequency=1)
    for k in range(3):
        p.grad, other.grad = torch.ones(3, 2), torch.randn(3, 2)
        if k == 0:
            p.grad[1, 1] = torch.nan
        optimizer.step()
    assert bool(p.isnan().all())
    assert bool(other.isfinite().all())


def test_an_eigendecomposition_that_fails_is_tried_in_float64_and_then_leaves_the_unit_vectors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found: Callable[[Tensor], Any] = torch.linalg.eigh
    tried: list[torch.dtype] = []

    def fails(x: Tensor, in_both: bool) -> Any:
        tried.append(x.dtype)
        if in_both or x.dtype == torch.float32:
            raise torch.linalg.LinAlgError("it did not converge")  # type: ignore[attr-defined]
        return found(x)

    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    factor = g @ g.mT
    expected = eigenbases._first_basis(factor.double())
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: fails(x, in_both=False))
    basis = eigenbases._first_basis(factor)
    assert tried == [torch.float32, torch.float64]
    assert torch.allclose(basis[:, :3].double().abs(), expected[:, :3].abs(), atol=1e-5)
    monkeypatch.setattr(torch.linalg, "eigh", lambda x: fails(x, in_both=True))
    with pytest.warns(UserWarning, match="eigenvectors of a factor of 4 rows could not be computed"):
        assert torch.equal(eigenbases._first_basis(factor), torch.eye(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_have_state_and_arithmetic_in_float32(dtype: torch.dtype) -> None:
    p = Parameter(torch.zeros(6, 4, dtype=dtype))
    optimizer = SOAP([p], state_bits=16)
    for _ in range(3):
        p.grad = torch.randn(6, 4).to(dtype)
        optimizer.step()
    dtypes = {name: value.dtype for name, value in optimizer.state[p].items()}
    assert dtypes.pop("exp_avg") == torch.bfloat16
    assert {*dtypes.values()} == {torch.float32}


def test_eight_bits_code_the_first_moment_of_a_matrix_and_both_moments_of_a_vector() -> None:
    p, bias = Parameter(torch.zeros(64, 64)), Parameter(torch.zeros(4096))
    optimizer = SOAP([p, bias], state_bits=8)
    for _ in range(3):
        p.grad, bias.grad = torch.randn(64, 64), torch.randn(4096)
        optimizer.step()
    kinds = {name: type(value).__name__ for name, value in optimizer.state[p].items()}
    assert [name for name, kind in kinds.items() if kind == "Quantized"] == ["exp_avg"]
    assert [name for name, value in optimizer.state[bias].items() if type(value).__name__ == "Quantized"] == [
        "exp_avg",
        "exp_avg_sq",
    ]


def test_no_step_warns() -> None:
    p = Parameter(torch.zeros(3, 2))
    optimizer = SOAP([p], frequency=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            p.grad = torch.randn(3, 2)
            optimizer.step()


@pytest.mark.parametrize(
    ("options", "shape", "axes"),
    [
        ({}, (4, 3), (4, 3)),
        ({"view": "axes"}, (2, 3, 2), (2, 3, 2)),
        ({"max_precond_dim": 3}, (4, 3), (4, 3)),
        ({"precondition_1d": True}, (5,), (5,)),
        ({"merge_dims": True, "max_precond_dim": 6}, (4, 3, 2), (4, 6)),
    ],
)
def test_files_of_the_authors_program_go_on(
    options: dict[str, Any], shape: tuple[int, ...], axes: tuple[int, ...]
) -> None:
    """Its state is a list of factors and one of bases; m stands in the bases, and the first gradient is not counted."""
    start = torch.randn(shape, dtype=torch.float64)
    p, other = Parameter(start.clone()), Parameter(start.clone())
    optimizer, fresh = (SOAP([x], frequency=2, **options) for x in (p, other))
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(8)]
    for g in gradients[:4]:
        p.grad = g
        optimizer.step()
    state = optimizer.state[p]
    bases = [state.get(f"basis_{i}", []) for i in range(len(axes))]
    m = state["exp_avg"].view(axes)
    for i, basis in enumerate(bases):
        if isinstance(basis, Tensor):
            pair: Any = ([i], [0])  # torch says that this is a number
            m = torch.tensordot(m, basis, dims=pair).movedim(-1, i)
    theirs = {"step": 3, "exp_avg": m.reshape(shape), "exp_avg_sq": state["exp_avg_sq"], "Q": bases}
    theirs |= {"GG": [state.get(f"factor_{i}", []) for i in range(len(axes))]}
    theirs |= {"shampoo_beta": 0.95, "precondition_frequency": 2}
    group = {"lr": 3e-3, "betas": (0.95, 0.95), "shampoo_beta": -1, "eps": 1e-8, "weight_decay": 0.01, "params": [0]}
    group |= {"precondition_frequency": 2, "merge_dims": False, "precondition_1d": False, "normalize_grads": False}
    group |= {"max_precond_dim": 10000, "correct_bias": True, **{k: v for k, v in options.items() if k != "view"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict({"state": {0: theirs}, "param_groups": [group]})
    assert (fresh.param_groups[0]["frequency"], fresh.param_groups[0]["shampoo_beta"]) == (2, None)
    with torch.no_grad():
        other.copy_(p)
    for g in gradients[4:]:
        p.grad, other.grad = g.clone(), g.clone()
        optimizer.step()
        fresh.step()
    torch.testing.assert_close(other, p, rtol=0, atol=1e-12)
    group["normalize_grads"] = True
    with pytest.warns(UserWarning, match="normalize_grads=True, which it has not"):
        fresh.load_state_dict({"state": {}, "param_groups": [group]})


def test_state_of_another_optimizer_starts_bases_and_counter_anew() -> None:
    from lightning_optim import AdamW

    p = Parameter(torch.randn(4, 3))
    adam, soap = AdamW([p]), SOAP([p])
    p.grad = torch.randn(4, 3)
    adam.step()
    with pytest.warns(UserWarning, match="start"):
        soap.load_state_dict(adam.state_dict())
    before = p.detach().clone()
    soap.step()
    assert torch.equal(p, before), "its first gradient sets up the bases"
    soap.step()
    assert not torch.equal(p, before)
