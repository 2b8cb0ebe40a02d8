"""What a format of quantized values tells of itself: all that engines and printers of kernels know about it."""

from __future__ import annotations

import abc
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, ClassVar

import torch
from torch import Tensor

Constant = bool | int | float


@dataclass(frozen=True)
class Codebook:
    """The values of 256 codes, which kernels read from memory.

    Attributes:
        name: The word for it in kernels; codebooks of one name are the same.
        values: The values on a device, (256,) float32, in the order of their codes.
        searchable: What the C++ functions of the format get: the values, and behind them whatever finds a code for a
            value faster than a search; float32, on the CPU, the same tensor in every call.
    """

    name: str
    values: Callable[[torch.device], Tensor]
    searchable: Callable[[], Tensor]


class Format(abc.ABC):
    """How a block of values becomes codes, and back.

    A subclass is a frozen dataclass, since equal formats share kernels. Beside the two methods on tensors it brings the
    same pair of functions in C++ and in Triton, `NAME_quantize` and `NAME_dequantize`: `cpp.h` and `triton.py` in its
    package, unless it overrides `cpp` and `triton`. These take codes, scales and values as shown there, and then what
    the format asks for, in this order:

    1. the values of the partner, as they will be dequantized;
    2. the codebook;
    3. to quantize with stochastic rounding: in C++ the index of the block's first element in the slot and the step, in
       Triton numbers in [0, 1) for all elements;
    4. the constants.

    Attributes:
        name: A word for tables, and in the names of its functions.
        scales_per_block: How many float32 numbers are stored for a block.
        stochastic: Whether it rounds stochastically, and so needs random bits and the step counter.
        partner: The slot whose dequantized values are needed for both directions, or None.
        codebook: The table of values that its functions read, or None.
        constants: Numbers and flags that are printed into the calls of its functions.
    """

    name: ClassVar[str]
    scales_per_block: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False
    partner: str | None = None

    @property
    def codebook(self) -> Codebook | None:
        return None

    @property
    def constants(self) -> tuple[Constant, ...]:
        return ()

    @abc.abstractmethod
    def quantize(self, x: Tensor, partner: Tensor | None, random: Tensor | None) -> tuple[Tensor, Tensor]:
        """Codes (blocks, BLOCK) uint8 and scales (blocks, scales_per_block) float32 of (blocks, BLOCK) float32 values.

        Args:
            x: The values; blocks are filled up with zeros.
            partner: The values of the partner as they will be dequantized, (blocks, BLOCK).
            random: Numbers in [0, 1), (blocks, BLOCK), for a format that rounds stochastically.
        """

    @abc.abstractmethod
    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        """Values (blocks, BLOCK) float32."""

    def cpp(self) -> str:
        """Its functions in C++, which may call those of `engines/compiled/functions.h`."""
        return resources.files(type(self).__module__).joinpath("cpp.h").read_text()

    def triton(self) -> Mapping[str, Any]:
        """Its functions in Triton by name. Triton is imported here and not before."""
        return vars(importlib.import_module(f"{type(self).__module__}.triton"))

    def extra_arguments(
        self, partner: str, random: Sequence[str], constant: Callable[[Constant], str] = repr
    ) -> list[str]:
        """What a call of one of its functions takes after codes, scales and values.

        Args:
            partner: The expression for the values of the partner.
            random: The expressions for what random bits depend on; empty where values are dequantized.
            constant: How the language writes a constant.
        """
        return [
            *([partner] if self.partner else []),
            *([self.codebook.name] if self.codebook else []),
            *(random if self.stochastic else []),
            *map(constant, self.constants),
        ]
