"""What DDP sends in a step: how a config says it, and what a communication hook must do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_optim.errors import OptionError, is_whole, nearest, shown

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket

# The options of each kind, with their defaults.
KINDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp16": {},
    "powersgd": {"rank": 1, "start": 1000},
    "post_local_sgd": {"period": 4, "start": 1000, "local_ranks": None},
}
LEAST = {"rank": 1, "start": 2, "period": 2, "local_ranks": 1}


def read(spec: Any) -> tuple[str, dict[str, Any]]:
    """The kind and all its options, from a word or from a mapping with `kind` and options.

    Raises:
        OptionError: for an unknown kind or option, or a value out of range.

    Example:
        >>> read({"kind": "powersgd", "rank": 4})
        ('powersgd', {'rank': 4, 'start': 1000})
    """
    given = {"kind": spec} if isinstance(spec, str) else spec
    if not isinstance(given, Mapping) or "kind" not in given:
        raise OptionError(
            f"communication={shown(spec)} must be one of {', '.join(KINDS)}, or a mapping with kind and options, such "
            "as {kind: powersgd, rank: 4}."
        )
    kind = given["kind"]
    if not isinstance(kind, str) or kind not in KINDS:
        hint = nearest(shown(kind), KINDS)
        raise OptionError(f"communication {shown(kind)} is not one of {', '.join(KINDS)}.{hint}")
    options = {name: value for name, value in given.items() if name != "kind"}
    for name, value in options.items():
        if name not in KINDS[kind]:
            has = f"its options are {', '.join(KINDS[kind])}" if KINDS[kind] else "it has none"
            hint = nearest(shown(name), KINDS[kind])
            raise OptionError(f"communication {kind!r} has no option {shown(name)}: {has}.{hint}")
        if not is_whole(value, LEAST[name]):
            least = LEAST[name]
            raise OptionError(f"communication {kind!r}: {name}={shown(value)} must be an integer of at least {least}.")
        options[name] = int(value)
    return str(kind), {**KINDS[kind], **options}


class CommunicationHook(Protocol):
    """A DDP communication hook with state. DDP calls `hook` for each bucket of gradients that is ready."""

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Reduce a bucket over the ranks; the future holds the gradients that the optimizer gets."""
        ...

    def state(self) -> dict[str, Any]:
        """The state for a checkpoint. Every rank must call it; rank 0 gets all of it."""
        ...

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what `state` returned."""
        ...


class HalfPrecision:
    """Send and sum gradients in 16 bits.

    Args:
        dtype: bfloat16 has the range of float32 and 8 bits of precision; float16 has 11 bits, and values above 65504
            become infinite.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        self._compress: Any = {
            torch.bfloat16: default_hooks.bf16_compress_hook,
            torch.float16: default_hooks.fp16_compress_hook,
        }[dtype]

    def hook(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        future: torch.futures.Future[Tensor] = self._compress(None, bucket)
        return future

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: Mapping[str, Any]) -> None:
        pass  # there is no state
