"""The base of callbacks that change a Trainer, an optimizer or a module for the length of a fit."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from typing_extensions import override


class FitCallback(Callback):
    """Undoes what it has changed when a run ends, in whichever way, and starts each fit as if it were the first.

    Attributes:
        undo: Functions that undo a change, in the order of the changes.
        brought_by: The module that has brought it along as a companion, if one has.
    """

    brought_by: weakref.ref[LightningModule] | None = None

    def __init__(self) -> None:
        self.undo: list[Callable[[], None]] = []
        self.forget()

    def forget(self) -> None:
        """Set the attributes that a fit changes to their first values. Called before each fit."""

    def release(self) -> None:
        """Undo all changes, the last one first, and drop references to the Trainer, its module and its optimizers."""
        while self.undo:
            self.undo.pop()()

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Call `around(method, *args)` instead of `owner.name(*args)` until the run ends."""
        self.undo.append(wrap(owner, name, around))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not isinstance(value, weakref.ref)}

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.release()
        if self.brought_by is not None and self.brought_by() is not pl_module:
            trainer.callbacks = [other for other in trainer.callbacks if other is not self]  # type: ignore[attr-defined]
            return
        if stage == "fit":
            self.forget()
        self.begin_run(trainer, pl_module, stage)

    def begin_run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Change what has to be changed for a run. Called in `setup`, not for a companion of another module."""

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Release after this hook of all callbacks, some of which save: no `teardown` follows an exception."""

        def last(on_exception: Callable[[BaseException], None], exception: BaseException) -> None:
            try:
                on_exception(exception)
            finally:
                self._end()

        self.wrap(trainer.strategy, "on_exception", last)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._end()

    def _end(self) -> None:
        self.release()
        for name in ("log", "log_dict"):  # the module's, which the Trainer gives to each callback for a run
            vars(self).pop(name, None)


class _Wrapped:
    """A method of one object with functions around it, which may be removed in any order."""

    def __init__(self, method: Callable[..., Any], before: Any) -> None:
        self.method, self.before = method, before  # `before` is the attribute of the object that it replaces, if any
        self.around: list[Callable[..., Any]] = []
        functools.update_wrapper(self, method)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.method
        for around in self.around:
            call = functools.partial(around, call)
        return call(*args, **kwargs)


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> Callable[[], None]:
    """Let `owner.name(...)` call `around(method, ...)`, where `method` is what it called before.

    Args:
        owner: The object. Other objects of its class are not changed.
        name: The name of the method.
        around: The function; the last one wrapped around a method is the outermost.

    Returns:
        A function that undoes this. After the last one the object is as it was before.
    """
    wrapped = vars(owner).get(name)
    if not isinstance(wrapped, _Wrapped):
        wrapped = _Wrapped(getattr(owner, name), vars(owner).get(name))
        vars(owner)[name] = wrapped
    wrapped.around.append(around)

    def undo() -> None:
        wrapped.around.remove(around)
        if wrapped.around or vars(owner).get(name) is not wrapped:  # another package has wrapped it since
            return
        vars(owner).pop(name)
        if wrapped.before is not None:
            vars(owner)[name] = wrapped.before

    return undo
