"""Files of the SOAP of its authors, which keeps the first moment in the bases and does not count the first gradient."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lightning_optim.core.state_layout import StateLayout
from lightning_optim.language.eigenbases import turned

# Its options, by their names here, and those without one.
OPTIONS = {"precondition_frequency": "frequency"}
LEFT = ("normalize_grads",)


def group_of(layout: StateLayout, group: dict[str, Any]) -> dict[str, Any]:
    """The group with the options of this package; the same object where it is no group of that program."""
    if not ("precondition_frequency" in group and "factor_0" in layout.slots):
        return group
    if group.get("normalize_grads"):
        warnings.warn(
            f"{type(layout).__name__} loads a run with normalize_grads=True, which it has not: from here on steps have "
            "the size that they have without it, and the learning rate is for others.",
            stacklevel=8,
        )
    found = {OPTIONS.get(key, key): value for key, value in group.items() if key not in LEFT}
    return {**found, "shampoo_beta": found["shampoo_beta"] if found.get("shampoo_beta", -1) >= 0 else None}


def slots_of(layout: StateLayout, slots: Mapping[str, Any]) -> dict[str, Any]:
    """The slots of one parameter: factors and bases by axis, and the first moment turned back."""
    factors, bases = slots.get("GG"), slots.get("Q")
    if not (isinstance(factors, list) and isinstance(bases, list) and "factor_0" in layout.slots):
        return {**slots}
    found = {name: slots[name] for name in ("step", "exp_avg", "exp_avg_sq") if name in slots}
    pairs = {
        i: (factor, basis)
        for i, (factor, basis) in enumerate(zip(factors, bases, strict=True))
        if isinstance(factor, Tensor) and isinstance(basis, Tensor) and len(factor) > 1
    }
    for i, (factor, basis) in pairs.items():
        found[f"factor_{i}"], found[f"basis_{i}"] = factor, basis
    if "step" in found:
        found["step"] = found["step"] + 1  # with the gradient that has set up the bases
    m = found.get("exp_avg")
    if isinstance(m, Tensor) and pairs:
        whole = m.dim() == len(factors)
        axes = [m.shape[i] if whole else len(pairs[i][0]) if i in pairs else -1 for i in range(len(factors))]
        back = turned(m.reshape(1, *axes, 1), {i: basis.to(m.dtype).mT for i, (_, basis) in pairs.items()})
        found["exp_avg"] = back.reshape(m.shape)
    return found


def is_of_authors(slots: Any) -> bool:
    """Whether the state of a parameter is that of the authors' program; others keep the first moment as it is."""
    return isinstance(slots, dict) and "GG" in slots and "precondition_frequency" in slots
