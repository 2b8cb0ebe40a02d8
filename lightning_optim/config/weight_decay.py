"""Convert the weight decay of papers to that of torch and this package: theta <- (1 - lr * decay) * theta."""

from __future__ import annotations

import math


def normalized_weight_decay(norm: float, batch_size: int, dataset_size: int, epochs: float) -> float:
    """Weight decay from normalized weight decay.  Loshchilov & Hutter 2019, arXiv:1711.05101, section 3.

    It decreases with the number of steps: norm * sqrt(batch_size / (dataset_size * epochs)). The result is in the
    paper's units; convert it by `from_paper`.

    Args:
        norm: Normalized decay, such as 0.025.
        batch_size: Global batch size, in samples: over all ranks and accumulated batches.
        dataset_size: Number of training samples.
        epochs: Length of training in epochs; with warm restarts, of the current cycle.

    Example:
        >>> round(normalized_weight_decay(0.025, 128, 50_000, 1500), 11)
        3.265986e-05
    """
    return norm * math.sqrt(batch_size / (dataset_size * epochs))


def from_paper(weight_decay: float, lr: float) -> float:
    """The `weight_decay` to set for a decay that a paper does not multiply by the base learning rate.

    The papers of AdamW and SGDW subtract schedule * weight_decay * theta. This package and torch subtract
    lr * weight_decay * theta, where lr is the base learning rate times the schedule.

    Args:
        weight_decay: The paper's decay.
        lr: The base learning rate, before any schedule.

    Raises:
        ValueError: if `lr` is not positive.

    Example:
        >>> round(from_paper(3.265986e-05, lr=1e-3), 8)
        0.03265986
    """
    if not lr > 0:
        raise ValueError(f"lr={lr!r} must be positive: the decay is a share of it.")
    return weight_decay / lr
