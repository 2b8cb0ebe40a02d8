"""Lists of tensors like those of known models."""

from __future__ import annotations

Shape = tuple[int, ...]


def gpt2_124m() -> list[Shape]:
    """GPT-2 small: 124 million parameters in 148 tensors (Radford et al. 2019)."""
    width, rows, length, layers = 768, 50257, 1024, 12
    layer: list[Shape] = [
        *[(width,), (width,)],
        *[(width, 3 * width), (3 * width,)],
        *[(width, width), (width,)],
        *[(width,), (width,)],
        *[(width, 4 * width), (4 * width,)],
        *[(4 * width, width), (width,)],
    ]
    return [(rows, width), (length, width), *(layer * layers), (width,), (width,)]


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


def tiny() -> list[Shape]:
    """Something for an interpreter: two tensors that are kept in codes, and some that are too small for that."""
    return [(64, 70), (70,), (0,), (5000,), (7,)]


LISTS = {"GPT-2 124M": gpt2_124m, "1B decoder": decoder_1b, "10,000 small": many_small}
