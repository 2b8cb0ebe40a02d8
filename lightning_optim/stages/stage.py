"""The base class of stages: what a callback adds to an update, in the same pass over memory.

A stage is like a page: it declares slots, and a function of elements. `advance`, which the optimizer calls once in
every step, decides whether the stage acts in that step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor

from lightning_optim.distributed.global_index import GlobalIndex
from lightning_optim.language import Options, Slot, Slots, Value


class Stage:
    """Arithmetic on a gradient before the update or on a parameter after it, with slots in the optimizer's state.

    Attributes:
        name: The name of its options in programs. An optimizer has at most one stage of a name.
        slots: Its slots by name, which is also the key in the state of the optimizer.
        order: Stages run in ascending order, and those of equal order as they were attached.
        needs_normals: Whether it uses normal numbers, and so implements `global_index_of`.
        steps: The number of steps so far, which `advance` counts.
        moments: The slots of the optimizer that its `update` changes besides the parameter.
        in_pass: Whether its `before` runs in the pass of the update. If not, the callback runs it on the gradients.
        acts_before: Whether it has a `before`.
        acts_after: Whether it has an `update`.
    """

    name: ClassVar[str]
    order: ClassVar[int] = 0
    needs_normals: ClassVar[bool] = False
    steps: int = 0
    moments: Sequence[str] = ()
    in_pass: bool = True
    acts_before: ClassVar[bool] = False
    acts_after: ClassVar[bool] = False
    slots: Mapping[str, Slot] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.slots = {name: slot for name, slot in vars(cls).items() if isinstance(slot, Slot)}
        cls.acts_before, cls.acts_after = cls.before is not Stage.before, cls.update is not Stage.update

    def advance(self) -> dict[str, Any] | None:
        """Count a step.

        Returns:
            The options of this step for `before` and `update`, or None if the stage does not act in it.
        """
        raise NotImplementedError

    @staticmethod
    def before(g: Value, s: Slots, h: Options, of: Options) -> Value:
        """Change the gradient before the update.

        Args:
            g: The gradient.
            s: The slots of the stage, and those of the optimizer before its update.
            h: The options of the stage for this step.
            of: The options and scalars of the optimizer for this parameter, and the step counter `t`.

        Returns:
            The gradient for the update.
        """
        return g

    @staticmethod
    def update(p: Value, s: Slots, h: Options) -> Value:
        """Change the parameter after the update.

        Args:
            p: The updated parameter.
            s: The slots of the stage, and the updated slots of the optimizer.
            h: The options of the stage for this step.

        Returns:
            The new parameter.
        """
        return p

    def slots_beside(self, theirs: Sequence[str]) -> Sequence[str]:
        """Names of its slots for a parameter that has the slots `theirs` of the optimizer."""
        return tuple(self.slots)

    def global_index_of(self, p: Tensor) -> GlobalIndex:
        """The global index of the local elements of a parameter, for a stage that uses normal numbers."""
        raise NotImplementedError
