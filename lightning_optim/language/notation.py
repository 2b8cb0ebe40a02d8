"""How mathematics is set: in lines of plain Unicode for a terminal and a docstring, or in LaTeX.

A notation sets parts that are text already: letters, fractions, roots. What the parts are, and where parentheses
stand, `lightning_optim.language.expressions` decides.
"""

from __future__ import annotations

import re
import unicodedata

RAISED = dict(zip("0123456789-−+t ", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻⁺ᵗ ", strict=True))
LOWERED = {"t": "ₜ", "t-1": "ₜ₋₁", "": ""}
MARKS = {"\u0302": "hat", "\u0303": "tilde", "\u0304": "bar"}
LETTER = re.compile(r"(\w)([\u0302-\u0304]?)([₀-₉∞]*)([ʷᵛ⁺⁻′]*)")
WIDTH = 84  # a choice above this takes two lines


class Unicode:
    """Mathematics in plain text; a program can read back what it says."""

    times = "·"
    minus = "−"
    at_least = "≥"
    fractions_are_boxes = False

    def number(self, x: float) -> str:
        """A number: 1 for 1.0, 10⁻¹⁸ for 1e-18."""
        mantissa, _, exponent = f"{x:g}".partition("e")
        if not exponent:
            return mantissa.replace("-", self.minus)
        power = self.power("10", str(int(exponent)))
        return power if mantissa == "1" else f"{mantissa}{self.times}{power}"

    def letter(self, letter: str, when: str = "") -> str:
        """A letter or a word, with the step it belongs to: "t", "t-1" or none."""
        return unicodedata.normalize("NFC", letter) + LOWERED[when]

    def power(self, base: str, exponent: str) -> str:
        """A power; the base is in parentheses already where it needs them."""
        if all(sign in RAISED for sign in exponent):
            return base + "".join(RAISED[sign] for sign in exponent)
        return f"{base}^{exponent if exponent.isalnum() else self.parenthesized(exponent)}"

    def fraction(self, above: str, below: str) -> str:
        """A quotient of two products."""
        return f"{above} / {below}"

    def root(self, x: str, is_atom: bool) -> str:
        """A square root."""
        return f"√{x}" if is_atom else f"√({x})"

    def parenthesized(self, x: str) -> str:
        """An expression that holds together."""
        return f"({x})"

    def absolute(self, x: str) -> str:
        """A magnitude."""
        return f"|{x}|"

    def norm(self, x: str, everywhere: bool) -> str:
        """The Euclidean norm of this tensor, or of all tensors together."""
        return f"‖{x}‖" + ("ₐₗₗ" if everywhere else "")

    def call(self, function: str, *args: str, everywhere: bool = False) -> str:
        """A function that has a name, of this tensor or of all tensors together."""
        return f"{function}{'ₐₗₗ' if everywhere else ''}({', '.join(args)})"

    def choice(self, a: str, condition: str, b: str) -> str:
        """One value where a condition holds, and else another."""
        return f"{a} if {condition} else {b}"

    def indicator(self, condition: str) -> str:
        """1 where a condition holds, and else 0."""
        return f"[{condition}]"

    def both(self, a: str, b: str) -> str:
        """Two conditions at once."""
        return f"{a} and {b}"

    def is_odd(self, t: str) -> str:
        """The condition that a whole number is odd."""
        return f"{t} is odd"

    def equation(self, left: str, right: str) -> str:
        """A line; a long choice is broken before its alternative."""
        if len(left) + len(right) > WIDTH and " else " in right:
            head, _, tail = right.rpartition(" else ")
            if head.count("(") == head.count(")"):
                right = f"{head}\n{' ' * (len(left) + 3)}else {tail}"
        return f"{left} = {right}"


class Latex(Unicode):
    """Mathematics for a page that is typeset: lines of an `aligned` environment."""

    times = r" \, "
    minus = "-"
    at_least = r"\ge"
    fractions_are_boxes = True

    def letter(self, letter: str, when: str = "") -> str:
        time = f"_{{{when}}}" if when else ""
        found = LETTER.fullmatch(unicodedata.normalize("NFD", letter))
        if found is None:
            word = letter.replace("_", r"\_")
            return (r"\nabla f" if letter == "∇f" else rf"\text{{{word}}}") + time
        base, mark, lowered, raised = found.groups()
        name = unicodedata.name(base)
        for kind, word in (("GREEK SMALL LETTER ", name[19:].lower()), ("GREEK CAPITAL LETTER ", name[21:].title())):
            if name.startswith(kind):
                base = "\\" + {"epsilon": "varepsilon", "lamda": "lambda", "Lamda": "Lambda"}.get(word, word)
        base = rf"\{MARKS[mark]}{{{base}}}" if mark else base
        above = unicodedata.normalize("NFKC", raised).replace("′", r"\prime ").replace("−", "-").strip()
        below = unicodedata.normalize("NFKC", lowered).replace("∞", r"\infty")
        index = ", ".join(part for part in (below, when) if part)
        return base + (f"^{{{above}}}" if above else "") + (f"_{{{index}}}" if index else "")

    def power(self, base: str, exponent: str) -> str:
        return f"{{{base}}}^{{{exponent}}}"

    def fraction(self, above: str, below: str) -> str:
        return rf"\frac{{{above}}}{{{below}}}"

    def root(self, x: str, is_atom: bool) -> str:
        return rf"\sqrt{{{x}}}"

    def parenthesized(self, x: str) -> str:
        return rf"\left({x}\right)"

    def absolute(self, x: str) -> str:
        return rf"\left|{x}\right|"

    def norm(self, x: str, everywhere: bool) -> str:
        return rf"\left\lVert {x}\right\rVert" + (r"_{\text{all}}" if everywhere else "")

    def call(self, function: str, *args: str, everywhere: bool = False) -> str:
        name = rf"\operatorname{{{function}}}" + (r"_{\text{all}}" if everywhere else "")
        return name + self.parenthesized(", ".join(args))

    def choice(self, a: str, condition: str, b: str) -> str:
        return rf"\begin{{cases}} {a} & \text{{if }} {condition} \\ {b} & \text{{else}} \end{{cases}}"

    def indicator(self, condition: str) -> str:
        return rf"\left[{condition}\right]"

    def both(self, a: str, b: str) -> str:
        return rf"{a} \text{{ and }} {b}"

    def is_odd(self, t: str) -> str:
        return rf"{t} \text{{ is odd}}"

    def equation(self, left: str, right: str) -> str:
        return rf"{left} &= {right}"


TEXT, LATEX = Unicode(), Latex()
