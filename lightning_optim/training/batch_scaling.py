"""How the learning rate grows with the batch size.

Granziol, Zohren & Roberts 2022, "Learning rates as a function of batch size: a random matrix theory approach to
neural network training", JMLR 23(173), arXiv:2006.09092.
"""

from __future__ import annotations

from typing import get_args

import torch

from lightning_optim.core.optimizer import Optimizer
from lightning_optim.language.definition import BatchScaling

Rule = BatchScaling
RULES: tuple[Rule, ...] = get_args(Rule)

# The rule of torch's optimizers, by class name. SGD's largest stable step is 2 over the top curvature of the batch,
# which falls like 1 / B as long as noise dominates it. Adaptive methods divide by the root of the curvature, so the
# root of B remains. Not listed: LBFGS and Rprop, whose steps do not depend on the learning rate alone.
TORCH: dict[str, Rule] = {
    **dict.fromkeys(("SGD", "ASGD"), "linear"),
    **dict.fromkeys(("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "SparseAdam"), "sqrt"),
    **dict.fromkeys(("Adadelta", "Adafactor", "Adagrad", "RMSprop", "Muon"), "sqrt"),
}


def rule_of(optimizer: torch.optim.Optimizer) -> Rule | None:
    """The rule for an optimizer: `batch_scaling` of its page for ours, a table for torch's.

    Returns:
        The rule, or None where none is known. None is known for classes of other libraries that do not inherit from
        torch's or ours.

    Example:
        >>> from lightning_optim import Lion
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> rule_of(Lion([weight])), rule_of(torch.optim.SGD([weight]))
        ('sqrt', 'linear')
    """
    if isinstance(optimizer, Optimizer):
        return optimizer.batch_scaling
    of_torch = (cls.__name__ for cls in type(optimizer).__mro__ if cls.__module__.startswith("torch.optim"))
    return TORCH.get(next(of_torch, ""))
