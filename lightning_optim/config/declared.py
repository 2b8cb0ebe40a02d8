"""Parameters that modules themselves want to keep without weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn

from lightning_optim.config.frozen import some_of
from lightning_optim.config.groups import matches_name
from lightning_optim.distributed.names import owned_parameters, plain_name


def no_weight_decay(module: nn.Module) -> list[str]:
    """The plain names of the parameters that `no_weight_decay()` of the module, or of one in it, returns.

    It is a convention of timm and Swin: names, or patterns, as they are in that module. `no_weight_decay_keywords()`
    returns parts of names.

    Example:
        >>> class Net(nn.Linear):
        ...     def no_weight_decay(self):
        ...         return {"weight", "pos_embed"}
        >>> no_weight_decay(nn.Sequential(Net(2, 2)))
        ['0.weight']
    """
    patterns: list[str] = []
    for name, child in module.named_modules():
        prefix = f"{plain_name(name, module)}." if name else ""
        patterns += [prefix + word for word in _said(child, "no_weight_decay")]
        patterns += [f"{prefix}*{word}*" for word in _said(child, "no_weight_decay_keywords")]
    names = dict.fromkeys(name for name, *_ in owned_parameters(module))
    return [name for name in names if any(matches_name(name, pattern) for pattern in patterns)] if patterns else []


def tell(module: nn.Module, optimizer: Any, honoured: bool) -> None:
    """Say once which parameters have no weight decay because a module says so."""
    if honoured and "weight_decay" in optimizer.param_groups[0] and (names := no_weight_decay(module)):
        from lightning.pytorch.utilities import rank_zero_info  # importing Lightning takes seconds

        rank_zero_info(
            f"{type(optimizer).__name__}: no weight decay for {some_of(names)}, as no_weight_decay() says. "
            "Write no_weight_decay: false to leave that out."
        )


def _said(module: nn.Module, method: str) -> list[str]:
    say: Any = getattr(module, method, None)
    words: Any = say() if callable(say) else None
    return sorted(map(str, words or ()))
