"""The constructor of a page, made from its options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_optim.language.docstrings import constructor_doc
from lightning_optim.language.options import check_options, signature


def constructor(cls: Any, base_doc: str | None) -> Callable[..., None]:
    """An `__init__` with the options of the page as its signature and the docstring of the page as its help.

    Editors, `help` and config parsers read both.

    Args:
        cls: The page.
        base_doc: The docstring of the base class, which describes the options and errors that all pages share.
    """
    form = signature(cls.options)

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        options = {name: value for name, value in kwargs.items() if name in form.parameters}
        check_options({k: v for k, v in kwargs.items() if k not in options}, cls.options, cls.__name__)
        bound = form.bind(self, *args, **options)
        bound.apply_defaults()
        self._begin(bound.arguments["params"], {name: bound.arguments[name] for name in cls.options})

    __init__.__signature__ = form  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__doc__ = constructor_doc(cls.__doc__, base_doc)
    return __init__
