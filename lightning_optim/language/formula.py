"""Prints the formula of an optimizer from its traced update: `print(formula(Adan))`.

`scalars` and `update` of the page are called once on symbols, so the printed formula is what runs. Letters come from
the page: those of slots from `Slot.letter`, those of options from `LETTERS` and from `letters` of the page, those of
intermediate values from the names of local variables. Sums and products are put in order, and √a / √b becomes √(a / b);
nothing else is rearranged. Terms of an option that its value 0 switches off (a momentum, a clipping) are left out, as
in the program.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import CodeType, FrameType, SimpleNamespace
from typing import Any, Literal

import torch

from lightning_optim.language.definition import Definition
from lightning_optim.language.notation import LATEX, TEXT
from lightning_optim.language.sheet import Sheet, is_derived
from lightning_optim.language.slot import Slot
from lightning_optim.language.symbols import Kind, State, Symbol, Tracer

# Letters of options, which a page may override. An item of a tuple is "betas.0".
LETTERS = {
    "p": "θ",
    "g": "g",
    "evaluated": "x",
    "lr": "α",
    "eps": "ε",
    "eps.0": "ε₁",
    "eps.1": "ε₂",
    "weight_decay": "λ",
    "beta": "β",
    "betas.0": "β₁",
    "betas.1": "β₂",
    "betas.2": "β₃",
    "momentum": "μ",
    "dampening": "τ",
    "loss": "L",
    "loss_second_moment": "L₂",
    "rho": "ρ",
    "rho_inf": "ρ∞",
    "count(tensor)": "n",
    "count(all)": "N",
}
# The meaning of letters that are no options, for the legend.
WORDS = {
    "loss": "the loss",
    "loss_second_moment": "the mean of the samples' squared losses",
    "count(tensor)": "the number of elements of the tensor",
    "count(all)": "the number of elements of all tensors",
}
SHARED = tuple(
    f"lightning_optim.language.{name}"
    for name in ("recursions", "rectification", "kalman", "schedule_free", "distance")
)
EXAMPLE = torch.Size([64, 32])  # formulas are printed for a matrix


def formula(cls: type[Definition], notation: Literal["text", "latex"] = "text", **options: Any) -> str:
    """The formula of an optimizer: a line for each slot and each named intermediate value, the parameter, and a legend.

    The legend tells which letters are which options, the first values of slots unless they are 0, and what other
    letters mean.

    Args:
        cls: The optimizer.
        notation: "text" for Unicode, "latex" for lines of an `aligned` environment.
        **options: Options that differ from the defaults.

    Returns:
        The formula, and in text a last line that tells which letters are which options.

    Example:
        >>> from lightning_optim import Lion
        >>> print(formula(Lion))
        mₜ = β₂·mₜ₋₁ + (1 − β₂)·gₜ
        θₜ = θₜ₋₁·(1 − η·λ) − η·sign(β₁·mₜ₋₁ + (1 − β₁)·gₜ)
        with η = lr, β₁, β₂ = betas, λ = weight_decay
    """
    derivation = Derivation(cls, options)
    sheets = [Sheet(function, derivation) for function in derivation.functions]
    if notation == "latex":
        return " \\\\\n".join(line for sheet in sheets for line in sheet.lines(LATEX))
    lines = [line for sheet in sheets for line in sheet.lines(TEXT)]
    return "\n".join([*lines, derivation.legend(sheets[0])])


@dataclass
class TracedFunction:
    """One traced function of a page (`lightning_optim.language.sheet.Traced`)."""

    outputs: dict[str, Any]
    names: dict[Symbol, str]
    predicted: frozenset[str] = frozenset()
    corrected: frozenset[str] = frozenset()
    predicts: bool = False


class Derivation:
    """A page called on symbols, under its default options and `options`."""

    def __init__(self, cls: type[Definition], options: Mapping[str, Any]) -> None:
        declared: Any = cls
        self.cls, self.tracer = cls, Tracer()
        self.slots: dict[str, Any] = declared.slots
        values = {name: option.default for name, option in declared.options.items() if not option.shared}
        values = {**values, "maximize": False, "cautious": False, "cautious_decay": False, **options}
        cls.check_all(values)
        cls.complete(values)
        plain: Any = SimpleNamespace(**values)
        self.plain = plain
        self.traits = traits = cls.traits(plain, EXAMPLE, torch.float32, len(EXAMPLE))
        axes = {slot.without: slot.without for slot in self.slots.values() if slot.without}
        settings = {**values, **traits, **{name: axis for name, axis in axes.items() if name in traits}}
        self.h = {name: self.tracer.host(name, value) for name, value in settings.items()}
        self.h.update({name: self.tracer.host(name, 1.0) for name in cls.inputs})
        self.names: dict[Symbol, str] = {}
        self.used: dict[str, None] = {}  # names of options and of `WORDS` in the formula, in order
        self.read: dict[str, None] = {}  # names of slots in the formula, in order
        t = self.tracer.symbol("host", ("t",), Kind.HOST, 0)
        self.h.update(self.call(cls.scalars, SimpleNamespace(**self.h), t))
        self.functions = self._functions()

    def _functions(self) -> list[TracedFunction]:
        after = self._outputs(self.cls.update, "p", "g")
        if self.cls.evaluates():
            average = {"evaluated": self._outputs(self.cls.evaluate, "p")["p"]}
            of_now = frozenset((*self.slots, "p"))
            return [TracedFunction(after, self.names), TracedFunction(average, self.names, predicted=of_now)]
        if not self.cls.predicts():
            return [TracedFunction(after, self.names)]
        first = self._outputs(self.cls.predict, "p")
        corrected = frozenset(first) & frozenset(after)
        return [
            TracedFunction(first, self.names, corrected=corrected, predicts=True),
            TracedFunction(after, self.names, frozenset(first), corrected),
        ]

    def _outputs(self, function: Callable[..., Any], *given: str) -> dict[str, Any]:
        """Call a function of the page; returns the values that it assigns to slots, and the new parameter as "p"."""
        view = self.cls.matrices(self.plain, EXAMPLE)
        matrices = [name for name, slot in self.slots.items() if slot.of(view).per == "matrix"]

        def read(name: str) -> Symbol:
            word, kind = ("matrix", Kind.MATRIX) if name in matrices else ("element", Kind.ELEMENT)
            return self.tracer.symbol(word, (name,), kind, 0)

        s = State(read)
        values = [self.tracer.symbol("element", (name,), Kind.ELEMENT, 0) for name in given]
        new = self.call(function, *values, s, SimpleNamespace(**self.h))
        self.read.update(dict.fromkeys(s.seen))
        own = {name: value for name, value in s.written.items() if name not in matrices}  # what a function writes
        return {**own, "p": new}

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the page, and collect the names of local variables in it and in what it calls."""

        named_in = {*(parent.__module__ for parent in self.cls.__mro__), *SHARED}

        def note(frame: FrameType, event: str, _: Any) -> None:
            if event == "return" and frame.f_globals.get("__name__") in named_in:
                self._note(frame.f_code, frame.f_locals)

        before = sys.getprofile()
        sys.setprofile(note)
        try:
            return function(*args)
        finally:
            sys.setprofile(before)

    def _note(self, code: CodeType, found: Mapping[str, Any]) -> None:
        arguments = code.co_varnames[: code.co_argcount] if code.co_name != "update" else ()
        for name, value in found.items():
            if is_derived(value) and name not in arguments:
                self.names[value] = name

    def letter(self, name: str) -> str:
        """The letter of an option, a slot or a local variable."""
        slot = self.slots.get(name)
        if slot is not None:
            return slot.letter or name
        return {**LETTERS, **self.cls.letters}.get(name, name)

    def note_use(self, name: str) -> None:
        """Add an option to the legend. A trait with the letter of an option counts as that option."""
        if name in self.traits:
            name = next((item for item, letter in LETTERS.items() if "." in item and letter == self.letter(name)), name)
        self.used[name] = None

    def legend(self, writer: Sheet) -> str:
        """What the letters mean: options, first values of slots unless they are 0, and other letters."""
        first = self._starts(writer)
        words = [(self.letter(name), what) for name, what in WORDS.items() if name in self.used]
        words += [
            (self.letter(name), "the parameter before its first step") for name in self.slots if name in self.used
        ]
        parts = ["with " + ", ".join(self._options())]
        if first:
            parts.append("at the start " + ", ".join(first))
        if words:
            (letter, what), *others = words
            parts.append(", ".join([f"{letter} is {what}", *map(" ".join, others)]))
        return ";\n     ".join(parts)

    def _starts(self, writer: Sheet) -> list[str]:
        """Equations with the first values of slots, unless they are 0."""
        found = []
        for name in self.read:
            slot, letter = self.slots[name], f"{TEXT.letter(self.letter(name))}₀"
            text = f"{TEXT.letter(self.letter('p'))}₀" if slot.copies else writer.write(self._start(slot))
            if text not in ("0", letter, TEXT.letter(self.letter(name))):  # an option may have that letter
                found.append(TEXT.equation(letter, text))
        return found

    def _start(self, slot: Slot) -> Any:
        """The first value of a slot: a symbol, or a number if the page computes one."""
        try:
            return slot.start(SimpleNamespace(**self.h))
        except TypeError:  # as `float(h.name)` raises
            return slot.start(self.plain)

    def _options(self) -> list[str]:
        """Which letters are which options."""
        own: Any = self.cls
        entries = []
        for option in own.options:
            names = sorted(name for name in self.used if name.partition(".")[0] == option)
            letters = [self.letter(name) for name in names]
            if names and letters != [option]:
                entries.append(f"{', '.join(letters)} = {option}")
        return entries
