"""Computes what a step of an optimizer communicates at 8, 64 and 512 ranks.

`python benchmarks/scale.py` prints the tables of docs/scale.md. They are computed, not measured: the sizes of the
messages are written here by hand, and `tests/distributed/` compares them with what two processes send.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from lightning_optim.distributed.owners import assign
from lightning_optim.language import View

Shape = tuple[int, ...]

NUMBER = 8  # bytes: sums and means travel in float64
RANKS = (8, 64, 512)
LATENCY = 10e-6  # seconds for one hop between nodes, an assumption


def transformer(layers: int = 32, width: int = 4096, hidden: int = 11008, tokens: int = 32000) -> list[Shape]:
    """The tensors of a decoder of 7 billion parameters."""
    layer: list[Shape] = [(width, width)] * 4 + [(hidden, width)] * 2 + [(width, hidden)] + [(width,)] * 2
    return [(tokens, width), *layer * layers, (width,), (tokens, width)]


COUNTED = ("lamb", "adafactor", "koala_v", "prodigy")


def messages(name: str, shapes: Sequence[Shape]) -> dict[str, int]:
    """The all-reduces of a step under FSDP2, each with its bytes, for tensors that are divided along their first axis.

    Under DDP gradients are equal on all ranks, and all of them but the loss fall away.
    """
    one_each = NUMBER * len(shapes)
    matrices = [shape for shape in shapes if len(shape) > 1]
    if name == "lamb":  # a rate of their own is for matrices only
        of_matrices = NUMBER * len(matrices)
        return {"norm of all gradients, norms of weights": one_each + of_matrices, "norms of updates": of_matrices}
    if name == "adafactor":
        vectors = len(shapes) - len(matrices)
        return {
            "norms of weights and of vectors' updates": one_each + NUMBER * vectors,
            "means over rows": NUMBER * sum(math.prod(shape[1:]) for shape in matrices),
            "means of those means": NUMBER * len(matrices),
            "norms of matrices' updates": NUMBER * len(matrices),
        }
    if name == "koala_v":
        return {"loss and its square": 2 * NUMBER, "norms of gradients, weights and their sum": 3 * one_each}
    if name == "prodigy":
        return {"both sums of the estimate of d": 2 * one_each}
    raise ValueError(f"{name!r} is not one of {', '.join(COUNTED)}.")


def exchanged(shapes: Sequence[Shape], ranks: int, size: int) -> list[tuple[int, int]]:
    """The bytes that each rank packs for the two all-to-alls of a function of whole matrices under FSDP2.

    The first holds its rows of all matrices; the second the results of those that it owns, and for each rank a number
    that says whether it has failed.

    Args:
        shapes: The matrices, divided along their rows as `torch.chunk` divides.
        ranks: The number of ranks.
        size: Bytes of an element.
    """
    (owners,) = zip(*assign([View((rows,), columns) for rows, columns in shapes], no_loads(ranks)), strict=True)
    return [
        (
            size * sum(rows_of(rank, rows, ranks) * columns for rows, columns in shapes),
            size * (ranks + sum(math.prod(x) for x, owner in zip(shapes, owners, strict=True) if owner == rank)),
        )
        for rank in range(ranks)
    ]


def no_loads(ranks: int) -> list[tuple[float, int, int]]:
    """What `assign` starts with."""
    return [(0.0, 0, rank) for rank in range(ranks)]


def rows_of(rank: int, rows: int, ranks: int) -> int:
    """The number of rows that a rank holds."""
    chunk = -(-rows // ranks)
    return max(0, min(chunk, rows - rank * chunk))


def per_rank(size: float, ranks: int) -> float:
    """Bytes that each rank of a ring sends for an all-reduce of `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def hops(ranks: int) -> int:
    """Messages one after the other in an all-reduce over a tree: up and down."""
    return 2 * math.ceil(math.log2(ranks))


def tables() -> Iterator[str]:
    """The lines of the tables, as they stand in docs/scale.md."""
    shapes = transformer()
    parameters = sum(math.prod(shape) for shape in shapes)
    yield f"{parameters:,} parameters in {len(shapes)} tensors."
    yield ""
    yield "| optimizer | all-reduce of a step under FSDP2 | bytes |"
    yield "| --- | --- | --- |"
    for name in COUNTED:
        for what, size in messages(name, shapes).items():
            yield f"| `{name}` | {what} | {size:,} |"
    yield ""
    yield "| ranks | optimizer | all-reduces | bytes sent by a rank | relative to what FSDP2 sends | latency |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for ranks in RANKS:
        # bfloat16 weights are gathered for the forward and the backward pass, float32 gradients are reduced.
        own = (ranks - 1) / ranks * parameters * (2 + 2 + 4)
        for name in COUNTED:
            sizes = messages(name, shapes).values()
            sent = sum(per_rank(size, ranks) for size in sizes)
            time = len(sizes) * hops(ranks) * LATENCY * 1e3
            yield f"| {ranks} | `{name}` | {len(sizes)} | {sent:,.0f} | {sent / own:.1e} | {time:.1f} ms |"
    yield ""
    layers = [shape for shape in shapes[1:-1] if len(shape) > 1]
    numel = sum(math.prod(shape) for shape in layers)
    yield f"{numel:,} parameters in {len(layers)} matrices."
    yield ""
    yield "| ranks | messages | bytes sent by a rank | at most | relative to what FSDP2 sends | work of the busiest |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for ranks in RANKS:
        packed = [there + back for there, back in exchanged(layers, ranks, 2)]
        loads = no_loads(ranks)
        assign([View((rows,), columns) for rows, columns in layers], loads)
        work = [load for load, _, _ in loads]
        mean, most = sum(packed) / ranks, max(packed)
        own = (ranks - 1) / ranks * parameters * (2 + 2 + 4)
        busiest = max(work) * ranks / sum(work)
        yield f"| {ranks} | 2 | {mean:,.0f} | {most:,} | {mean / own:.1e} | {busiest:.2f} |"


if __name__ == "__main__":
    print("\n".join(tables()))
