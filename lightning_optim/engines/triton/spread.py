"""Prints how a tile reads statistics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lightning_optim.distributed.plain import memory_order
from lightning_optim.engines.signature import Signature
from lightning_optim.engines.strides import strides_of
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Symbol

LONGEST = (1 << 31) - (1 << 16)  # of an axis, whose index and the number in the tile are added in 32 bits


def has_long_axis(program: Program, p: torch.Tensor) -> bool:
    """Whether a tensor has an axis, or neighbouring axes that count as one, of which 32 bits cannot hold the index.

    The outermost of three axes may be of any length: its index has 64 bits.
    """
    if p.numel() <= LONGEST or not program.axes:
        return False
    return max(strides_of(p.shape, memory_order(p), program.axes).sizes[1:]) > LONGEST


def spread(signature: Signature, kinds: Sequence[frozenset[Any]], statistics: Mapping[str, Symbol]) -> list[str]:
    """Lines that load the number of each element of a tile in each statistic, as `of_` and the name of the pointer.

    The first element of the tile is located by divisions of 64 bits, the others relative to it by divisions of 32 bits.

    Args:
        signature: The signature of the launch.
        kinds: The reduced axes of each kind of statistic in its layouts.
        statistics: The statistics by the name of the pointer to their numbers.
    """
    if not statistics:
        return []
    inner, lines, carry = range(signature.axes - 1, 0, -1), ["rest = start"], "index"
    for axis in inner:
        lines.append(f"size_{axis} = tl.load(layout + {axis})")
        lines.append(f"first_{axis} = (rest % size_{axis}).to(tl.int32)")
        lines.append(f"rest = rest // size_{axis}")
    for axis in inner:
        lines.append(f"carry = first_{axis} + {carry}")
        lines.append(f"axis_{axis} = carry % size_{axis}.to(tl.int32)")
        carry = f"carry // size_{axis}.to(tl.int32)"
    lines.append(f"axis_0 = rest + {carry}")
    for word, symbol in statistics.items():
        start = signature.start(kinds.index(symbol.axes)) - signature.offsets["layout"]
        steps = (f"axis_{axis} * tl.load(layout + {start + 1 + axis})" for axis in range(signature.axes))
        place = " + ".join([f"tl.load(layout + {start})", *steps])
        lines.append(f"of_{word} = tl.load({word} + {place}, mask=inside, other=0.0)")
    return lines
