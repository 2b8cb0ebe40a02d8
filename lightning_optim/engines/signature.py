"""What the local parameters of a launch have in common, and what selects its kernel."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from lightning_optim.storage.format import Format

FIXED = 2  # numbers in a row of the address table before the addresses
INDEX = ("tensor", "first", "run", "stride")  # the fields of `GlobalIndex`, the last numbers in a row


@dataclass(frozen=True)
class Signature:
    """Names and formats of the per-element operands of a launch.

    Attributes:
        operands: `"p"`, `"g"` and slots in the order of the address table, each with the dtype or the format in which
            it is stored.
        aligned: Whether every address is a multiple of 16.
        indexed: Whether the global index of each local parameter is known, as normal numbers need.
    """

    operands: tuple[tuple[str, torch.dtype | Format], ...]
    aligned: bool = False
    indexed: bool = False

    @functools.cached_property
    def dtypes(self) -> dict[str, torch.dtype]:
        """The dtypes of the operands that are not quantized."""
        return {name: stored for name, stored in self.operands if isinstance(stored, torch.dtype)}

    @functools.cached_property
    def formats(self) -> dict[str, Format]:
        """The formats of the quantized operands; one that others have as their partner comes before them."""
        found = [(name, stored) for name, stored in self.operands if isinstance(stored, Format)]
        return dict(sorted(found, key=lambda item: item[1].partner is not None))

    @functools.cached_property
    def offsets(self) -> dict[str, int]:
        """Where in a row of the address table the addresses of each operand begin; `"index"` for the global index.

        A quantized operand has two: of its codes and of its scales.
        """
        found, offset = {}, FIXED
        for name, stored in self.operands:
            found[name] = offset
            offset += 2 if isinstance(stored, Format) else 1
        found["index"] = offset
        return found

    @property
    def width(self) -> int:
        """Numbers in a row of the address table."""
        return self.offsets["index"] + (len(INDEX) if self.indexed else 0)

    def partner(self, name: str) -> str | None:
        """The operand from whose values a quantized one has its meaning."""
        return self.formats[name].partner if name in self.formats else None

    def partners_first(self, names: Iterable[str]) -> list[str]:
        """Names of operands, those that others have as their partner before them."""
        return sorted(names, key=lambda name: self.partner(name) is not None)

    def with_partners(self, reads: Iterable[str], writes: Iterable[str]) -> set[str]:
        """The operands that a kernel loads: those that it reads, and the partners that their codes need.

        Args:
            reads: The operands that the program reads.
            writes: The operands that the kernel stores. A partner among them is at hand with its new values.
        """
        found, writes = set(reads), set(writes)
        found |= {partner for name in found if (partner := self.partner(name))}
        return found | {partner for name in writes if (partner := self.partner(name)) and partner not in writes}
