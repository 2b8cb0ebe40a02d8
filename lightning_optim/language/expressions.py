"""Prints traced expressions: the order of terms and factors, powers, norms, roots, and parentheses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lightning_optim.language.notation import Unicode
from lightning_optim.language.symbols import Symbol, is_element

# Precedences of expressions. An expression gets parentheses where a higher precedence is required.
CHOICE, SUM, PRODUCT, POWER, ATOM = range(5)

Term = tuple[list[Any], list[Any], int]  # factors of the numerator, factors of the denominator, sign
Text = tuple[str, int]  # an expression in print, and its precedence


class Writer:
    """Prints the value of a symbol in one notation. A value with a letter is printed as its letter."""

    notation: Unicode
    assumed: dict[Symbol, bool]  # conditions, and whether they hold where the writer is

    def has_letter(self, value: Symbol) -> bool:
        """Whether a value is printed as its letter and not written out."""
        raise NotImplementedError

    def letter_of(self, value: Symbol) -> str:
        """The letter of a value that has one."""
        raise NotImplementedError

    def input(self, name: str) -> str:
        """The letter of an option, or of a value from before the step."""
        raise NotImplementedError

    def write(self, value: Any, level: int = CHOICE) -> str:
        """Print an expression, in parentheses where its precedence is below `level`."""
        value = self._resolved(value)
        if not isinstance(value, Symbol):
            text, own = self.notation.number(float(value)), ATOM if value >= 0 else SUM
        elif self.has_letter(value):
            text, own = self.letter_of(value), ATOM
        else:
            text, own = getattr(self, f"_{value.name}")(*value.args)
        return text if own >= level else self.notation.parenthesized(text)

    def _resolved(self, value: Any) -> Any:
        """A value under the assumed conditions: if it is a choice that they decide, the chosen value."""
        while self._is(value, "where") and value.args[0] in self.assumed:
            value = value.args[1] if self.assumed[value.args[0]] else value.args[2]
        return value

    def _under(self, condition: Any, holds: bool, value: Any, level: int) -> str:
        """Print an expression where a condition holds, or does not hold."""
        if not isinstance(condition, Symbol):
            return self.write(value, level)
        self.assumed[condition] = holds
        try:
            return self.write(value, level)
        finally:
            del self.assumed[condition]

    def _is(self, value: Any, *names: str) -> bool:
        """Whether a value is written out and is a call of one of these functions."""
        return isinstance(value, Symbol) and value.name in names and not self.has_letter(value)

    def _host(self, name: str) -> Text:
        return self.input(name), ATOM

    def _element(self, name: str) -> Text:
        return self.input(name), ATOM

    def _count(self, over: str) -> Text:
        return self.input(f"count({over})"), ATOM

    # ------------------------------------------------------------------ sums

    def _add(self, a: Any, b: Any) -> Text:
        return self._sum([*self._terms(a, 1), *self._terms(b, 1)])

    def _sub(self, a: Any, b: Any) -> Text:
        return self._sum([*self._terms(a, 1), *self._terms(b, -1)])

    def _neg(self, a: Any) -> Text:
        return self._sum(list(self._terms(a, -1)))

    def _lerp(self, a: Any, b: Any, weight: Any) -> Text:
        return self._sum([([complement(weight), a], [], 1), ([weight, b], [], 1)])

    def _mul(self, a: Any, b: Any) -> Text:
        return self._sum([([a, b], [], 1)])

    def _div(self, a: Any, b: Any) -> Text:
        return self._sum([([a], [b], 1)])

    def _terms(self, value: Any, sign: int) -> Iterator[Term]:
        value = self._resolved(value)
        if self._is(value, "neg"):
            yield from self._terms(value.args[0], -sign)
        elif self._is(value, "add", "sub"):
            yield from self._terms(value.args[0], sign)
            yield from self._terms(value.args[1], sign if value.name == "add" else -sign)
        elif self._is(value, "lerp"):
            a, b, weight = value.args
            yield [complement(weight), a], [], sign
            yield [weight, b], [], sign
        else:
            yield [value], [], sign

    def _sum(self, terms: list[Term]) -> Text:
        terms = without_cancelled_ones(terms)
        text, level = "", SUM
        minus = self.notation.minus
        for above, below, sign_of_term in terms:
            term, own, sign = self._product(above, below, sign_of_term)
            if text:
                text += f" {minus if sign < 0 else '+'} {term}"
            else:
                text = f"{minus}{term}" if sign < 0 else term
                level = own if sign > 0 and len(terms) == 1 else SUM
        return text, level

    # ------------------------------------------------------------------ products

    def _product(self, above: Iterable[Any], below: Iterable[Any], sign: int) -> tuple[str, int, int]:
        """A product or quotient without its sign, its precedence, and the sign."""
        over: list[Any] = []
        under: list[Any] = []
        for factor in above:
            sign *= self._collect(factor, over, under)
        for factor in below:
            sign *= self._collect(factor, under, over)
        self._join_roots(over, under)
        if not under:
            return *self._times(over), sign
        if self.notation.fractions_group:
            return self.notation.fraction(self._alone(over), self._alone(under)), POWER, sign
        (top, _), (bottom, tightness) = self._times(over), self._times(under)
        bottom = bottom if tightness >= POWER else self.notation.parenthesized(bottom)
        return self.notation.fraction(top, bottom), PRODUCT, sign

    def _collect(self, value: Any, over: list[Any], under: list[Any]) -> int:
        """Collect the factors of numerator and denominator of a value; returns the sign."""
        value = self._resolved(value)
        if self._is(value, "mul", "div"):
            a, b = value.args
            second = (over, under) if value.name == "mul" else (under, over)
            return self._collect(a, over, under) * self._collect(b, *second)
        if self._is(value, "neg"):
            return -self._collect(value.args[0], over, under)
        if not isinstance(value, Symbol) and value < 0:
            return -self._collect(-value, over, under)
        if isinstance(value, Symbol) or value != 1:
            over.append(value)
        return 1

    def _join_roots(self, over: list[Any], under: list[Any]) -> None:
        """√a / √b is √(a / b)."""
        for a in [x for x in over if self._is(x, "sqrt")]:
            b = next((x for x in under if self._is(x, "sqrt")), None)
            if b is not None and not self._is_square(a.args[0]) and not self._is_square(b.args[0]):
                over[over.index(a)] = a.record("sqrt", a.args[0] / b.args[0])
                under.remove(b)

    def _times(self, factors: list[Any]) -> Text:
        counts = {id(factor): (factor, sum(factor is other for other in factors)) for factor in factors}
        texts = [
            self.write(x, POWER) if n == 1 else self.notation.power(self.write(x, ATOM), str(n))
            for x, n in counts.values()
        ]
        return self.notation.times.join(texts) or "1", PRODUCT if len(texts) > 1 else POWER

    def _alone(self, factors: list[Any]) -> str:
        """A product in a fraction that groups it without parentheses."""
        return self.write(factors[0]) if len(factors) == 1 else self._times(factors)[0]

    def _pow(self, base: Any, exponent: Any) -> Text:
        if exponent == -0.5:
            root, _ = self._sqrt(base)
            return self.notation.fraction("1", root), PRODUCT
        return self.notation.power(self.write(base, ATOM), self.write(exponent).replace(" ", "")), POWER

    # ------------------------------------------------------------------ functions

    def _sqrt(self, x: Any) -> Text:
        x = self._resolved(x)
        if self._is_square(x):
            return self.notation.norm(self.write(x.args[0].args[0]), x.args[1] == "all"), ATOM
        if self._is(x, "div") and self._is_square(x.args[0]) and self._is(x.args[1], "count"):
            square, everywhere = x.args[0].args[0], x.args[0].args[1] == "all"
            return self.notation.call("RMS", self.write(square.args[0]), everywhere=everywhere), ATOM
        text = self.write(x)
        return self.notation.root(text, is_atom=self.write(x, ATOM) == text), ATOM

    def _is_square(self, x: Any) -> bool:
        """Whether it is a sum of squares."""
        return (
            self._is(x, "total") and x.args[2] == "sum" and self._is(x.args[0], "mul") and len(set(x.args[0].args)) == 1
        )

    def _total(self, x: Any, over: str, by: str) -> Text:
        if by == "sum" and self._is(x, "mul") and len(set(x.args)) == 1:
            return self.notation.power(self.notation.norm(self.write(x.args[0]), over == "all"), "2"), POWER
        return self.notation.call(by, self.write(x), everywhere=over == "all"), ATOM

    def _mean(self, x: Any, axis: Any) -> Text:
        return self.notation.call("mean", self.write(x), str(axis)), ATOM

    def _whole(self, function: Any, *args: Any) -> Text:
        """A function of whole matrices by its name in one word, of its matrices."""
        name = repr(function).title().replace("_", "")
        return self.notation.call(name, *(self.write(x) for x in args if is_element(x))), ATOM

    def _abs(self, x: Any) -> Text:
        return self.notation.absolute(self.write(x)), ATOM

    def _squarable(self, x: Any) -> Text:
        return self.notation.call("squarable", self.write(x)), ATOM

    def _sign(self, x: Any) -> Text:
        return self.notation.call("sign", self.write(x)), ATOM

    def _exp(self, x: Any) -> Text:
        return self.notation.call("exp", self.write(x)), ATOM

    def _log(self, x: Any) -> Text:
        return self.notation.call("log", self.write(x)), ATOM

    def _maximum(self, a: Any, b: Any) -> Text:
        return self.notation.call("max", self.write(a), self.write(b)), ATOM

    def _minimum(self, a: Any, b: Any) -> Text:
        return self.notation.call("min", self.write(a), self.write(b)), ATOM

    # ------------------------------------------------------------------ choices

    def _where(self, condition: Any, a: Any, b: Any) -> Text:
        test = self.write(condition)
        while self._is(a, "where") and (a.args[2] is b or a.args[2] == b):
            test, a = self.notation.both(test, self.write(a.args[0])), a.args[1]
        if (a, b) == (1, 0):
            return self.notation.indicator(test), ATOM
        first, other = self._under(condition, True, a, SUM), self._under(condition, False, b, CHOICE)
        return self.notation.choice(first, test, other), CHOICE

    def _gt(self, a: Any, b: Any) -> Text:
        return f"{self.write(a, SUM)} > {self.write(b, SUM)}", CHOICE

    def _ge(self, a: Any, b: Any) -> Text:
        return f"{self.write(a, SUM)} {self.notation.at_least} {self.write(b, SUM)}", CHOICE

    def _is_odd(self, t: Any) -> Text:
        return self.notation.is_odd(self.write(t)), CHOICE


def without_cancelled_ones(terms: list[Term]) -> list[Term]:
    """A sum without 1 and -1 that cancel each other: 1 - (1 - β) is β."""
    ones = [(i, sign) for i, (above, below, sign) in enumerate(terms) if above == [1] and not below]
    ups, downs = ([i for i, sign in ones if sign == which] for which in (1, -1))
    gone = {i for pair in zip(ups, downs, strict=False) for i in pair}
    return [term for i, term in enumerate(terms) if i not in gone]


def complement(weight: Any) -> Any:
    """1 - weight, simplified to β where the weight is 1 - β."""
    if not isinstance(weight, Symbol):
        return round(1 - weight, 12)
    return weight.args[1] if weight.name == "sub" and weight.args[0] == 1 else weight.record("sub", 1.0, weight)
