"""Muon: its worked numbers, tensors of every shape, torch's program, and the traps that others fell into."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightning_optim import AdamW, Muon, OptionError
from lightning_optim.language import orthogonalize
from lightning_optim.language.orthogonalize import POLAR_EXPRESS, newton_schulz
from lightning_optim.storage import Quantized
from tests.harness.driver import Array, History, run
from tests.harness.worked_numbers import GRADIENTS, START, read
from tests.oracles.muon import muon, orthogonalized, polar_express

CLASSIC = {"lr": 0.02, "coefficients": "classic"}
X = torch.tensor([[1.0, -2.0, 0.5], [0.25, 3.0, -1.5]], dtype=torch.float64)
ENGINES = ("reference", pytest.param("auto", marks=pytest.mark.engines))
SHAPES = ((9, 4), (4, 9), (6, 6), (6, 2, 3), (4, 3, 2, 2), (5,), (), (1, 5), (3, 1), (2, 0))

# ------------------------------------------------------------------ worked numbers

ORTHOGONAL = {
    ("classic", 1): "0.66763997293, -0.409308640646, -0.0960952623843, 0.353248999021, 0.535102767393, -0.399832998727",
    ("classic", 5): "0.568610222646, -0.406933894943, -0.0547565013388, 0.28911269251, 0.548206108732, -0.378429704416",
    ("quintic", 5): "0.821771976325, -0.564471793454, -0.0901118000356, 0.4225914437, 0.754808687612, -0.531557509406",
    ("polar_express", 5): "0.731502654983, -0.486232762945, -0.0877502121967, 0.379437721628, 0.646162471457, "
    "-0.462620171017",
    ("polar_express", 8): "0.827586228002, -0.552701355785, -0.0980684682433, 0.428753722086, 0.735160264154, "
    "-0.525076003537",
}
# name: options, and lines of tensors after some steps
WORKED: dict[str, tuple[dict[str, Any], dict[int, str]]] = {
    "muon": (
        {**CLASSIC, "adjust": "original"},
        {
            1: "A [-0.0117268094568, 0.302025337596, -0.28131982291, -0.879789879522, -0.456959294158, -1.00414672266] "
            "v [-0.0698999992857, 0.0897800003704, -1.50694000333]",
            5: "A [-0.0287644953016, 0.34343651763, -0.360111124033, -0.861701472108, -0.456885839256, -1.06174389075] "
            "B [0.14936860391, 1.32165767947, -0.491523288041, -0.60733392428, 0.550414728128, 0.394847675409] "
            "C [0.0843508623346, -0.946428756317, -0.0388656863389, 0.767112133344, -1.267085826, -0.44034086558, "
            "-1.81811167706, -1.26819517088, -1.79962197264, -0.309363815389, -1.28438800468, 0.245282706696, "
            "0.207021012543, -0.152305665036, -2.56135545298, -0.507838553347] "
            "v [-0.102131044381, 0.0146217084627, -1.44686174004]",
        },
    ),
    "match_rms": (
        CLASSIC,
        {
            5: "A [-0.00813582787406, 0.310142819297, -0.293558679893, -0.875638747542, -0.448733284698, "
            "-1.0032207222] "
            "B [0.0905676040931, 1.32492289237, -0.487337877014, -0.611576262308, 0.507738470286, 0.369728058337]",
        },
    ),
    "polar": (
        {"lr": 0.02},
        {
            1: "A [-0.00425317193179, 0.300046675942, -0.273583048605, -0.885346763178, -0.452502901353, "
            "-0.994459937497]",
            5: "A [-0.00921273419628, 0.31315290708, -0.296843058139, -0.87687078378, -0.45308097767, -1.00985100377] "
            "B [0.0928558589423, 1.32520559791, -0.488097068918, -0.610962841948, 0.51007295575, 0.372133661592]",
        },
    ),
    "blocks of 2 rows": (
        {**CLASSIC, "blocks": 2},
        {
            1: "C [0.108218842865, -0.930259888947, -0.0297668612725, 0.706180718353, -1.33638801951, -0.457562520745, "
            "-1.89066847515, -1.28415457382, -1.83071101083, -0.244862262712, -1.26452459165, 0.26811981526, "
            "0.162788272632, -0.190874641063, -2.51975439826, -0.533357122122]",
            5: "C [0.111315800174, -0.93340616684, -0.0387548498888, 0.722851111041, -1.30560361687, -0.456936256662, "
            "-1.84941698794, -1.26936719384, -1.81019806506, -0.267944316071, -1.26244677682, 0.266922760551, "
            "0.165812506967, -0.179135848036, -2.52418705413, -0.519369419997]",
        },
    ),
    "convolution": (
        CLASSIC,
        {
            1: "K [-0.476494866842, -0.972676045435, -0.803313895369, 1.05424222226, -0.813426912518, "
            "-0.0335204460273, 0.884643692335, -0.578839231779, -0.1049318533, 0.10385986785, 0.0603936041803, "
            "-1.23198749009]",
            5: "K [-0.457602256065, -0.953813209944, -0.79625884984, 1.05108758871, -0.818304898331, "
            "-0.0413074968361, 0.889083760941, -0.56926526915, -0.0904791923723, 0.0790727658952, "
            "0.0654260827593, -1.23021266387]",
        },
    ),
    "normuon": (
        {**CLASSIC, "adjust": "original", "normalize_rows": True},
        {
            1: "A [-0.0146698593781, 0.302684212428, -0.281712939112, -0.879510447276, -0.455685809265, "
            "-1.00153362061]",
            5: "A [-0.038621992824, 0.362322386928, -0.346186759747, -0.86369229218, -0.454701490046, -1.05895117706] "
            "B [0.145724182367, 1.32208244554, -0.491310181375, -0.60651641046, 0.553908340917, 0.396477518433]",
        },
    ),
    "cautious decay": (
        {**CLASSIC, "cautious_decay": True, "weight_decay": 0.5},
        {
            1: "A [-0.00331684259545, 0.300742557607, -0.273354464481, -0.878715601857, -0.452222944078, "
            "-0.99456132598]",
            5: "A [-0.00812136414888, 0.313172973407, -0.296355376383, -0.849487284913, -0.444244794044, "
            "-1.01317075681] "
            "B [0.0912853076193, 1.28546111392, -0.487304949089, -0.599322724529, 0.512703996501, 0.369654771723]",
        },
    ),
    "experts": (
        {**CLASSIC, "experts": True},
        {
            1: "K [-0.477269611085, -0.972530941578, -0.804445566051, 1.05492864273, -0.809590897729, "
            "-0.034853016419, 0.88244548451, -0.581870265494, -0.106469614847, 0.107429083553, 0.0577773896469, "
            "-1.23084031869]",
            5: "K [-0.463763672647, -0.952096260313, -0.814779140073, 1.05763811201, -0.810194711162, "
            "-0.0454744998609, 0.886548422601, -0.585127094609, -0.100425919358, 0.0924636562639, "
            "0.0579669006033, -1.22558004951]",
        },
    ),
}


@pytest.mark.parametrize(("coefficients", "steps"), ORTHOGONAL)
def test_worked_matrices(coefficients: Any, steps: int) -> None:
    expected = np.array([float(x) for x in ORTHOGONAL[coefficients, steps].split(", ")])
    wide: Any = X
    tall: Any = X.mT
    found: Any = (orthogonalize(wide, coefficients, steps), orthogonalize(tall, coefficients, steps))
    for x in (found[0], found[1].mT):
        np.testing.assert_allclose(x.flatten(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", WORKED)
def test_worked_steps(name: str, engine: str) -> None:
    options, lines = WORKED[name]
    for letter in read(lines[5]):
        found = run("muon", [START[letter]], [[g[letter]] for g in GRADIENTS[:5]], engine=engine, **options)
        for k, line in lines.items():
            if letter in read(line):
                np.testing.assert_allclose(found[k - 1][0], read(line)[letter], rtol=0, atol=1e-11)


def test_the_table_of_polar_express_is_that_of_its_rule() -> None:
    """The last two entries follow from points that nearly meet, where rounding decides."""
    for i, (own, rule) in enumerate(zip(POLAR_EXPRESS, polar_express(), strict=False)):
        np.testing.assert_allclose(own, rule, rtol=0, atol=1e-12 if i < 6 else 5e-9)


# ------------------------------------------------------------------ against an independent recursion


def problem(shapes: Sequence[tuple[int, ...]] = SHAPES, steps: int = 50) -> tuple[list[Array], list[list[Array]]]:
    rng = np.random.default_rng(0)
    gradients = [[np.asarray(rng.normal(size=shape)) for shape in shapes] for _ in range(steps)]
    return [np.asarray(rng.normal(size=shape)) for shape in shapes], gradients


def assert_same(ours: History, theirs: History) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        for p, q in zip(mine, other, strict=True):
            np.testing.assert_allclose(p, q, rtol=0, atol=1e-10)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({}, SHAPES),
        ({"adjust": "original", "nesterov": False, "coefficients": "classic"}, SHAPES),
        ({"adjust": "spectral", "coefficients": "quintic", "steps": 7, "adamw_scale": 0.3, "adamw_eps": 1e-3}, SHAPES),
        ({"adjust": "none", "momentum": 0.5, "weight_decay": 0.5, "betas": (0.5, 0.7)}, SHAPES),
        ({"eps": 4.0}, SHAPES),
        ({"matrix": False}, SHAPES),
        ({"matrix": True}, ((9, 4), (1, 5), (3, 1), (2, 3, 2))),
        ({"blocks": 3}, ((9, 4), (6, 2, 3), (5,))),
        ({"blocks": (4, 2, 3), "adjust": "spectral"}, ((9, 4), (9, 2, 2))),
        ({"heads": 2}, ((8, 5), (4, 4))),
        ({"experts": True}, ((3, 4, 2), (2, 3, 5, 2), (5,))),
        ({"normalize_rows": True}, SHAPES),
        ({"normalize_rows": True, "beta2": 0.7, "adjust": "original", "blocks": 3}, ((9, 4), (6, 2, 3), (5,))),
        ({"normalize_rows": True, "blocks": (4, 2, 3), "experts": True}, ((2, 9, 4), (3, 9, 2, 2))),
        ({"experts": True, "blocks": 2}, ((3, 4, 2), (2, 4, 5))),
    ],
    ids=str,
)
def test_agrees_with_an_independent_recursion(options: dict[str, Any], shapes: Any, engine: str) -> None:
    """Tall, wide and square matrices, tensors of 3 and 4 axes, vectors, a number, single rows, no elements."""
    params, gradients = problem(shapes)
    assert_same(
        run("muon", params, gradients, lr=0.01, engine=engine, **options), muon(params, gradients, lr=0.01, **options)
    )


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_where_its_cast_is_taken_out(adjust: Any, nesterov: bool) -> None:
    torchs = pytest.importorskip("torch.optim._muon")
    module = types.ModuleType("muon_in_float64")
    exec(inspect.getsource(torchs).replace("from .optimizer", "from torch.optim.optimizer"), vars(module))
    exec(inspect.getsource(module_function(torchs)).replace(".bfloat16()", ".clone()"), vars(module))
    params, gradients = problem(((9, 4), (4, 9), (6, 6)))
    theirs = [Parameter(torch.tensor(p)) for p in params]
    optimizer = vars(module)["Muon"](theirs, lr=0.01, adjust_lr_fn=adjust, nesterov=nesterov, eps=1e-12)
    history = []
    for grads in gradients:
        for p, g in zip(theirs, grads, strict=True):
            p.grad = torch.tensor(g)
        optimizer.step()
        history.append([p.detach().numpy().copy() for p in theirs])
    assert_same(
        run("muon", params, gradients, lr=0.01, adjust=adjust, nesterov=nesterov, coefficients="classic"), history
    )


def module_function(module: Any) -> Any:
    return module._zeropower_via_newtonschulz


def test_what_is_no_matrix_gets_adamw_to_the_bit() -> None:
    params, gradients = problem(((5,), (), (7, 3)))
    options: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.9), "weight_decay": 0.2}
    for engine in ("reference", "auto"):
        ours = run("muon", params, gradients, matrix=False, adamw_eps=1e-6, engine=engine, **options)
        theirs = run("adamw", params, gradients, eps=1e-6, engine=engine, **options)
        assert all(np.array_equal(p, q) for a, b in zip(ours, theirs, strict=True) for p, q in zip(a, b, strict=True))


# ------------------------------------------------------------------ the function


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 1, 4])
@pytest.mark.parametrize("columns", [256, 1024])  # the iteration itself, and the one on Gram matrices
def test_few_ranks_stay_bounded(columns: int, rank: int, compute: Any) -> None:
    """A matrix of rank 1 has a singular value of 1, which rounding lifts above it: the bare table explodes there."""
    generator = torch.Generator().manual_seed(rank)
    u = torch.randn(256, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    found = newton_schulz(u[None], compute=compute)[0].float()
    assert torch.isfinite(found).all()
    if rank == 0:
        assert not found.any()
    else:
        values = torch.linalg.svdvals(found)
        assert 0.8 < float(values[0]) < 1.2


@pytest.mark.parametrize("columns", [100, 200])
def test_less_precision_is_near(columns: int) -> None:
    u = torch.randn(3, 64, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exact = newton_schulz(u)
    for compute, error in (("float32", 1e-5), ("bfloat16", 0.08)):
        settings: Any = compute
        rough = newton_schulz(u.float(), compute=settings).double()
        assert float((rough - exact).norm() / exact.norm()) < error
        assert newton_schulz(u.float(), compute=settings).dtype == getattr(torch, compute)


@pytest.mark.parametrize("columns", [9, 13])
@pytest.mark.parametrize("steps", [1, 3, 5, 7])
def test_a_batch_is_its_matrices_one_by_one(steps: int, columns: int) -> None:
    u = torch.randn(5, 6, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one_by_one = torch.cat([newton_schulz(x[None], steps=steps) for x in u])
    torch.testing.assert_close(newton_schulz(u, steps=steps), one_by_one, rtol=0, atol=1e-12)
    for x, found in zip(u, one_by_one, strict=True):
        np.testing.assert_allclose(found, orthogonalized(x.numpy(), steps=steps), rtol=0, atol=1e-12)


def test_a_tiny_gradient_moves_a_matrix_as_far_as_a_large_one() -> None:
    """Where a norm falls below a floor of 1e-7 the update fades without a word (T5)."""
    params, gradients = problem(((6, 4),), steps=3)
    tiny = [[1e-10 * g for g in step] for step in gradients]
    np.testing.assert_allclose(
        run("muon", params, tiny)[-1][0], run("muon", params, gradients)[-1][0], rtol=0, atol=1e-12
    )


def test_nan_reaches_the_whole_matrix_and_no_other() -> None:
    params, gradients = problem(((4, 3), (4, 3)), steps=1)
    gradients[0][0][1, 2] = math.nan
    first, second = run("muon", params, gradients)[0]
    assert np.isnan(first).all()
    assert np.isfinite(second).all()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_iteration_gets_memory_of_its_own(nesterov: bool, engine: str) -> None:
    """bfloat16 parameters, without Nesterov: the momentum is not normalised in place (T3), nor the gradient."""
    p = Parameter(torch.ones(4, 6, dtype=torch.bfloat16))
    p.grad = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = p.grad.clone()
    optimizer = Muon([p], momentum=0.0, nesterov=nesterov, state_bits=16, engine=engine)
    optimizer.step()
    assert torch.equal(optimizer.state[p]["exp_avg"], before)
    assert torch.equal(p.grad, before)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_products_are_as_precise_as_compute_says(precision: str) -> None:
    """Whatever the user allows the model (T11), under autocast too; his choice is there afterwards."""
    params, gradients = problem(((64, 96),), steps=2)

    def last() -> torch.Tensor:
        p = Parameter(torch.tensor(params[0]).float())
        optimizer = Muon([p], compute="float32", lr=1.0)
        for (g,) in gradients:
            p.grad = torch.tensor(g).float()
            optimizer.step()
        return p.detach()

    exact = last()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(last(), exact)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_missing_gradient_leaves_a_matrix_alone() -> None:
    """It is not taken for zero: neither momentum nor decay moves it."""
    params, gradients = problem(((4, 3), (3, 4)), steps=4)
    gaps: list[list[Array | None]] = [
        [g if (k + j) % 2 else None for j, g in enumerate(gs)] for k, gs in enumerate(gradients)
    ]
    assert_same(run("muon", params, gaps, weight_decay=0.3), muon(params, gaps, weight_decay=0.3))


def test_one_cycle_lowers_the_beta_of_adamw_and_leaves_the_momentum_of_matrices() -> None:
    """As docs/muon.md says: torch takes the first of `betas` where there is one, and the matrix is what it would be."""
    torch.manual_seed(0)
    start, paths = torch.randn(4, 3), []
    for cycles in (True, False):
        w, bias = Parameter(start.clone()), Parameter(torch.ones(4))
        optimizer = Muon([{"params": [w], "matrix": True}, {"params": [bias]}])
        one = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=9, cycle_momentum=cycles)
        torch.manual_seed(1)
        betas = set()
        for _ in range(8):
            w.grad, bias.grad = torch.randn(4, 3), torch.randn(4)
            optimizer.step()
            one.step()
            betas.add(optimizer.param_groups[1]["betas"][0])
            assert optimizer.param_groups[0]["momentum"] == 0.95
        assert len(betas) == (8 if cycles else 1)
        paths.append((w.detach(), bias.detach()))
    assert torch.equal(paths[0][0], paths[1][0])
    assert not torch.equal(paths[0][1], paths[1][1])


def test_eight_bits_keep_the_momentum_of_a_matrix() -> None:
    params, gradients = problem(((64, 70),), steps=20)
    ends = []
    for bits in (32, 8):
        p = Parameter(torch.tensor(params[0]).float())
        given: Any = {"state_bits": bits}
        optimizer = Muon([p], lr=0.01, **given)
        for (g,) in gradients:
            p.grad = torch.tensor(g).float()
            optimizer.step()
        ends.append(p.detach())
    moved = (ends[0] - torch.tensor(params[0]).float()).norm()
    assert isinstance(optimizer.state[p]["exp_avg"], Quantized)
    assert 0 < float((ends[1] - ends[0]).norm() / moved) < 0.05


# ------------------------------------------------------------------ what is refused and said


def test_what_does_not_fit_is_refused() -> None:
    matrix = Parameter(torch.ones(6, 4))
    for options, words in (
        ({"blocks": 4}, "blocks=4 does not divide the 6 rows"),
        ({"blocks": (4, 3)}, "does not divide the 6 rows"),
        ({"heads": 4}, "heads=4 does not divide the 6 rows"),
        ({"blocks": 2, "heads": 2}, "another word for blocks"),
        ({"experts": True}, "three axes"),
        ({"blocks": 0}, "out of range"),
        ({"steps": 0}, "out of range"),
        ({"ns_steps": 5}, "use steps"),
        ({"amsgrad": True}, "has no option 'amsgrad'"),
    ):
        given: Any = options
        with pytest.raises(OptionError, match=words.replace("(", r"\(")):
            Muon([matrix], **given)
    with pytest.raises(OptionError, match="fewer than two axes"):
        Muon([Parameter(torch.ones(3))], matrix=True)
    given = {"momentum": 0.9}
    with pytest.raises(OptionError, match="AdamW has no option 'momentum'"):
        AdamW([matrix], **given)


def test_parameters_without_a_module_are_sorted_by_shape_with_a_warning() -> None:
    matrix, vector = Parameter(torch.ones(3, 4)), Parameter(torch.ones(3))
    with pytest.warns(UserWarning, match="shapes decide.*create_optimizer"):
        optimizer = Muon([matrix, vector])
    assert "muon: 1 tensor, 12 elements (80.0 %)" in repr(optimizer)
    with pytest.warns(UserWarning, match="no matrix among them"):
        Muon([vector])
    Muon([{"params": [matrix], "matrix": True}, {"params": [vector], "matrix": False}])  # no question is left
