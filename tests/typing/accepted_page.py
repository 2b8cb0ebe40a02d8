"""A user's own optimizer, which type checkers must accept. It runs as well."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import nn

from lightning_optim import Optimizer, OptionError
from lightning_optim.language import Operand, Options, Slot, Slots, Value, given, maximum, norm, sqrt, where


def a_page_is_an_optimizer() -> None:
    class Careful(Optimizer, name="careful"):
        """Momentum that stops where it disagrees with the gradient."""

        title = "Careful"
        batch_scaling = "linear"
        recommended: ClassVar[dict[str, Any]] = {"lr": 0.01}

        lr: float = 0.1
        betas: tuple[float, float] = (0.9, 0.99)
        floor: float | None = None
        kind: Literal["plain", "scaled"] = "scaled"
        nesterov: bool = False

        exp_avg = Slot("m")
        exp_avg_sq = Slot("v", signed=False, init=lambda h: h.lr)
        count = Slot("k", per="optimizer")

        @classmethod
        def check(cls, options: dict[str, Any]) -> None:
            if options["nesterov"] and options["kind"] == "plain":
                raise OptionError("Careful: nesterov needs kind='scaled'.")

        @staticmethod
        def scalars(h: Options, t: Operand) -> dict[str, Operand]:
            return {"correction": 1 - h.betas[0] ** t, "late": where(t > 2, 1.0, 0.0)}

        @staticmethod
        def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
            b1, b2 = h.betas
            if h.lr:
                g = g / maximum(norm(g), 1.0)
            s.exp_avg = m = s.exp_avg + (1 - b1) * (g - s.exp_avg)
            s.count = s.count + 1.0
            if h.nesterov:
                m = b1 * m + (1 - b1) * g
            if h.kind == "scaled":
                s.exp_avg_sq = b2 * s.exp_avg_sq + (1 - b2) * g * g
                m = m / (sqrt(s.exp_avg_sq) + (h.floor if given(h.floor) else 1e-8))
            return p - h.lr * where(m * g > 0, m, h.late * g) / h.correction

    weight = nn.Parameter(torch.ones(2))
    optimizer = Careful([weight], lr=0.5, betas=(0.5, 0.5), nesterov=True, floor=1e-3)
    weight.square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert (weight < 1).all()
