"""The optimizers whose memory is counted side by side, each at several numbers of bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lightning_optim.config.strategy import OptimizerStrategy
from lightning_optim.errors import OptionError, shown
from lightning_optim.training.lightning_names import optimizers_in, overrides

BITS = (32, 16, 8)


@dataclass(frozen=True)
class Candidate:
    """One optimizer at one number of bits.

    Attributes:
        name: Its word, or the names of the classes that the module's own `configure_optimizers` returned.
        bits: Bits of its state; None where it has no such choice.
        strategy: What makes it; None where the module configures its own.
        asked: Whether the spec, and not the comparison, has these bits.
    """

    name: str
    bits: int | None
    strategy: OptimizerStrategy | None
    asked: bool = True

    def optimizers(self, module: nn.Module) -> list[torch.optim.Optimizer]:
        """The optimizers of a module."""
        return own_optimizers(module) if self.strategy is None else [self.strategy.create(module)]

    def callbacks(self) -> list[Any]:
        """The callbacks that come along."""
        return [] if self.strategy is None else list(self.strategy.callbacks())


def read_candidates(specs: Any, bits: Sequence[int] | None, own: OptimizerStrategy | None) -> list[Candidate]:
    """The candidates of some specs.

    Args:
        specs: A spec, a list of them, or None for the module's own optimizer.
        bits: Bits of state to compare. Default: 32, 16 and 8.
        own: The spec of the module, if it has one.

    Raises:
        OptionError: for a spec or bits that are wrong.
    """
    several = isinstance(specs, Iterable) and not isinstance(specs, str | Mapping | OptimizerStrategy)
    given: list[Any] = list(specs) if several else [own if specs is None else specs]
    if not given:
        raise OptionError("optimizer=[] names no optimizer. Give one or several, such as [adamw, adan].")
    for one in bits or ():
        if isinstance(one, bool) or one not in BITS:
            raise OptionError(f"bits={shown(one)} must be 32, 16 or 8.")
    if given == [None]:
        return [Candidate("", None, None)]
    strategies = [OptimizerStrategy.parse(spec) for spec in given]
    names = [strategy.name for strategy in strategies]
    found: list[Candidate] = []
    for strategy in strategies:
        repeated = names.count(strategy.name) > 1
        name = _told_apart(strategy) if repeated else strategy.name
        options = strategy.kind.options
        if "state_bits" not in options:
            found.append(Candidate(name, None, strategy))
            continue
        asked = strategy.options.get("state_bits", options["state_bits"].default)
        found += [
            Candidate(name, one, OptimizerStrategy.parse(strategy, state_bits=one), one == asked)
            for one in dict.fromkeys(bits or (*BITS, asked))
        ]
    return list(dict.fromkeys(found))


def _told_apart(strategy: OptimizerStrategy) -> str:
    """The word with the options that differ from its defaults."""
    options = {key: value for key, value in strategy.config.items() if key not in ("name", "state_bits")}
    return " ".join([strategy.name, *(f"{key}={value}" for key, value in options.items())])


def own_optimizers(module: Any) -> list[torch.optim.Optimizer]:
    """What the `configure_optimizers` of a module returns, without schedulers.

    Raises:
        OptionError: where it has none, or it fails or returns no optimizer.
    """
    from lightning.pytorch import LightningModule

    title = type(module).__name__
    if "configure_optimizers" not in vars(module) and not overrides(module, "configure_optimizers", LightningModule):
        raise OptionError(f"{title} configures no optimizer. Give one, such as --optimizer adamw.")
    try:
        returned: Any = module.configure_optimizers()
    except OptionError:
        raise
    except Exception as error:  # a user's hook may raise anything
        raise OptionError(
            f"{title}.configure_optimizers failed before a training: {type(error).__name__}: {error}. Give the "
            "optimizer instead, such as --optimizer adamw."
        ) from error
    found = list(optimizers_in(returned))
    if not found:
        raise OptionError(f"{title}.configure_optimizers returned no optimizer. Give one, such as --optimizer adamw.")
    return found
