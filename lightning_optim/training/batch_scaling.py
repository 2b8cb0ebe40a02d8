"""How learning rates grow with the batch.

Granziol, Zohren & Roberts 2022, "Learning rates as a function of batch size: a random matrix theory approach to
neural network training", JMLR 23(173), arXiv:2006.09092.
"""

from __future__ import annotations

import math
from typing import Literal

import torch

Rule = Literal["sqrt", "linear"]

# By the name of the class. SGD's largest stable step is 2 over the top curvature of the batch, which falls like 1 / B
# while noise dominates it; a denominator that grows like the root of the curvature leaves the root of that.
RULES: dict[Rule, frozenset[str]] = {
    "linear": frozenset({"SGD", "SGDW", "ASGD", "PNM", "LARS"}),
    "sqrt": frozenset(
        {
            *("Adam", "AdamW", "AdaMax", "Adamax", "NAdam", "RAdam", "SparseAdam", "Adan", "AdaBelief", "ACProp"),
            *("AdaPNM", "Adafactor", "Adagrad", "Adadelta", "DiffGrad", "LAMB", "RMSprop", "ScalarRMSprop"),
            *("MomentEstimationSGD",),  # divides by the norm of the gradient
            *("Lion", "GeneralizedSignSGD", "Muon"),  # the custom for methods of sign
        }
    ),
}


def rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    """The rule for an optimizer of torch or of this package, or None where none is known.

    None is known for classes of other libraries; for Padam, which lies between the two; for KOALA, LBFGS and Rprop,
    whose steps are not made by the learning rate alone.

    Example:
        >>> rule_of(torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]))
        'sqrt'
    """
    for cls in type(optimizer).__mro__:
        if cls.__module__.startswith(("torch.optim", "lightning_optim")):
            return next((rule for rule, names in RULES.items() if cls.__name__ in names), None)
    return None


def scale(batch: int, reference: int, rule: Rule, most: float = math.inf) -> float:
    """The factor on a learning rate that was found at batch size `reference`, at most `most`.

    Example:
        >>> scale(4096, 256, "linear"), scale(4096, 256, "sqrt"), scale(4096, 256, "linear", most=8)
        (16.0, 4.0, 8)
    """
    ratio = batch / reference
    return min(math.sqrt(ratio) if rule == "sqrt" else ratio, most)
