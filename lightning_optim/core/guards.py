"""What an optimizer refuses because it would silently be wrong under a strategy."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterable, Sequence

from torch import Tensor

from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_sharded, shard_of
from lightning_optim.language.program import Program


def refuse_orphans(owner: str, params: Sequence[Tensor]) -> None:
    """Refuse to train nothing: FSDP2 puts new parameters into a model, and an older optimizer holds the old ones.

    Args:
        owner: For the message.
        params: Parameters of which none has a gradient, nor ever had one.

    Raises:
        RuntimeError: where this process has a model that FSDP2 sharded, and none of the parameters is of such a model.
    """
    module = sys.modules.get("torch.distributed.fsdp")
    if module is None or not hasattr(module, "FSDPModule") or any(is_sharded(p) for p in params):
        return
    if any(issubclass(type(thing), module.FSDPModule) for thing in gc.get_objects()):
        raise RuntimeError(
            f"{owner} would train nothing: none of its {len(params)} parameters has a gradient, and FSDP2 has put "
            "sharded parameters into the model since it was built. Build it after fully_shard: in "
            "configure_optimizers, from self.parameters()."
        )


def refuse_unsummable(owner: str, program: Program, params: Iterable[Tensor]) -> None:
    """Refuse what would silently be wrong: what needs tensors, or their axes, where FSDP1 has dissolved them.

    Raises:
        RuntimeError: for sums over a tensor where several are fused, and for means along an axis of a flat piece.
    """
    of_tensors = any(symbol.args[1] == "tensor" for symbol in program.reductions)
    if program.elementwise and not of_tensors:
        return
    for p in params:
        if not is_flattened(p):
            continue
        shard = shard_of(p)
        if shard.is_flat_parameter:
            raise RuntimeError(
                f"{owner} needs a {' and a '.join(program.needs)}, and FSDP1 with use_orig_params=False shows flat "
                "parameters, in which tensors are not known. Set FSDPStrategy(use_orig_params=True), or use "
                "ModelParallelStrategy (FSDP2)."
            )
        if shard.without_axes and not program.elementwise:
            raise RuntimeError(
                f"{owner} needs row and column means, and FSDP1 cuts tensors without regard to rows, nor can its "
                "checkpoints hold row and column statistics. Use ModelParallelStrategy (FSDP2) or DDP; for adafactor, "
                "factored=False does without."
            )
