"""Names of parameters without what wrapping modules add to them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim.swa_utils import AveragedModel

# The attribute that holds the wrapped module: of FSDP1, Lightning's Fabric, torch.compile, activation checkpointing.
WRAPPERS = ("_fsdp_wrapped_module", "_forward_module", "_orig_mod", "_checkpoint_wrapped_module")
# Modules that keep the wrapped one under a name that modules of users have too.
WRAPPING_CLASSES = (DataParallel, DistributedDataParallel, AveragedModel)


def plain_name(name: str, root: nn.Module | None = None) -> str:
    """The name that a parameter has in the module that nobody wrapped or parametrized.

    Args:
        name: Its name in `named_parameters`.
        root: The module of that name. With it, the `module.` of DDP is known from a user's attribute `module`.

    Example:
        >>> plain_name("net._fsdp_wrapped_module.0._orig_mod.weight")
        'net.0.weight'
        >>> plain_name("net.parametrizations.weight.original"), plain_name("net.parametrizations.weight.original0")
        ('net.weight', 'net.weight.original0')
    """
    parts: list[str] = []
    owner = root
    for part in name.split("."):
        if part not in WRAPPERS and not (part == "module" and isinstance(owner, WRAPPING_CLASSES)):
            parts.append(part)
        owner = owner._modules.get(part) if owner is not None else None
    original = re.fullmatch(r"(|.*\.)parametrizations\.([^.]+)\.original(\d*)", ".".join(parts))
    if original is None:
        return ".".join(parts)
    return f"{original[1]}{original[2]}{f'.original{original[3]}' if original[3] else ''}"


def named_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a module with their plain names, each once."""
    return ((plain_name(name, root), p) for name, p in root.named_parameters())


def owned_parameters(root: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """The parameters of a module by owner: plain name, owner, its attribute and the parameter.

    A shared parameter comes once for each owner and name. The owner of a parametrized weight is the layer.

    Example:
        >>> layer = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2, bias=False))
        >>> [(name, isinstance(owner, nn.Linear), attribute) for name, owner, attribute, _ in owned_parameters(layer)]
        [('weight', True, 'weight')]
    """
    modules = dict(root.named_modules(remove_duplicate=False))
    for prefix, module in modules.items():
        for attribute, p in module.named_parameters(recurse=False):
            name = plain_name(f"{prefix}.{attribute}" if prefix else attribute, root)
            if isinstance(module, ParametrizationList):
                path, _, parametrized = prefix.rpartition(".")  # ...parametrizations.weight
                yield name, modules[path.rpartition(".")[0]], parametrized, p
            else:
                yield name, module, attribute, p
