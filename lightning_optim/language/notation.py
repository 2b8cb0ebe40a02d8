"""The notations of a printed formula: plain Unicode for a terminal and a docstring, and LaTeX.

A notation composes strings: letters, fractions, roots. `lightning_optim.language.expressions` decides what to compose,
and where parentheses are needed.
"""

from __future__ import annotations

import re
import unicodedata

RAISED = dict(zip("0123456789-−+t ", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁻⁺ᵗ ", strict=True))
LOWERED = {"t": "ₜ", "t-1": "ₜ₋₁", "": ""}
MARKS = {"\u0302": "hat", "\u0303": "tilde", "\u0304": "bar"}
LETTER = re.compile(r"(\w)([\u0302-\u0304]?)([₀-₉∞]*)([ʷᵛ⁺⁻′]*)")
WIDTH = 84  # longer choices are printed on two lines


class Unicode:
    """Mathematics in plain text, which a program can parse."""

    times = "·"
    minus = "−"
    at_least = "≥"
    fractions_group = False  # whether a fraction needs no parentheses around its products

    def number(self, x: float) -> str:
        """A number: 1 for 1.0, 10⁻¹⁸ for 1e-18."""
        mantissa, _, exponent = f"{x:g}".partition("e")
        if not exponent:
            return mantissa.replace("-", self.minus)
        power = self.power("10", str(int(exponent)))
        return power if mantissa == "1" else f"{mantissa}{self.times}{power}"

    def letter(self, letter: str, when: str = "") -> str:
        """A letter or a word, with the index of its step: "t", "t-1" or none."""
        return unicodedata.normalize("NFC", letter) + LOWERED[when]

    def power(self, base: str, exponent: str) -> str:
        """A power. The base has parentheses where it needs them."""
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
        """An expression in parentheses."""
        return f"({x})"

    def absolute(self, x: str) -> str:
        """The absolute value."""
        return f"|{x}|"

    def norm(self, x: str, everywhere: bool) -> str:
        """The Euclidean norm of one tensor, or of all tensors together."""
        return f"‖{x}‖" + ("ₐₗₗ" if everywhere else "")

    def call(self, function: str, *args: str, everywhere: bool = False) -> str:
        """A call of a named function, of one tensor or of all tensors together."""
        return f"{function}{'ₐₗₗ' if everywhere else ''}({', '.join(args)})"

    def choice(self, a: str, condition: str, b: str) -> str:
        """`a` where the condition holds, else `b`."""
        return f"{a} if {condition} else {b}"

    def indicator(self, condition: str) -> str:
        """1 where the condition holds, else 0."""
        return f"[{condition}]"

    def both(self, a: str, b: str) -> str:
        """The conjunction of two conditions."""
        return f"{a} and {b}"

    def is_odd(self, t: str) -> str:
        """The condition that a whole number is odd."""
        return f"{t} is odd"

    def equation(self, left: str, right: str) -> str:
        """An equation. A long choice continues on a second line before its alternative."""
        if len(left) + len(right) > WIDTH and " else " in right:
            head, _, tail = right.rpartition(" else ")
            if head.count("(") == head.count(")"):
                right = f"{head}\n{' ' * (len(left) + 3)}else {tail}"
        return f"{left} = {right}"


class Latex(Unicode):
    """LaTeX: lines of an `aligned` environment."""

    times = r" \, "
    minus = "-"
    at_least = r"\ge"
    fractions_group = True

    def letter(self, letter: str, when: str = "") -> str:
        time = f"_{{{when}}}" if when else ""
        found = LETTER.fullmatch(unicodedata.normalize("NFD", letter))
        if found is None:
            word = letter.replace("_", r"\_")
            return (r"\nabla f" if letter == "∇f" else rf"\text{{{word}}}") + time
        base, mark, lowered, raised = found.groups()
        name = unicodedata.name(base)
        for prefix, word in (("GREEK SMALL LETTER ", name[19:].lower()), ("GREEK CAPITAL LETTER ", name[21:].title())):
            if name.startswith(prefix):
                base = "\\" + {"epsilon": "varepsilon", "lamda": "lambda", "Lamda": "Lambda"}.get(word, word)
        base = rf"\{MARKS[mark]}{{{base}}}" if mark else base
        above = unicodedata.normalize("NFKC", raised).replace("′", r"\prime ").replace("−", "-").strip()
        below = unicodedata.normalize("NFKC", lowered).replace("∞", r"\infty")
        index = ", ".join(word for word in (below, when) if word)
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
