"""Weight decay as papers state it, in the units of torch and of this package: theta <- (1 - lr * decay) * theta."""

from __future__ import annotations

import math


def normalized_weight_decay(norm: float, batch_size: int, dataset_size: int, epochs: float) -> float:
    """The decay of a run from the normalized decay.  Loshchilov & Hutter 2019, arXiv:1711.05101, section 3.

    It falls with the number of steps: norm * sqrt(batch_size / (dataset_size * epochs)). The result is in the
    paper's units; `from_paper` converts it.

    Args:
        norm: Normalized decay, such as 0.025.
        batch_size: Global batch size: all devices and accumulated batches together.
        dataset_size: Number of training examples.
        epochs: Length of training in epochs; with warm restarts that of the current cycle.

    Example:
        >>> round(normalized_weight_decay(0.025, 128, 50_000, 1500), 11)
        3.265986e-05
    """
    return norm * math.sqrt(batch_size / (dataset_size * epochs))


def from_paper(weight_decay: float, lr: float) -> float:
    """The decay to set for a decay that a paper states without the base learning rate in it.

    The AdamW and SGDW papers subtract schedule * weight_decay * theta, we (and torch) lr * weight_decay * theta,
    where lr holds the base rate and the schedule.

    Args:
        weight_decay: The paper's decay.
        lr: The base learning rate, before any schedule.

    Raises:
        ValueError: where `lr` is not positive.

    Example:
        >>> round(from_paper(3.265986e-05, lr=1e-3), 8)
        0.03265986
    """
    if not lr > 0:
        raise ValueError(f"lr={lr!r} must be positive: the decay is a share of it.")
    return weight_decay / lr
