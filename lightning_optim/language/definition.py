"""The definition of an optimizer: what a page declares, with defaults for what it leaves out."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from lightning_optim.errors import OptionError
from lightning_optim.language.options import Declared, shared
from lightning_optim.language.values import Operand, Options, Slots, Value
from lightning_optim.language.view import View

BatchScaling = Literal["sqrt", "linear"]

# Why pages refuse `cautious_decay`.
COUPLED = "its weight decay is a penalty in the gradient, and acts on no parameter by itself"


class Definition(Declared):
    """The mathematics of one optimizer: options as annotated attributes, slots, scalars and one update.

    Attributes:
        title: The name of the optimizer in prose.
        paper: Authors, year and arXiv number of the paper.
        advice: One sentence for users of AdamW or SGD.
        batch_scaling: How the learning rate grows with the batch size: "sqrt" for adaptive optimizers, "linear" for
            those that step like SGD, None where no rule is established. Every page states it.
        lr_from_adamw: How many times AdamW's learning rate it takes under default options, within what `advice` says;
            None where the two have nothing to do with each other, and the default of `lr` is the start.
        recommended: What did best in a few runs on the handwritten digits (`examples/digits`), a small network for
            which learning rates are large. `lightning-optim optimizers` shows them under "on digits". They are no
            recommendation for other models, for which the defaults are a start.
        ranges: The ranges of options that differ from `options.RANGES`.
        letters: The letters in the printed formula that differ from `formula.LETTERS`: of options ("lr", "betas.0"), of
            local variables, and of the parameter ("p").
        inputs: The inputs that the update reads besides options: "loss", "loss_second_moment".
        own_average: Whether the update averages its iterates and so replaces schedules that fall.
        lengths: Options that may be "total", the number of steps of the run.
        matrix_options: Names of the options that say which matrices a parameter is. A page that has them serves
            parameters by several rules, and has a trait "rule". Loading a checkpoint does not change them.
        real_only: Why complex parameters are refused; empty where they are supported.
        refuses: Options of all pages that have no meaning on this one, each with the reason: "its step is ...".
    """

    params: Any
    maximize: bool = shared(default=False, kw_only=True)
    cautious: bool = shared(default=False, kw_only=True)
    cautious_decay: bool = shared(default=False, kw_only=True)
    state_bits: Literal[32, 16, 8] = shared(default=32, kw_only=True)
    state_format: Literal["log", "dynamic"] = shared(default="log", kw_only=True)
    engine: str = shared(default="auto", kw_only=True)
    capturable: bool = shared(default=False, kw_only=True)
    owners: Literal["auto"] | bool = shared(default="auto", kw_only=True)

    title: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    advice: ClassVar[str] = ""
    batch_scaling: ClassVar[BatchScaling | None] = None
    lr_from_adamw: ClassVar[float | None] = None
    recommended: ClassVar[dict[str, Any]] = {}
    ranges: ClassVar[dict[str, Any]] = {}
    letters: ClassVar[dict[str, str]] = {}
    inputs: ClassVar[tuple[str, ...]] = ()
    own_average: ClassVar[bool] = False
    matrix_options: ClassVar[tuple[str, ...]] = ()
    real_only: ClassVar[str] = ""
    lengths: ClassVar[tuple[str, ...]] = ()
    refuses: ClassVar[dict[str, str]] = {}

    @staticmethod
    def scalars(h: Options, t: Operand) -> dict[str, Operand]:
        """The scalars of a step: numbers that depend only on the options and the step counter, in float64.

        A float reaches the update as a number. A bool selects one of two programs. `t` is an int. Under `capturable`
        both `t` and `h.lr` are tensors, and where the formula is printed they are symbols, so `scalars` uses the
        functions `sqrt` and `where` of `lightning_optim.language`.

        Args:
            h: The options of the parameter group.
            t: The step counter, 1 at the first step.

        Returns:
            The scalars by name. The update reads them from `h`.
        """
        return {}

    @staticmethod
    def traits(h: Options, shape: torch.Size, dtype: torch.dtype, most_dims: int) -> dict[str, Any]:
        """The traits of a parameter: what its shape and dtype decide for its update.

        Traits must not depend on `lr` or `weight_decay`, which schedules change.

        Args:
            h: The options of the parameter group.
            shape: The logical shape of the parameter.
            dtype: The dtype of the parameter.
            most_dims: The largest number of axes of any parameter.

        Returns:
            The traits by name. The update reads them from `h`.
        """
        return {}

    @staticmethod
    def matrices(h: Options, shape: torch.Size) -> View | None:
        """The matrices that a parameter is, for functions of whole matrices (`language.matrices.whole`).

        Args:
            h: The options of the parameter group.
            shape: The logical shape of the parameter.

        Returns:
            The view, or None where its update uses no such function.
        """
        return None

    @staticmethod
    def predict(p: Value, s: Slots, h: Options) -> Value:
        """The parameter at which the gradient is computed, for optimizers that move before the backward pass.

        Args:
            p: The parameter.
            s: The slots, which it may assign.
            h: The options, traits and scalars.
        """
        return p

    @staticmethod
    def evaluate(p: Value, s: Slots, h: Options) -> Value:
        """The weights to evaluate and save, for optimizers that take gradients elsewhere. It writes no slot.

        Args:
            p: The parameter, which has taken at least one step.
            s: The slots.
            h: The options, traits and scalars of that step.
        """
        return p

    @staticmethod
    def resume(p: Value, s: Slots, h: Options) -> Value:
        """The inverse of `evaluate`, where a file does not hold the parameter as it was trained. It writes no slot.

        Args:
            p: The weights that were evaluated.
            s: The slots.
            h: The options, traits and scalars of the last step.
        """
        return p

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        """Compute the new parameter and the new slots.

        Args:
            p: The parameter.
            g: The gradient.
            s: The slots, which it assigns.
            h: The options, traits and scalars.

        Returns:
            The new parameter.
        """
        raise NotImplementedError

    @classmethod
    def has_matrices(cls) -> bool:
        """Whether the update uses functions of whole matrices."""
        return cls.matrices is not Definition.matrices

    @classmethod
    def predicts(cls) -> bool:
        """Whether the optimizer moves the parameter before the gradient is computed."""
        return cls.predict is not Definition.predict

    @classmethod
    def evaluates(cls) -> bool:
        """Whether the weights to evaluate and save are not those at which gradients are taken."""
        return cls.evaluate is not Definition.evaluate

    @classmethod
    def check_all(cls, options: dict[str, Any]) -> None:
        """Refuse what `refuses` and `check` do, and a cautious decay where the decay is not decoupled.

        Raises:
            OptionError: for an option without meaning.
        """
        for name, why in cls.refuses.items():
            if options.get(name):
                raise OptionError(f"{cls.__name__}: {name}=True has no meaning here: {why}. Leave it out.")
        coupled = next((name for name in ("decoupled", "decoupled_weight_decay") if options.get(name) is False), None)
        if coupled and options.get("cautious_decay"):
            raise OptionError(
                f"{cls.__name__}: cautious_decay=True needs {coupled}=True: a penalty in the gradient goes through its "
                "averages, and cannot be left out for single elements of a step."
            )
        cls.check(options)

    @classmethod
    def check(cls, options: dict[str, Any]) -> None:
        """Refuse combinations of options without meaning. It may complete `options` in place.

        Raises:
            OptionError: for such a combination.
        """

    @classmethod
    def complete(cls, options: dict[str, Any]) -> None:
        """Fill in options of a new parameter group that follow from its others, in place."""

    @classmethod
    def check_groups(cls, groups: list[dict[str, Any]]) -> None:
        """Refuse parameter groups that do not go together. Asked before each step, since schedules change options.

        Args:
            groups: The options of each group, with floats in the place of tensors.

        Raises:
            OptionError: for such groups.
        """
