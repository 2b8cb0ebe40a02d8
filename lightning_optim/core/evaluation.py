"""Training and evaluation mode of an optimizer that takes gradients at other weights than those to evaluate and save.

The mode stands in every parameter group under `train_mode`, as schedulefree has it, and so in every file. In evaluation
mode the parameters hold what `evaluate` of the page gives, and the slot `raw` their values in training, bit for bit.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lightning_optim.core.state_layout import StateLayout
from lightning_optim.distributed.placement import local
from lightning_optim.language.program import look_up, namespace

if TYPE_CHECKING:
    from lightning_optim.core.runner import Runner

MODE = "train_mode"
LIGHTNING = ("lightning.pytorch.", "pytorch_lightning.")
TUNERS = tuple(f"{name}tuner." for name in LIGHTNING)


class EvaluationMode(StateLayout):
    """What `train()` and `eval()` do. For a page without `evaluate` they do nothing.

    Attributes:
        evaluated: The version of each parameter when it came to hold the weights to evaluate; empty in training.
        followed: The options from which the weights to evaluate follow, in each group, as the first step found them;
            empty once it was said that one has changed.
    """

    def _prepare_layout(self) -> None:
        super()._prepare_layout()
        self.evaluated: dict[Tensor, int] = {}
        self.followed: dict[str, list[Any]] | None = None

    @property
    def is_training(self) -> bool:
        """Whether the parameters are those at which gradients are taken."""
        return not self.evaluates() or bool(self.param_groups[0].get(MODE, True))

    def eval(self) -> None:
        """Let the parameters hold the weights to evaluate and save, for Schedule-Free the average, until `train()`.

        Other optimizers have no such weights, and nothing happens. Nor does it in evaluation mode.
        """
        if not self.is_training or not self.evaluates():
            return
        moved = self._moved()
        with torch.inference_mode(False), torch.no_grad():  # as in `step`
            for i, p in moved:
                self.create_slot("raw", p, i, {})
            try:
                self._compute("evaluate", moved)
            except BaseException:
                self._put_back(moved)
                raise
        self._set_mode(False)
        self.evaluated = {p: local(p)._version for _, p in moved}

    def train(self) -> None:
        """Let the parameters hold the weights at which gradients are taken again. In training mode nothing happens.

        What something has written since `eval()`, or the weights of a file without `raw`, are taken as an average from
        which training goes on.
        """
        if self.is_training:
            return
        moved, seen = self._moved(), self.evaluated
        with torch.inference_mode(False), torch.no_grad():
            known = [(i, p) for i, p in moved if "raw" in self.state[p]]
            written = {p for i, p in known if seen.get(p) != local(p)._version and self._is_written(i, p)}
            for p in written:
                del self.state[p]["raw"]
            self._compute("resume", [(i, p) for i, p in moved if "raw" not in self.state[p]])
            self._put_back([(i, p) for i, p in known if p not in written])
        self._set_mode(True)
        self.evaluated = {}
        if written:
            warnings.warn(
                f"Something has written {len(written)} parameters of {type(self).__name__} while they were its "
                "average, or the weights that were loaded are not those of its state. Training goes on from what they "
                "are, as an average.",
                stacklevel=2,
            )

    def _is_written(self, i: int, p: Tensor) -> bool:
        """Whether a parameter is something else than what `evaluate` gives, beyond a rounding.

        Another engine may have computed it, and Lightning loads weights in float32 before it makes them float64.
        """
        now = local(p).clone()
        p.copy_(self.state[p]["raw"])
        self._compute("evaluate", [(i, p)])
        average = local(p).clone()
        local(p).copy_(now)
        eps = max(torch.finfo(p.dtype).eps, torch.finfo(torch.float32).eps)
        return float((now - average).norm()) > 8 * eps * float(average.norm())

    def _moved(self) -> list[tuple[int, Tensor]]:
        """The parameters that have taken a step. Of the others both weights are the same."""
        return [(i, p) for i, p in self.initialized() if float(self.state.get(p, {}).get("step", 0)) > 0]

    def _compute(self, what: str, moved: list[tuple[int, Tensor]]) -> None:
        if moved:
            owner: Any = self  # an annotation in the class would be an option
            runner: Runner = owner._runner
            runner.run(what, moved)
            runner.cached.pop(what)  # it refers to `raw`

    def _put_back(self, moved: list[tuple[int, Tensor]]) -> None:
        for _, p in moved:
            p.copy_(self.state[p].pop("raw"))

    def _set_mode(self, training: bool) -> None:
        for group in self.param_groups:
            group[MODE] = training

    def _load_mode(self, state_dict: Mapping[str, Any]) -> None:
        """Take the mode of a file, whose state has been loaded. Files of other classes are of training."""
        if self.evaluates():
            groups = state_dict["param_groups"]
            training = bool(groups[0].get(MODE, True)) if groups else True
            self._set_mode(training)
            self.evaluated, self.followed = {}, None
            for _, p in self.every_parameter() if training else ():
                self.state.get(p, {}).pop("raw", None)

    def _options_of_evaluate(self) -> list[str]:
        """The numbers among the options from which the weights to evaluate follow, such as "betas.0"."""
        i, p = self.every_parameter()[0]
        options = self.options_of(self.param_groups[i])
        h = {**options, **self.traits_of(i, p), **self.scalars(namespace(options), 1)}
        names = (symbol.args[0] for symbol in self.program("evaluate", h).symbols if symbol.name == "host")
        return [name for name in names if name.partition(".")[0] in options]

    def _warn_where_points_part(self) -> None:
        """Say once that such an option has changed: no step moves the parameter to where the new value has it."""
        groups = [self.options_of(group, self.defaults["capturable"]) for group in self.param_groups]
        if self.followed is None:
            names = self._options_of_evaluate()
            self.followed = {name: [look_up(group, name) for group in groups] for name in names}
        for name, before in self.followed.items():
            now = [look_up(group, name) for group in groups]
            if now[: len(before)] != before:
                self.followed = {}
                warnings.warn(
                    f"{name.partition('.')[0]} of {type(self).__name__} has changed during training. The average is "
                    "computed from the parameter with it, and the parameter was made with the old value, so what is "
                    "evaluated and saved is no average any more. Keep it as it is: give OneCycleLR and CyclicLR of "
                    "torch cycle_momentum=False.",
                    stacklevel=4,
                )
                return

    def _begin_step(self) -> None:
        """Refuse a step in evaluation mode, and say once where no callback changes modes in a Trainer.

        Raises:
            RuntimeError: in evaluation mode.
        """
        owner = type(self).__name__
        if not self.is_training:
            raise RuntimeError(
                f"{owner} is in evaluation mode: the parameters are an average, at which no gradients are taken. Call "
                "train() of the optimizer before the forward pass, and eval() before you evaluate or save."
            )
        self._warn_where_points_part()
        if self.told:
            return
        trainer, in_finder = _who_steps()
        if in_finder:  # which has put the callbacks aside
            return
        self.told = True
        if trainer is not None and not any(getattr(one, "serves_evaluation", False) for one in trainer.callbacks):
            warnings.warn(
                f"{owner} runs in a Trainer without the callback EvaluationWeights, so what is validated and saved "
                "are the weights at which gradients are taken and not their average. Add "
                "lightning_optim.callbacks.EvaluationWeights to the Trainer, or let the module call train() and eval() "
                "of the optimizer.",
                stacklevel=3,
            )


def _who_steps() -> tuple[Any, bool]:
    """The Trainer that calls this step, if there is one, and whether one of its finders does.

    A gradient scaler hands no closure on that would tell.
    """
    trainer, frame = None, cast(FrameType | None, sys._getframe(1))
    while frame is not None:
        module = str(frame.f_globals.get("__name__", ""))
        if module.startswith(TUNERS):
            return trainer, True
        if trainer is None and module.startswith(LIGHTNING):
            owner = frame.f_locals.get("self")
            found = getattr(owner, "trainer", None) or getattr(owner, "_trainer", None)
            trainer = found if hasattr(found, "callbacks") else None
        frame = frame.f_back
    return trainer, False
