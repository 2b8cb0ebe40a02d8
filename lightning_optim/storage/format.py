"""The interface of a format of quantized values. Engines and printers of kernels use nothing else of a format."""

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
        name: The name in kernels. Codebooks of the same name are equal.
        values: A function of a device that returns the values in the order of their codes, (256,) float32.
        searchable: A function that returns the tensor for the C++ functions of the format: the values, followed by data
            that finds the code of a value without a search. It is float32 on the CPU, and the same in every call.
    """

    name: str
    values: Callable[[torch.device], Tensor]
    searchable: Callable[[], Tensor]


class Format(abc.ABC):
    """How blocks of values are quantized to 8-bit codes and scales, and dequantized.

    A subclass is a frozen dataclass, since equal formats share kernels. Besides the two methods on tensors it has the
    functions `NAME_quantize` and `NAME_dequantize` in C++ and in Triton, in `cpp.h` and `triton.py` of its package
    unless it overrides `cpp` and `triton`. These take codes, scales and values as shown there, followed by those of
    these arguments that the format declares:

    1. the values of the partner as they will be dequantized; 2. the codebook; 3. to quantize with stochastic rounding:
    in C++ the index of the first element of the block in the slot and the step,
       in Triton numbers in (-1/2, 1/2) for all elements, which are added before rounding to the nearest;
    4. the constants.

    Attributes:
        name: The name in tables and in the names of its functions.
        scales_per_block: The number of float32 scales that are stored for a block.
        stochastic: Whether it rounds stochastically: it adds dither, which depends on the step counter, and rounds.
        takes_nan: Whether its Triton function takes NaN, to be stored as zero, for what is not below 2^127 in size or
            lies beyond the end of a tensor. Otherwise it gets zeros for these, which costs more.
        partner: The slot relative to whose dequantized values this one is quantized and dequantized, or None.
        codebook: The codebook that its functions read, or None.
        constants: Numbers and flags that are printed into the calls of its functions.
    """

    name: ClassVar[str]
    scales_per_block: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False
    takes_nan: ClassVar[bool] = False
    partner: str | None = None

    @property
    def codebook(self) -> Codebook | None:
        return None

    @property
    def constants(self) -> tuple[Constant, ...]:
        return ()

    @abc.abstractmethod
    def quantize(self, x: Tensor, partner: Tensor | None, dither: Tensor | None) -> tuple[Tensor, Tensor]:
        """Quantize blocks of values.

        Args:
            x: The values, (blocks, BLOCK) float32. The last block is padded with zeros.
            partner: The values of the partner as they will be dequantized, (blocks, BLOCK) float32.
            dither: What to add before rounding to the nearest, in (-1/2, 1/2), (blocks, BLOCK) float32, for a format
                that rounds stochastically.

        Returns:
            Codes, (blocks, BLOCK) uint8, and scales, (blocks, scales_per_block) float32.
        """

    @abc.abstractmethod
    def dequantize(self, codes: Tensor, scales: Tensor, partner: Tensor | None) -> Tensor:
        """Dequantize blocks of codes.

        Args:
            codes: The codes, (blocks, BLOCK) uint8.
            scales: The scales, (blocks, scales_per_block) float32.
            partner: The dequantized values of the partner, (blocks, BLOCK) float32.

        Returns:
            The values, (blocks, BLOCK) float32.
        """

    def cpp(self) -> str:
        """The source of its C++ functions, which may call those of `engines/compiled/functions.h`."""
        return resources.files(type(self).__module__).joinpath("cpp.h").read_text()

    def triton(self) -> Mapping[str, Any]:
        """Its Triton functions by name. This imports Triton, which nothing else here does."""
        return vars(importlib.import_module(f"{type(self).__module__}.triton"))

    def extra_arguments(
        self, partner: str, random: Sequence[str], constant: Callable[[Constant], str] = repr
    ) -> list[str]:
        """The arguments of a call of one of its functions after codes, scales and values.

        Args:
            partner: The expression for the values of the partner.
            random: The expressions for the arguments of stochastic rounding; empty to dequantize.
            constant: A function that prints a constant in the language of the kernel.
        """
        return [
            *([partner] if self.partner else []),
            *([self.codebook.name] if self.codebook else []),
            *(random if self.stochastic else []),
            *map(constant, self.constants),
        ]
