"""The constructor of a page, made from its options."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_optim.errors import OptionError
from lightning_optim.language.docstrings import constructor_doc
from lightning_optim.language.options import check_options, signature


def constructor(cls: Any, base_doc: str | None) -> Callable[..., None]:
    """An `__init__` with the options of the page as its signature and the docstring of the page as its help.

    Editors, `help` and config parsers read both. A subclass with an `__init__` of its own calls it, and gives it
    options of the subclass by keyword too.

    Args:
        cls: The page.
        base_doc: The docstring of the base class, which describes the options and errors that all pages share.
    """
    form = signature(cls.options)

    def __init__(self: Any, /, *args: Any, **kwargs: Any) -> None:
        known, owner = type(self).options, type(self).__name__
        check_options({k: v for k, v in kwargs.items() if k not in known and k != "params"}, known, owner)
        try:
            bound = form.bind(self, *args, **{k: v for k, v in kwargs.items() if k in form.parameters})
        except TypeError as error:
            raise TypeError(f"{owner}: {error}") from None
        given = {**kwargs, **bound.arguments}
        options = {name: given.get(name, option.default) for name, option in known.items()}
        self._begin(bound.arguments["params"], options)

    __init__.__signature__ = form  # type: ignore[attr-defined]
    __init__.__qualname__ = f"{cls.__qualname__}.__init__"
    __init__.__doc__ = constructor_doc(cls.__doc__, base_doc, cls.options)
    __init__.of_page = True  # type: ignore[attr-defined]
    return __init__


def has_own_constructor(cls: type) -> bool:
    """Whether a class, or a class between it and its page, brings an `__init__` of its own."""
    found: Any = cls.__init__  # type: ignore[misc]
    return found is not torch.optim.Optimizer.__init__ and not getattr(found, "of_page", False)


def check_own_constructor(cls: type, options: Mapping[str, Any], owner: str) -> None:
    """Check that a constructor of a subclass takes parameter groups and these options.

    Args:
        cls: The class.
        options: What a spec gives.
        owner: Whose options they are, for the message.

    Raises:
        OptionError: where it does not.
    """
    if not has_own_constructor(cls):
        return
    form = inspect.signature(cls)
    try:
        form.bind([], **options)
    except TypeError as error:
        raise OptionError(
            f"{owner}: {cls.__name__}{form} has a constructor of its own, and {error}. It gets parameter groups, and "
            "by keyword the options of the spec."
        ) from None


def takes_word(cls: Any, name: str | None, registry: Mapping[str, type]) -> bool:
    """Whether a class that is being defined gets its word; one that is defined again in its module does.

    Args:
        cls: The class, with the word as its `name`.
        name: The word that its definition asks for; None where it follows from the name of the class. Then a user's
            subclass of the same name as a page takes no word from it.
        registry: The classes by word.

    Raises:
        OptionError: for a word that was asked for and is taken.
    """
    before = registry.get(cls.name, cls)
    if before.__module__ == cls.__module__:
        return True
    if name is not None:
        raise OptionError(
            f"class {cls.__name__}: the word {name!r} is taken: it means {before.__module__}.{before.__qualname__}. "
            f"Choose another, class {cls.__name__}(Optimizer, name=...)."
        )
    return False
