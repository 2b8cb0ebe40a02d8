"""The printed formula, read back by a small reader and computed in numpy, is what the reference engine computes."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import Parameter

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.language import Options, Slot, Slots, Value
from lightning_optim.language.formula import formula
from tests.optimizers.settings import SETS
from tests.oracles.muon import factor, orthogonalized

SHAPE, STEPS = (5, 3), 7
LETTER = r"(?:∇f|(?:[A-Za-z]{2,}(?:_[a-z0-9]+)*|[A-Za-z\u0391-\u03c9])[\u0302-\u0304]?[₀-₉∞]*[ʷᵛ⁺⁻′]*)(?:ₜ₋₁|ₜ(?!₋))?"
RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵗ", "0123456789-t")
WORDS = {
    "if",
    "else",
    "and",
    "is",
    "odd",
    "sqrt",
    "norm",
    "max",
    "min",
    "sign",
    "exp",
    "mean",
    "abs",
    "sum",
    "log",
    "rms",
    "root",
    "V",
    "NewtonSchulz",
}
# Functions that keep slots of matrices are only named in a formula.
NAMED = {name for name, cls in OPTIMIZERS.items() if any(slot.per == "matrix" for slot in cls.slots.values())}
CASES = [
    (name, options)
    for name in OPTIMIZERS
    if name not in NAMED
    for options in ({}, *SETS[name])
    if "maximize" not in options
]


class Root:
    """√x as an operator that binds as tightly as a power."""

    def __pow__(self, x: Any) -> Any:
        return np.sqrt(x)


FUNCTIONS: dict[str, Any] = {
    "root": Root(),
    "norm": np.linalg.norm,
    "abs": np.abs,
    "sign": np.sign,
    "exp": np.exp,
    "log": lambda x: np.log(x) if x else -np.inf,
    "sum": np.sum,
    "max": lambda a, b=None: np.max(a) if b is None else np.maximum(a, b),
    "min": np.minimum,
    "rms": lambda x: np.sqrt(np.mean(x * x)),
    "mean": lambda x, axis: np.mean(x, axis, keepdims=True),
}


def newton_schulz(adjust: str, **settings: Any) -> Callable[[Any], Any]:
    """Muon's function of a whole matrix, which the formula only names."""
    return lambda x: factor(adjust, *x.shape) * orthogonalized(x, **settings)


def to_python(text: str) -> str:
    """An expression in the notation of the formula as an expression of Python on the letters in V."""
    text = re.sub(r"‖([^‖]*)‖(?:ₐₗₗ)?", r"norm(\1)", text)
    text = re.sub(r"\|([^|]*)\|", r"abs(\1)", text)
    text = re.sub(r"\[([^]]*)\]", r"(1.0*(\1))", text)
    text = text.replace("maxₐₗₗ(", "max(").replace("sumₐₗₗ(", "sum(").replace("RMSₐₗₗ(", "rms(").replace("RMS(", "rms(")
    text = text.replace("is odd", "% 2 == 1").replace("√", "root**")

    def part(found: re.Match[str]) -> str:
        if found[1] is not None:
            return found[1] if found[1] in WORDS else f'V["{found[1]}"]'
        exponent = found[2].translate(RAISED).replace("t", 'V["t"]')
        return f"**({exponent})"

    text = re.sub(f"({LETTER})|([⁰¹²³⁴⁵⁶⁷⁸⁹⁻ᵗ]+)", part, text)
    return text.replace("·", "*").replace("−", "-").replace("≥", ">=").replace("^", "**").replace("\n", " ")


def read(text: str) -> tuple[list[tuple[str, str]], dict[str, str], dict[str, str]]:
    """The lines of a formula as letters and Python, the options behind letters, and with what slots start."""
    *lines, legend = unicodedata.normalize("NFD", text).replace("\n ", " ").splitlines()
    legend, *more = re.split("; +", legend)
    starts = [
        entry.split(" = ") for part in more if " = " in part for entry in part[len("at the start ") :].split(", ")
    ]
    pairs = [line.split(" = ", 1) for line in lines]
    options: dict[str, str] = {}
    for entry in re.findall(r"([^=]+) = (\w+)(?:, |$)", legend.removeprefix("with ")):
        letters = entry[0].split(", ")
        for i, letter in enumerate(letters):
            options[letter] = entry[1] + (f".{i}" if len(letters) > 1 else "")
    return [(left, to_python(right)) for left, right in pairs], options, {a.removesuffix("₀"): b for a, b in starts}


def known_letters(cls: type[Optimizer], legend: Mapping[str, str], values: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers behind the letters that are no slot."""
    known: dict[str, Any] = {**values, "L": 1.5, "L₂": 2.25, "rows": -2, "columns": -1, "n": 15.0, "N": 15.0}
    for letter, name in legend.items():
        option, _, place = name.partition(".")
        value = values[option]
        if isinstance(value, tuple) and not place:  # only one item of the tuple occurs
            place = str({"ε₁": 0, "ε₂": 1, "β₁": 0, "β₂": 1, "β₀": 1}[letter])
        known[letter] = value[int(place)] if place else value
    if "eps" in values and isinstance(values["eps"], tuple):
        floor = torch.finfo(torch.float64).eps if values["mode"] == "torch" else 1e-30
        known["ε₁"] = floor if values["eps"][0] is None else values["eps"][0]
    return known


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_the_formula_read_back_is_what_runs(name: str, options: dict[str, Any]) -> None:
    cls = OPTIMIZERS[name]
    generator = np.random.default_rng(0)
    p = Parameter(torch.from_numpy(generator.normal(size=SHAPE)))
    optimizer = cls([p], engine="reference", **options)
    lines, legend, starts = read(formula(cls, **options))
    values = {key: optimizer.param_groups[0][key] for key in cls.options if key in optimizer.param_groups[0]}
    V = known_letters(cls, legend, values)
    theta = cls.letters.get("p", "θ")
    settings = {key: values[key] for key in ("adjust", "coefficients", "steps", "eps") if key in values}
    functions = {**FUNCTIONS, "NewtonSchulz": newton_schulz(**settings)} if "adjust" in settings else FUNCTIONS
    for slot in cls.slots.values():
        letter = unicodedata.normalize("NFD", slot.letter)
        start = starts.get(letter, legend.get(letter + "₀", "0"))
        start = legend.get(start, start)  # "d₀" of "D₀ = d₀"
        copied = start == theta + "₀"
        V[letter + "ₜ₋₁"] = p.detach().numpy().copy() if copied else float(values.get(start, start))
        if slot.copies:
            V[letter] = p.detach().numpy().copy()
    V[theta + "ₜ₋₁"] = p.detach().numpy().copy()
    for t in range(1, STEPS + 1):
        g = generator.normal(size=SHAPE)
        V.update({"t": float(t), "gₜ": g, "∇fₜ": g})
        for letter, expression in lines:
            V[letter] = eval(expression, {}, {**functions, "V": V})
        for letter in [key for key in V if key.endswith("ₜ")]:
            V[letter + "₋₁"] = V[letter]

        def closure(g: Any = g) -> float:
            p.grad = torch.from_numpy(g)
            return 1.5

        optimizer.step(closure)
    np.testing.assert_allclose(V[theta + "ₜ"], p.detach().numpy(), rtol=1e-9, atol=1e-12)
    if cls.evaluates():
        optimizer.eval()
        np.testing.assert_allclose(V["xₜ"], p.detach().numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: case if isinstance(case, str) else "")
def test_every_letter_is_explained(name: str, options: dict[str, Any]) -> None:
    """By a line of its own, as an option of that name or in the legend; the parameter, gradient and step are known."""
    cls = OPTIMIZERS[name]
    text = formula(cls, **options)
    lines, legend, _ = read(text)
    words = re.findall(r"(?:^|, )(\S+) (?:is )?the ", text.rpartition(";")[2].strip())
    known = {*cls.options, *legend, *(left for left, _ in lines), *words, "gₜ", "∇fₜ", "t", "rows", "columns"}
    used = {letter for _, right in lines for letter in re.findall(r'V\["(.*?)"\]', right)}
    assert {letter.replace("ₜ₋₁", "ₜ") for letter in used} <= known


def test_a_function_of_whole_matrices_is_named_and_its_slots_are_not_written_out() -> None:
    first, second, _ = formula(OPTIMIZERS["soap"]).splitlines()
    assert first == "mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ"
    assert second.startswith("θₜ = (θₜ₋₁ − α·√(1 − β₂ᵗ⁻¹)·AdamInEigenbases(gₜ, mₜ) / (1 − β₁ᵗ⁻¹))")
    assert "vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²" in formula(OPTIMIZERS["soap"], max_precond_dim=1), "without bases"


def test_the_legend_says_with_what_a_slot_starts_that_asks_for_a_number() -> None:
    class Warm(Optimizer):
        """A mean that starts at a number which Python computes."""

        lr: float = 0.1
        first: float = 4.0
        mean = Slot("m", init=lambda h: math.sqrt(h.first))

        @staticmethod
        def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
            s.mean = m = (s.mean + g) / 2
            return p - h.lr * m

    try:
        assert formula(Warm).splitlines()[-1].strip() == "at the start m₀ = 2"
    finally:
        del OPTIMIZERS["warm"]
