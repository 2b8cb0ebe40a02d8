"""A stage: what a callback adds to a step, in the same pass over memory as the update.

A stage is shaped like an optimizer page: slots, and one function over elements. When it acts is decided by its
`advance`, which is asked once for every real step; the callback that owns the stage usually answers there.
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
        name: The word under which its options reach `before` and `update`; one stage of a name per optimizer.
        slots: Its slots by name, which are also the keys in the optimizer's state.
        order: Stages run in this order, and those of one order as they were attached.
        needs_normals: Whether it needs normal numbers, and so has a `global_index_of`.
        steps: Number of real steps so far, counted by `advance`.
        moments: Slots of the optimizer that its `update` treats beside the parameter.
        in_pass: Whether its `before` runs with the update. If not, its owner runs it on the gradients.
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
        """Count one real step; the options of this step for `update`, or None where the stage does not act."""
        raise NotImplementedError

    @staticmethod
    def before(g: Value, s: Slots, h: Options, of: Options) -> Value:
        """The gradient that the update gets.

        Args:
            g: The gradient.
            s: The slots: of the stage, and those of the optimizer as the step before left them.
            h: The options of this step.
            of: The options and scalars of the optimizer for this parameter, with `t`, the number of its step.
        """
        return g

    @staticmethod
    def update(p: Value, s: Slots, h: Options) -> Value:
        """The parameter after the stage, from the updated parameter, the slots `s` and the options `h` of this step."""
        return p

    def slots_beside(self, theirs: Sequence[str]) -> Sequence[str]:
        """Names of the slots that it keeps for a parameter for which the optimizer keeps the slots `theirs`."""
        return tuple(self.slots)

    def global_index_of(self, p: Tensor) -> GlobalIndex:
        """Where the elements of a parameter that this process holds are, for a stage that needs normal numbers."""
        raise NotImplementedError
