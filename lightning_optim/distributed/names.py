"""Names of parameters without what wrapping modules add to them."""

from __future__ import annotations

# FSDP1, Lightning's Fabric, torch.compile, activation checkpointing.
WRAPPERS = ("_fsdp_wrapped_module.", "_forward_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def plain_name(name: str) -> str:
    """The name that a parameter has in the module that nobody wrapped.

    Example:
        >>> plain_name("net._fsdp_wrapped_module.0._orig_mod.weight")
        'net.0.weight'
    """
    for wrapper in WRAPPERS:
        name = name.replace(wrapper, "")
    return name
