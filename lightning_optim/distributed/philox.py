"""Normal numbers that belong to an element of a tensor and to a step, and to nothing else.

Philox4x32-10 (Salmon, Moraes, Dror & Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3") turns a counter and a
key into four words of 32 bits, with no state between calls. The counter holds the global index
of the element, the tensor and the step, and the key is the seed. So a number is the same on every rank, under every
sharding, on every device and after a resume, and no other generator is touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from lightning_optim.distributed.global_index import GlobalIndex

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
WORD = 0xFFFFFFFF
CHUNK = 65536  # elements at a time: fewer, and calls cost more than what they compute


def normals(
    seed: int, t: int, parts: Sequence[tuple[GlobalIndex, int, int]], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """Standard normal numbers for ranges of local elements, concatenated.

    The elements with global indices 2j and 2j + 1 share the counter (j low, j high, tensor, t). The Box-Muller
    transform runs in float64. Rounded to float32 the numbers are the same on every device, except where the last bit
    in float64 decides the rounding, about once in 10^8.

    Args:
        seed: 64 bits.
        t: The step, 32 bits.
        parts: For each range the global index of its tensor, and its first and one past its last local element.
        device: Device of the result.
        dtype: Type of the result.

    Returns:
        A tensor of shape (all elements together,).
    """
    chunks = [_normals(seed, t, batch, torch.device(device)).to(dtype) for batch in _batches(parts)]
    return torch.cat(chunks) if len(chunks) != 1 else chunks[0]


def _batches(parts: Sequence[tuple[GlobalIndex, int, int]]) -> Iterator[list[tuple[GlobalIndex, int, int]]]:
    """The ranges in batches of at most a chunk of elements; a larger range is split."""
    batch: list[tuple[GlobalIndex, int, int]] = []
    left = CHUNK
    for index, low, high in parts:
        for begin in range(low, high, CHUNK):
            end = min(high, begin + CHUNK)
            if end - begin > left:
                yield batch
                batch, left = [], CHUNK
            batch.append((index, begin, end))
            left -= end - begin
    yield batch


def _normals(seed: int, t: int, batch: list[tuple[GlobalIndex, int, int]], device: torch.device) -> Tensor:
    """The numbers of ranges that fit in one chunk, float64."""
    if len(batch) == 1 and batch[0][0].is_contiguous:  # neighbours share their counter
        index, low, high = batch[0]
        begin, end = index.first + low, index.first + high
        pairs = torch.arange(begin // 2, (end + 1) // 2, dtype=torch.int64, device=device)
        radius, angle = _polar(seed, t, pairs, torch.full_like(pairs, index.tensor))
        both = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], 1).view(-1)
        return both[begin % 2 : begin % 2 + high - low]
    if not batch:
        return torch.empty(0, dtype=torch.float64, device=device)
    indices = torch.cat([index.of(low, high, device) for index, low, high in batch])
    sizes = torch.tensor([high - low for _, low, high in batch], dtype=torch.int64, device=device)
    tensors = torch.tensor([index.tensor for index, _, _ in batch], dtype=torch.int64, device=device)
    radius, angle = _polar(seed, t, indices >> 1, tensors.repeat_interleave(sizes))
    return radius * torch.where(indices & 1 == 1, torch.sin(angle), torch.cos(angle))


def _polar(seed: int, t: int, pairs: Tensor, tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Radius and angle of the Box-Muller transform for each counter, float64."""
    counter = (pairs & WORD, pairs >> 32, tensors, torch.full_like(pairs, t))
    words = philox(counter, (seed & WORD, seed >> 32 & WORD))
    # 53 bits of two words, at the middle of the interval that they stand for: never 0.
    first, second = (((a >> 6 << 27) + (b >> 5)).double().add_(0.5).mul_(2.0**-53) for a, b in (words[:2], words[2:]))
    return torch.log(first).mul_(-2.0).sqrt_(), second.mul_(2.0 * math.pi)


def philox(counter: Sequence[Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four words for each counter of four words. A word is the lower half of an int64.

    Args:
        counter: Four int64 tensors of one shape.
        key: Two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        # The product of two words has 64 bits. An int64 holds them all; its highest bit is the sign.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(WORD),
            p1.bitwise_and_(WORD),
            (p0 >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(WORD),
            p0.bitwise_and_(WORD),
        )
        k0, k1 = (k0 + INCREMENTS[0]) & WORD, (k1 + INCREMENTS[1]) & WORD
    return c0, c1, c2, c3
