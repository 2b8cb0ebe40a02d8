"""What every page promises about itself, and what single pages refuse or leave alone."""

from __future__ import annotations

import ast
import inspect
import re
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import optimizers as pages
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.errors import OptionError
from lightning_optim.language.docstrings import arguments, sections
from lightning_optim.language.formula import formula
from lightning_optim.optimizers import (
    LAMB,
    LARS,
    PNM,
    SGD,
    SGDW,
    ACProp,
    AdaBelief,
    Adafactor,
    AdamW,
    KoalaM,
    KoalaV,
    RAdam,
    RMSprop,
)

OF_TORCH: tuple[tuple[str, type[torch.optim.Optimizer], dict[str, Any]], ...] = (
    ("adam", torch.optim.Adam, {"weight_decay": 0.1, "amsgrad": True}),
    ("adamw", torch.optim.AdamW, {}),
    ("adamax", torch.optim.Adamax, {}),
    ("radam", torch.optim.RAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("rmsprop", torch.optim.RMSprop, {"momentum": 0.9, "centered": True}),
    ("adafactor", torch.optim.Adafactor, {"weight_decay": 0.1}),
    ("adagrad", torch.optim.Adagrad, {"weight_decay": 0.1, "lr_decay": 0.1}),
    ("nadam", torch.optim.NAdam, {"weight_decay": 0.1, "decoupled_weight_decay": True}),
    ("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
)
each_page = pytest.mark.parametrize("cls", OPTIMIZERS.values(), ids=list(OPTIMIZERS))


def parameter(*values: float, dtype: torch.dtype = torch.float64) -> Parameter:
    return Parameter(torch.tensor(values, dtype=dtype))


def step(optimizer: Optimizer, *gradients: Tensor, loss: float = 1.0) -> None:
    """One step; the gradients go to the parameters in order."""
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def closure() -> Tensor:
        for p, g in zip(params, gradients, strict=True):
            p.grad = g.to(p.dtype)
        return torch.tensor(loss)

    optimizer.step(closure)


# ------------------------------------------------------------------ every page


def test_the_package_names_every_page() -> None:
    assert {OPTIMIZERS[name].__name__ for name in OPTIMIZERS} == set(pages.__all__)


def test_what_lightning_wraps_is_no_new_page() -> None:
    before = dict(OPTIMIZERS)
    wrapper = LightningOptimizer(PNM([parameter(1.0)]))
    assert isinstance(wrapper, PNM)
    assert before == OPTIMIZERS


def test_a_subclass_is_a_page_of_its_own_name() -> None:
    class Quiet(PNM):
        lr: float = 0.01

    try:
        assert OPTIMIZERS["quiet"] is Quiet
        assert Quiet([parameter(1.0)]).param_groups[0]["lr"] == 0.01
    finally:
        del OPTIMIZERS["quiet"]


@each_page
def test_page_introduces_itself(cls: type[Optimizer]) -> None:
    assert cls.title
    assert cls.advice.endswith(".")
    assert re.search(r"\d{4}", cls.paper)
    cls([parameter(1.0)], **cls.recommended)


@each_page
def test_docstring_explains_each_option_once(cls: type[Optimizer]) -> None:
    section = re.split(r"^\w+:$", inspect.cleandoc(cls.__doc__ or "").partition("Args:\n")[2], flags=re.MULTILINE)[0]
    documented = re.findall(r"^    (\w+): \S", section, re.MULTILINE)
    assert documented == ["params", *(option.name for option in cls.options.values() if not option.shared)]


@each_page
def test_docstring_has_the_formula_that_runs(cls: type[Optimizer]) -> None:
    """`make docs` writes it."""
    assert sections(cls.__doc__)["Formula"] == formula(cls)
    letters = [line.partition(" = ")[0] for line in formula(cls).splitlines() if not line.startswith((" ", "with "))]
    assert len(letters) == len(set(letters))


@each_page
def test_the_constructor_shows_the_options_of_the_page(cls: type[Optimizer]) -> None:
    """In an editor and in `help`: by name, with default, type and words, the page's own first."""
    parameters = inspect.signature(cls.__init__).parameters
    assert list(parameters) == ["self", "params", *cls.options]
    helps = arguments(cls.__init__.__doc__)
    assert list(helps) == ["params", *cls.options]
    for name, option in cls.options.items():
        assert (parameters[name].default, parameters[name].annotation) == (option.default, option.type)
        if not option.shared:
            assert helps[name] == arguments(cls.__doc__)[name]
    assert (cls.__init__.__doc__ or "").startswith(sections(cls.__doc__)[""])
    raises = sections(cls.__init__.__doc__)["Raises"]
    assert all(sections(doc).get("Raises", "") in raises for doc in (cls.__doc__, Optimizer.__doc__))


@each_page
def test_update_is_mathematics_only(cls: type[Optimizer]) -> None:
    """No loop over tensors and no call of torch: engines do these."""
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))  # type: ignore[arg-type]
    bodies = [node for node in ast.walk(tree) if getattr(node, "name", "").startswith(("update", "predict"))]
    nodes = [node for body in bodies for node in ast.walk(body)]
    assert not [node for node in nodes if isinstance(node, ast.For | ast.While | ast.comprehension | ast.Try)]
    assert not [node for node in nodes if isinstance(node, ast.Name) and node.id in ("torch", "math")]


@each_page
def test_a_page_imports_the_language_and_the_base_and_nothing_else_of_the_package(cls: type[Optimizer]) -> None:
    tree = ast.parse(inspect.getsource(inspect.getmodule(cls)))  # type: ignore[arg-type]
    modules = [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = {module for module in modules if module.startswith("lightning_optim")}
    base = "lightning_optim.optimizers.adam" if cls is AdamW else "lightning_optim.core.optimizer"
    assert base in ours
    assert all(module == base or module.startswith("lightning_optim.language") for module in ours)
    plain = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert plain | (set(modules) - ours) <= {"torch", "typing"}


@each_page
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_follows_double(cls: type[Optimizer], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator).to(dtype) for shape in ((6, 4), (5,), ())]
    single, double = ([Parameter(p.to(kind)) for p in start] for kind in (dtype, torch.float64))
    of_single, of_double = cls(single), cls(double)
    for _ in range(5):
        gradients = [torch.randn(p.shape, generator=generator).to(dtype) for p in start]
        step(of_single, *gradients)
        step(of_double, *gradients)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for p, q in zip(single, double, strict=True):
        torch.testing.assert_close(p.double(), q, rtol=tolerance, atol=tolerance)


@each_page
def test_complex_is_refused_or_treated_as_pairs(cls: type[Optimizer]) -> None:
    z = Parameter(torch.tensor([[1.0 + 2.0j, -0.5 + 0.25j]], dtype=torch.complex128))
    if cls.real_only:
        with pytest.raises(OptionError, match="complex"):
            cls([z])
        return
    pairs = Parameter(torch.view_as_real(z.detach()).clone())
    of_z, of_pairs = cls([z]), cls([pairs])
    for g in (0.1 + 0.3j, -0.2 + 0.1j, 0.5 - 0.4j):
        step(of_z, torch.full_like(z, g))
        step(of_pairs, torch.view_as_real(torch.full_like(z, g)))
    torch.testing.assert_close(torch.view_as_real(z), pairs, rtol=0, atol=1e-14)


@pytest.mark.parametrize(("name", "theirs", "options"), OF_TORCH, ids=[case[0] for case in OF_TORCH])
def test_equals_torch_and_continues_its_checkpoint(
    name: str, theirs: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (3,), (2, 3, 2))]
    mine, other = ([Parameter(p.clone()) for p in start] for _ in range(2))
    a, b = OPTIMIZERS[name](mine, **options), theirs(other, **options)
    for k in range(16):
        for p, q in zip(mine, other, strict=True):
            p.grad = q.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        a.step()
        b.step()
        if k == 7:
            saved, b = b.state_dict(), OPTIMIZERS[name](other, **options)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                b.load_state_dict(saved)
    for p, q in zip(mine, other, strict=True):  # torch multiplies NAdam's momenta in float32
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10 if name == "nadam" else 1e-12)


# ------------------------------------------------------------------ what pages refuse


@pytest.mark.parametrize(
    ("cls", "options", "words"),
    [
        (SGDW, {"nesterov": True, "momentum": 0.0}, "momentum"),
        (SGD, {"nesterov": True}, "momentum"),
        (SGDW, {"nesterov": True, "dampening": 0.1}, "dampening"),
        (LARS, {"nesterov": True, "momentum": 0.0}, "momentum"),
        (LAMB, {"phi": (2.0, 1.0)}, "phi"),
        (RAdam, {"betas": (0.9, 0.6)}, "0.667"),
        (RAdam, {"threshold": 3.0}, "threshold"),
        (AdaBelief, {"betas": (0.9, 0.6)}, "rectified"),
        (ACProp, {"betas": (0.9, 0.6), "rectify": True}, "rectified"),
        (KoalaV, {"maximize": True}, "maximize"),
        (KoalaM, {"maximize": True}, "maximize"),
        (KoalaM, {"sc": 1.0}, "covariance"),
        (Adafactor, {"beta1": 0.9}, "mode='paper'"),
        (Adafactor, {"relative_step": False}, "mode='paper'"),
        (Adafactor, {"mode": "paper", "warmup_init": True, "relative_step": False}, "relative_step"),
        (Adafactor, {"d": 0.5}, ">= 1"),
        (Adafactor, {"beta2_decay": 0.8}, "beta2_decay"),
        (PNM, {"betas": (1.0, 1.0)}, "betas"),
    ],
)
def test_options_without_meaning_are_refused(cls: type[Optimizer], options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)):
        cls([parameter(1.0)], **options)


def test_ranges_that_a_page_widens() -> None:
    PNM([parameter(1.0)], betas=(0.9, -3.0))
    AdaBelief([parameter(1.0)], betas=(0.9, 0.6), rectify=False)


# ------------------------------------------------------------------ single pages


@pytest.mark.parametrize("cls", [SGDW, LARS, RMSprop])
def test_no_momentum_no_buffer(cls: type[Optimizer]) -> None:
    p = parameter(1.0, 2.0)
    options: dict[str, Any] = {"momentum": 0.0}
    optimizer = cls([p], **options)
    step(optimizer, torch.ones(2))
    assert "momentum_buffer" not in optimizer.state[p]


def test_pnm_feeds_one_momentum_a_step() -> None:
    p = parameter(1.0)
    optimizer = PNM([p])
    step(optimizer, torch.ones(1))
    kept = optimizer.state[p]["pos_momentum"].clone()
    assert float(optimizer.state[p]["neg_momentum"]) == 0
    step(optimizer, torch.ones(1))
    assert torch.equal(optimizer.state[p]["pos_momentum"], kept)
    assert float(optimizer.state[p]["neg_momentum"]) != 0


def test_adafactor_resolves_eps_for_each_tensor() -> None:
    """torch takes the machine epsilon of the first tensor for all, too large for float32 behind bfloat16."""
    g = torch.full((2, 3), 1e-4)
    alone, behind = Parameter(torch.ones(2, 3)), Parameter(torch.ones(2, 3))
    step(Adafactor([alone]), g)
    step(Adafactor([Parameter(torch.ones(2, 3, dtype=torch.bfloat16)), behind]), g, g)
    assert torch.equal(alone, behind)


def test_adafactor_without_a_rate_takes_its_default() -> None:
    one, other, third = (parameter(1.0, 2.0) for _ in range(3))
    optimizer = Adafactor(
        [{"params": [one]}, {"params": [other], "lr": None}, {"params": [third], "lr": 1e-2}], lr=None
    )
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2] * 3
    step(optimizer, *[torch.ones(2)] * 3)
    assert torch.equal(one, other)
    assert torch.equal(one, third)


def test_adafactor_stores_less_of_a_convolution_by_its_largest_axes() -> None:
    kernel = Parameter(torch.ones(16, 8, 3, 3))
    for axes, shapes in {
        "last_two": [(16, 8, 3, 1), (16, 8, 1, 3)],
        "two_largest": [(16, 1, 3, 3), (1, 8, 3, 3)],
    }.items():
        options: dict[str, Any] = {"factor_axes": axes}
        optimizer = Adafactor([kernel], **options)
        step(optimizer, torch.ones(16, 8, 3, 3))
        assert [optimizer.state[kernel][name].shape for name in ("row_var", "col_var")] == shapes


def test_acprop_clip_bounds_the_step_after_a_zero_gradient() -> None:
    steps = []
    for clip in (0.0, 1.0):
        p = parameter(1.0)
        optimizer = ACProp([p], lr=1e-3, eps=1e-16, ratio_clip=clip)
        step(optimizer, torch.zeros(1))
        step(optimizer, torch.full((1,), 0.1))
        steps.append(1 - float(p.detach()))
    assert steps[0] == pytest.approx(316, rel=1e-2)
    assert steps[1] == pytest.approx(1e-3)


@pytest.mark.parametrize("cls", [KoalaV, KoalaM])
def test_koala_stands_still_below_its_target(cls: type[Optimizer]) -> None:
    p = parameter(1.0, -2.0)
    options: dict[str, Any] = {"loss_target": 0.5}
    step(cls([p], **options), torch.ones(2), loss=0.25)
    assert p.tolist() == [1.0, -2.0]


def test_koala_leaves_a_tensor_without_gradient_to_speak_of_alone() -> None:
    p, q = parameter(1.0), parameter(1.0)
    optimizer = KoalaV([p, q], weight_decay=0.1)
    step(optimizer, torch.full((1,), 1e-10), torch.ones(1))
    assert float(p.detach()) == 1.0
    assert float(q.detach()) != 1.0


def test_koala_takes_the_square_of_the_loss_where_nobody_knows_better() -> None:
    p = parameter(1.0)
    optimizer = KoalaV([p], alpha_r=0.0)
    step(optimizer, torch.ones(1), loss=3.0)
    assert float(optimizer.param_groups[0]["R"]) == pytest.approx(9.0)


def test_koala_m_without_closure_reaches_the_same_weights() -> None:
    """Its prediction is then made at the end of the step, and can be taken back: p - velocity / a."""
    closed, open_ = parameter(1.0, -2.0), parameter(1.0, -2.0)
    one, other = KoalaM([closed]), KoalaM([open_])
    for g in torch.tensor([[0.1, -0.2], [-0.3, 0.4], [0.05, 0.6]], dtype=torch.float64):
        step(one, g)
        open_.grad = g
        other.set_loss(1.0)
        other.step()
        filtered = open_ - other.state[open_]["velocity"] / 0.9
        torch.testing.assert_close(filtered, closed, rtol=0, atol=1e-14)
