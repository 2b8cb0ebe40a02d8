"""Parameters that a spec freezes: they need no gradient before anything is made of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_optim.config.frozen import some_of
from lightning_optim.config.groups import ROLES, heads, hint, matches, named_roles
from lightning_optim.distributed.names import owned_parameters
from lightning_optim.errors import OptionError, shown

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule


def freeze(module: nn.Module, words: Sequence[str]) -> dict[str, nn.Parameter]:
    """Set `requires_grad` to False for the parameters that roles or name patterns match.

    Args:
        module: The model.
        words: Roles and name patterns. A tied parameter is frozen where one of its names matches.

    Returns:
        These parameters by name.

    Raises:
        OptionError: for a word that matches nothing, and where no parameter would be left to train; nothing has changed
            then.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
        >>> list(freeze(net, ["0.*"])), net[0].weight.requires_grad
        (['0.weight', '0.bias'], False)
    """
    chosen = chosen_by(module, words)
    if chosen and not any(p.requires_grad for p in set(module.parameters()) - set(chosen.values())):
        raise OptionError(
            f"freeze={shown(list(words))} leaves no parameter of {type(module).__name__} to train. Leave out what "
            "shall train."
        )
    for p in chosen.values():
        p.requires_grad_(False)
    return chosen


def chosen_by(module: nn.Module, words: Sequence[str]) -> dict[str, nn.Parameter]:
    """The parameters that roles or name patterns match, by name.

    Raises:
        OptionError: for a word that matches nothing.
    """
    if not words:
        return {}
    roles, head = named_roles(module, frozen=True), heads(module)
    kinds = {p: "head" if name in head else kind for name, (p, kind) in roles.items()}
    found: dict[str, nn.Parameter] = {}
    owned = [(name, p) for name, *_, p in owned_parameters(module)]
    for word in words:
        mine = {name: p for name, p in owned if matches(name, kinds[p], [word])}
        if not mine:
            some = ", ".join(name for name, _ in owned[:4])
            raise OptionError(
                f"freeze: no parameter matches {shown(word)}. Roles are {', '.join(ROLES)}; names are like "
                f"{some}.{hint(word, dict(owned))}"
            )
        found |= mine
    return found


def freeze_before_wrapping(module: LightningModule, words: Sequence[str]) -> None:
    """Freeze when a fit has configured the model, before its strategy wraps it: DDP asks then who needs a gradient.

    Lightning has no hook there: modules may create parameters in `configure_model`, which comes after all hooks of
    callbacks, and what follows is `setup` of the strategy.
    """
    if not words:
        return
    strategy: Any = module.trainer.strategy
    own = strategy.setup

    def setup(trainer: Any) -> None:
        vars(strategy).pop("setup", None)
        if trainer.state.fn == "fit":
            freeze(module, words)
        own(trainer)

    strategy.setup = setup


def refuse_if_wrapped(module: LightningModule, words: Sequence[str]) -> None:
    """Refuse to freeze parameters of a module that its strategy has wrapped already.

    Raises:
        OptionError: then.
    """
    late = [name for name, p in chosen_by(module, words).items() if p.requires_grad]
    if late and module.trainer.strategy.model is not module:
        raise OptionError(
            f"freeze={shown(list(words))} comes too late for {late[0]}: the strategy has wrapped the model. Let the "
            "module derive from ConfiguredOptimizer, and call super().configure_callbacks() where it has that method."
        )


def tell(module: nn.Module, words: Sequence[str]) -> None:
    """Say once what a spec has frozen, and what becomes of running statistics."""
    if not words:
        return
    from lightning.pytorch.utilities import rank_zero_info  # importing Lightning takes seconds

    chosen = {p: name for name, p in chosen_by(module, words).items()}
    rank_zero_info(f"freeze: {some_of(list(chosen.values()))} do not train.")
    if moving := statistics_that_move(module, [*chosen]):
        rank_zero_info(
            f"freeze: the running statistics of {some_of(moving)} still follow the data, as in torch. Where they shall "
            "stay, call eval() on these modules in on_train_epoch_start."
        )


def statistics_that_move(module: nn.Module, frozen: Sequence[nn.Parameter]) -> list[str]:
    """The names of batch-norm layers whose parameters are all frozen, and whose running statistics still change."""
    those = set(frozen)
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.modules.batchnorm._BatchNorm) and child.track_running_stats
        if (params := list(child.parameters())) and all(p in those for p in params)
    ]
