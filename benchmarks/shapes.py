"""Lists of tensor shapes, like those of well-known models."""

from __future__ import annotations

Shape = tuple[int, ...]


def gpt2(width: int, rows: int, length: int, layers: int) -> list[Shape]:
    """The tensors of a decoder like GPT-2 (Radford et al. 2019)."""
    layer: list[Shape] = [
        *[(width,), (width,)],
        *[(width, 3 * width), (3 * width,)],
        *[(width, width), (width,)],
        *[(width,), (width,)],
        *[(width, 4 * width), (4 * width,)],
        *[(4 * width, width), (width,)],
    ]
    return [(rows, width), (length, width), *(layer * layers), (width,), (width,)]


def gpt2_124m() -> list[Shape]:
    """GPT-2 small: 124 million parameters in 148 tensors."""
    return gpt2(width=768, rows=50257, length=1024, layers=12)


def decoder_1b() -> list[Shape]:
    """A decoder of 1.1 billion parameters in 201 tensors, with the shapes of TinyLlama (Zhang et al. 2024)."""
    width, hidden, rows, keys, layers = 2048, 5632, 32000, 256, 22
    layer: list[Shape] = [
        *[(width, width), (keys, width), (keys, width), (width, width)],
        *[(hidden, width), (hidden, width), (width, hidden)],
        *[(width,), (width,)],
    ]
    return [(rows, width), *(layer * layers), (width,), (rows, width)]


def many_small() -> list[Shape]:
    """Ten thousand tensors of a thousand elements."""
    return [(1000,)] * 10_000


def two_million() -> list[Shape]:
    """A narrow network of 2.0 million parameters in 200 tensors, where the cost of a tensor counts."""
    return [*gpt2(width=96, rows=1900, length=128, layers=16), (96,), (96,), (10, 96), (10,)]


def scaled(parameters: int) -> list[Shape]:
    """About so many parameters in 148 tensors: GPT-2's layers in another width, and 16 times as many rows as that."""
    width = max(1, round((parameters / 160) ** 0.5))  # 12 layers of 12 squares of the width, and 16 more
    return gpt2(width, rows=16 * width, length=16, layers=12)


def tiny() -> list[Shape]:
    """Something for an interpreter: two tensors that are kept in codes, and some that are too small for that."""
    return [(64, 70), (70,), (0,), (5000,), (7,)]


LISTS = {"GPT-2 124M": gpt2_124m, "1B decoder": decoder_1b, "10,000 small": many_small}
