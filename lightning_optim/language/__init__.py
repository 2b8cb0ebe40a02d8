"""The language of a page: values, functions, options and slots.

A page imports from this package and from `lightning_optim.core.optimizer`, and from nothing else of the library.
"""

from lightning_optim.errors import OptionError
from lightning_optim.language.axes import factored_axes
from lightning_optim.language.definition import COUPLED
from lightning_optim.language.eigenbases import (
    MOST_AXES,
    adam_in_eigenbases,
    axes_with_bases,
    first_bases,
    is_multiple,
    served_axes,
)
from lightning_optim.language.math import (
    clip,
    count,
    exp,
    hypot,
    is_odd,
    lerp,
    log,
    maximum,
    mean,
    minimum,
    norm,
    normal,
    rms,
    sign,
    sqrt,
    squarable,
    total,
    where,
)
from lightning_optim.language.matrices import rounded, whole
from lightning_optim.language.orthogonalize import orthogonalize
from lightning_optim.language.recursions import adam_step, ema, given, has_trust_ratio, in_turn, trust_ratio
from lightning_optim.language.slot import Slot
from lightning_optim.language.steps import cautious, decays, penalized, stepped
from lightning_optim.language.values import Condition, Operand, Options, Setting, Slots, Value
from lightning_optim.language.view import View, matrix_view

__all__ = [
    "COUPLED",
    "MOST_AXES",
    "Condition",
    "Operand",
    "OptionError",
    "Options",
    "Setting",
    "Slot",
    "Slots",
    "Value",
    "View",
    "adam_in_eigenbases",
    "adam_step",
    "axes_with_bases",
    "cautious",
    "clip",
    "count",
    "decays",
    "ema",
    "exp",
    "factored_axes",
    "first_bases",
    "given",
    "has_trust_ratio",
    "hypot",
    "in_turn",
    "is_multiple",
    "is_odd",
    "lerp",
    "log",
    "matrix_view",
    "maximum",
    "mean",
    "minimum",
    "norm",
    "normal",
    "orthogonalize",
    "penalized",
    "rms",
    "rounded",
    "served_axes",
    "sign",
    "sqrt",
    "squarable",
    "stepped",
    "total",
    "trust_ratio",
    "where",
    "whole",
]
