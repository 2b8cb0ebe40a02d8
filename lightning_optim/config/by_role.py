"""The parameter groups of a module for one optimizer: which roles and names get other options than the rest."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from lightning_optim.config import routing
from lightning_optim.config.declared import no_weight_decay
from lightning_optim.config.foreign import ForeignClass, Kind
from lightning_optim.config.groups import LayerDecay, Split, make_groups
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.fsdp1 import is_flat_parameter
from lightning_optim.errors import OptionError
from lightning_optim.training import depth


class Roles(NamedTuple):
    """Roles and name patterns that a spec tells from the rest.

    Attributes:
        no_decay: Those without weight decay.
        full_precision: Those whose state has 32 bits.
        adamw: Those that AdamW serves, beside Muon.
        no_weight_decay: Whether `no_weight_decay()` of modules adds to `no_decay`.
        layer_decay: Learning rates by depth.
    """

    no_decay: Sequence[str]
    full_precision: Sequence[str]
    adamw: Sequence[str]
    no_weight_decay: bool = True
    layer_decay: LayerDecay | None = None


def role_groups(
    module: nn.Module, owner: str, kind: Kind, options: Mapping[str, Any], roles: Roles, overrides: Sequence[Split]
) -> list[dict[str, Any]]:
    """The parameters of a module in groups, frozen ones included.

    Args:
        module: The model.
        owner: The name of the optimizer, for messages.
        kind: The optimizer.
        options: Its options.
        roles: Whom these options do not serve alike.
        overrides: The groups of the user.

    Raises:
        OptionError: for a sparse embedding that the optimizer cannot serve, a pattern without a match, or flat
            parameters of FSDP1 that cannot be split by role.
    """
    value = {name: options.get(name, option.default) for name, option in kind.options.items()}
    sparse = _sparse_embeddings(module)
    if roles.no_weight_decay and not (isinstance(kind, ForeignClass) and kind.takes_groups(options) is not None):
        roles = roles._replace(no_decay=(*roles.no_decay, *no_weight_decay(module)))
    if isinstance(kind, ForeignClass):
        _refuse_dense(module, owner, kind, sparse)
        split = _splits_of_foreign(owner, kind, options, roles)
    elif sparse:
        raise OptionError(
            f"{sparse[0]} is an embedding with sparse=True, and {owner} keeps dense state: make it sparse=False, or "
            "train it with torch.optim.SparseAdam."
        )
    else:
        split = _splits_of_page(kind, value, roles) + (
            routing.splits(module, roles.adamw) if kind.matrix_options else []
        )
    if any(is_flat_parameter(p) for p in module.parameters()):
        _refuse_flat(owner, kind, value, split)
        if roles.layer_decay is not None:
            raise OptionError(
                f"{owner}: FSDP1 with use_orig_params=False flattens tensors, so layers cannot be told apart, for "
                "layer_decay. Set FSDPStrategy(use_orig_params=True)."
            )
        return make_groups(module, (), overrides, lr=value.get("lr"))
    layers = functools.partial(_by_depth, module, owner, roles.layer_decay)
    groups = make_groups(module, split, overrides, layers, value.get("lr"))
    if not isinstance(kind, ForeignClass) and kind.has_matrices():
        routing.check(owner, kind, module, groups, options)
    return groups


def _by_depth(module: nn.Module, owner: str, decay: LayerDecay | None, kinds: Mapping[str, str]) -> Mapping[str, Split]:
    """The split of each parameter's layer, with its factor on the learning rate; none without `layer_decay`."""
    if decay is None:
        return {}
    found = depth.layers(module, kinds, decay.blocks)
    if len({*found.values()}) < 2:
        raise OptionError(
            f"{owner}: layer_decay={decay.decay} finds one layer only in {type(module).__name__}. Name its blocks: "
            "layer_decay: {decay: 0.75, blocks: 'net.blocks.*'}."
        )
    made = {
        layer: Split((), {}, f"layer{layer.number}", True, decay.decay**layer.from_top) for layer in {*found.values()}
    }
    return {name: made[layer] for name, layer in found.items()}


def _splits_of_page(kind: type[Optimizer], value: Mapping[str, Any], roles: Roles) -> list[Split]:
    """Also where nothing differs, so that the groups of a checkpoint are the same for all options."""
    plain: dict[str, Any] = {"weight_decay": 0.0} if "weight_decay" in kind.options else {}
    if "adapt" in kind.options and not value.get("always_adapt"):
        plain["adapt"] = False  # LARS and LAMB adapt the rate of a tensor only if it decays
    precise = {"state_bits": 32} if value["state_bits"] != 32 else {}
    return [Split(roles.no_decay, plain, "no_decay"), Split(roles.full_precision, precise, "full_precision")]


def _splits_of_foreign(owner: str, kind: ForeignClass, options: Mapping[str, Any], roles: Roles) -> list[Split]:
    if not kind.decays(options):
        return []
    split = [Split(roles.no_decay, {"weight_decay": 0.0}, "no_decay")]
    if kind.takes_groups(options) is None:
        return split
    decay = options.get("weight_decay", kind.options["weight_decay"].default)
    if decay and roles.no_decay:
        raise OptionError(
            f"optimizer {owner!r}: {kind.cls.__name__} takes one parameter group only, so biases and norms cannot be "
            f"left out of weight_decay={decay}. Write no_decay: [], which lets all decay."
        )
    return []


def _refuse_flat(owner: str, kind: Kind, value: Mapping[str, Any], split: Sequence[Split]) -> None:
    """Refuse to split the flat parameters of FSDP1 where that would change an option."""
    if kind.matrix_options:
        raise OptionError(
            f"{owner}: FSDP1 with use_orig_params=False flattens tensors, so there are no matrices. Set "
            "FSDPStrategy(use_orig_params=True)."
        )
    differs = [any(value[key] != other for key, other in part.options.items()) for part in split]
    labels = [part.label for part, other in zip(split, differs, strict=True) if part.words and other]
    if labels:
        raise OptionError(
            f"{owner}: FSDP1 with use_orig_params=False flattens tensors, so biases and norms cannot be told from "
            f"weights, for {' and '.join(labels)}. Set FSDPStrategy(use_orig_params=True), or "
            f"{' and '.join(f'{label}=[]' for label in labels)}, which treats all alike."
        )


def _sparse_embeddings(module: nn.Module) -> list[str]:
    """The names of embeddings whose gradients are sparse."""
    return [
        name or type(child).__name__
        for name, child in module.named_modules()
        if isinstance(child, nn.Embedding | nn.EmbeddingBag) and child.sparse
    ]


def _refuse_dense(module: nn.Module, owner: str, kind: ForeignClass, sparse: Sequence[str]) -> None:
    """Refuse parameters with dense gradients for SparseAdam, which would say so in its first step."""
    if not issubclass(kind.cls, torch.optim.SparseAdam):
        return
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    dense = [name for name in trained if name.rpartition(".")[0] not in sparse]
    if dense:
        raise OptionError(
            f"optimizer {owner!r} serves embeddings with sparse=True and nothing else, and {dense[0]} has dense "
            "gradients. Freeze it, or write configure_optimizers with an optimizer for each part."
        )
