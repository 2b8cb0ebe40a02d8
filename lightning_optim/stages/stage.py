"""A stage: what a callback adds to a step, in the same pass over memory as the update.

A stage is shaped like an optimizer page: slots, and one function over elements. When it acts is decided by its
`advance`, which is asked once for every real step; the callback that owns the stage usually answers there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_optim.slot import Slot


class Stage:
    """Arithmetic on a parameter after its update, with slots of its own in the optimizer's state.

    Attributes:
        name: The word under which its options reach `update`; one stage of a name per optimizer.
        slots: Its slots by name, which are also the keys in the optimizer's state.
    """

    name: ClassVar[str]
    slots: ClassVar[Mapping[str, Slot]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.slots = {name: slot for name, slot in vars(cls).items() if isinstance(slot, Slot)}

    def advance(self) -> dict[str, Any] | None:
        """Count one real step; the options of this step for `update`, or None where the stage does not act."""
        raise NotImplementedError

    @staticmethod
    def update(p: Any, s: Any, h: Any) -> Any:
        """The parameter after the stage, from the updated parameter, the slots `s` and the options `h` of this step."""
        raise NotImplementedError
