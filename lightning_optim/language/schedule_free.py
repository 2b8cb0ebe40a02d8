"""The recursion of Schedule-Free methods: gradients at y, between an iterate z and the average x of its values.

Defazio, Yang, Mehta, Mishchenko, Khaled & Cutkosky 2024, arXiv:2405.15682. The parameter holds y. Only z is stored, for
y = beta x + (1 - beta) z.
"""

from __future__ import annotations

from lightning_optim.language.math import lerp, maximum, where
from lightning_optim.language.values import Operand, Slots, Value

REFUSES = {
    "cautious": "its direction has no momentum, and goes against the gradient everywhere",
    "cautious_decay": "its weight decay is a part of the direction, which moves two points at once",
}


def largest_rate(s: Slots, rate: Operand) -> Value:
    """The largest learning rate up to now, which weighs the newest z in the average, so that a warm-up counts less."""
    return maximum(s.lr_max, rate)


def share(weight: Operand, weights: Operand) -> Value:
    """The share of the newest z in the average; 0 until some weight is not zero."""
    return where(weights > 0, weight / weights, 0.0)


def moved(y: Value, z: Value, d: Value, c: Value, gamma: Operand, beta: Operand) -> tuple[Value, Value]:
    """One step of y and z along d, without x: the same as z - gamma d, x + c (z - x), beta x + (1 - beta) z.

    Returns:
        The new y and the new z.
    """
    return y + c * (z - y) - gamma * (1 - beta * (1 - c)) * d, z - gamma * d


def average_of(y: Value, z: Value, beta: Operand) -> Value:
    """The average x."""
    return (y - (1 - beta) * z) / beta


def between(x: Value, z: Value, beta: Operand) -> Value:
    """The point y at which gradients are taken."""
    return lerp(z, x, beta)
