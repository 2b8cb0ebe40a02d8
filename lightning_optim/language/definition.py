"""What a page of an optimizer declares, and what it may leave out."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_optim.language.options import Declared, shared
from lightning_optim.language.values import Operand, Options, Slots, Value

BatchScaling = Literal["sqrt", "linear"]


class Definition(Declared):
    """The mathematics of one optimizer: options as annotated attributes, slots, scalars of a step and one update.

    Attributes:
        title: The method's name for people.
        paper: Authors, year and number.
        advice: One sentence for those who come from AdamW or SGD.
        batch_scaling: How the learning rate grows with the batch size: "sqrt" for adaptive methods, "linear" for those
            that step like SGD, None where no rule is known. Every page states it.
        recommended: Options to start with on a small classifier.
        ranges: Ranges of options that differ from `options.RANGES`.
        letters: Letters in the printed formula, of options ("lr"; "betas.0") and of local variables, where they differ
            from `formula.LETTERS`; "p" is the parameter.
        inputs: What the update reads besides options: "loss", "loss_second_moment".
        real_only: Why complex parameters are refused; empty where they are served.
    """

    params: Any
    maximize: bool = shared(default=False, kw_only=True)
    state_bits: Literal[32, 16, 8] = shared(default=32, kw_only=True)
    state_format: Literal["log", "dynamic"] = shared(default="log", kw_only=True)
    engine: str = shared(default="auto", kw_only=True)
    capturable: bool = shared(default=False, kw_only=True)

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    advice: ClassVar[str] = ""
    batch_scaling: ClassVar[BatchScaling | None] = None
    recommended: ClassVar[dict[str, Any]] = {}
    ranges: ClassVar[dict[str, Any]] = {}
    letters: ClassVar[dict[str, str]] = {}
    inputs: ClassVar[tuple[str, ...]] = ()
    real_only: ClassVar[str] = ""

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        """What depends only on the options `h` and the step counter `t` (1 at the first step), in float64.

        Floats reach the update as numbers; a bool selects between two forms of it, by `where`. `t` is an int; under
        `capturable` both `t` and `h.lr` are tensors, and symbols where the formula is printed, so roots and choices are
        those of `lightning_optim.language`.
        """
        return {}

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        """What depends on the logical shape and the type of a tensor; `most_dims` is the most axes that any has.

        Not on `lr` or `weight_decay`, which schedules move.
        """
        return {}

    @staticmethod
    def predict(p: Value, s: Slots, h: Options) -> Value:
        """For methods that move before the gradient is taken: the new parameter, there."""
        return p

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        """The new parameter from the parameter, the gradient, the slots `s` (which it assigns) and the options `h`."""
        raise NotImplementedError

    @classmethod
    def predicts(cls) -> bool:
        """Whether it moves before the gradient is taken."""
        return cls.predict is not Definition.predict

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        """Refuse combinations of options that have no meaning; may complete `options` in place."""
