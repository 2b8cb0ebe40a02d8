"""Noise on gradients.  Neelakantan et al. 2015, arXiv:1511.06807, equation 1.

The variance is sigma_t^2 = eta / (1 + t)^gamma with t = 0, 1, ... The kinds "second_moment" and "moments" multiply it
by an estimate of the variance of the gradient of each element over batches, so that eta is relative to the noise of the
gradient itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from lightning_optim.distributed.global_index import GlobalIndex
from lightning_optim.language import (
    Operand,
    Options,
    Setting,
    Slot,
    Slots,
    Value,
    ema,
    maximum,
    normal,
    sqrt,
    squarable,
)
from lightning_optim.stages.stage import Stage

Kind = Literal["isotropic", "second_moment", "moments"]


class Noise(Stage):
    """Add normal numbers to the gradient before the update.

    Args:
        indices: The global index of the local elements of each parameter.
        kind: The unit of the noise: "isotropic" is 1 for all elements, "second_moment" the root of the second moment of
            the optimizer, "moments" the standard deviation of the gradient, from two slots of the stage.
        eta: The variance at the first step, in the square of this unit.
        gamma: The exponent with which the variance decays.
        seed: The seed, below 2^64.
        decay: The decay of the two slots of "moments".
        start: The number of first steps without noise.
        in_pass: Whether `before` runs in the pass of the update. If not, the callback runs it on the gradients.
        second_moment: For that kind, the slot of the optimizer, the option that is its decay, and the index of the
            decay if that option is a tuple, as a string.
    """

    name = "gradient_noise"
    needs_normals = True
    grad_mean = Slot(exact=True)
    grad_square = Slot(signed=False, exact=True)

    def __init__(
        self,
        indices: Mapping[Tensor, GlobalIndex],
        kind: Kind = "isotropic",
        eta: float = 0.01,
        gamma: float = 0.55,
        seed: int = 0,
        decay: float = 0.99,
        start: int = 0,
        in_pass: bool = True,
        second_moment: tuple[str, str, str] = ("exp_avg_sq", "betas", "1"),
    ) -> None:
        self.indices, self.kind, self.eta, self.gamma, self.seed = indices, kind, eta, gamma, seed
        self.decay, self.start, self.in_pass, self.second_moment = decay, start, in_pass, second_moment
        self.slots = type(self).slots if kind == "moments" else {}
        self.steps = 0

    @property
    def sigma(self) -> float:
        """The standard deviation of the noise of the next step, in the unit of the kind."""
        t = self.steps
        if t < self.start:
            return 0.0
        try:
            return float((self.eta / (1 + t) ** self.gamma) ** 0.5)
        except OverflowError:
            return 0.0

    def options(self) -> dict[str, Any]:
        """The options of `before` for the next step."""
        return {
            "kind": self.kind,
            "sigma": self.sigma,
            "seed_low": float(self.seed & 0xFFFFFFFF),
            "seed_high": float(self.seed >> 32 & 0xFFFFFFFF),
            "t": float(self.steps),
            "decay": self.decay,
            "debias": 1 - self.decay ** (self.steps + 1),
            "second_moment": self.second_moment,
        }

    def advance(self) -> dict[str, Any] | None:
        options = self.options() if self.in_pass else None
        self.steps += 1
        return options

    @staticmethod
    def before(g: Value, s: Slots, h: Options, of: Options) -> Value:
        size: Operand = 1.0
        if h.kind == "moments":
            known = squarable(g)  # an optimizer of torch is given the gradient as it is
            s.grad_mean = ema(s.grad_mean, known, h.decay)
            s.grad_square = ema(s.grad_square, known * known, h.decay)
            mean = s.grad_mean / h.debias
            size = sqrt(maximum(s.grad_square / h.debias - mean * mean, 0.0))
        elif h.kind == "second_moment":
            slot, option, item = map(str, h.second_moment)
            decay: Setting = getattr(of, option)
            decay = decay[int(item)] if item else decay
            # The slot is that of the step before. In the first step it is zero, and so is the noise.
            size = sqrt(getattr(s, slot)) * (1 / sqrt(maximum(1 - decay ** (of.t - 1), 1e-12)))
        if not h.sigma:
            return g
        return g + h.sigma * (size * normal(h.seed_low, h.seed_high, h.t))

    def global_index_of(self, p: Tensor) -> GlobalIndex:
        return self.indices[p]

    def __repr__(self) -> str:
        return f"Noise {self.kind} (eta={self.eta}, gamma={self.gamma}), {self.steps} steps, sigma {self.sigma:.3g}"
