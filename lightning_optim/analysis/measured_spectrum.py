"""What a few runs of Lanczos from random vectors tell about a spectrum: its ends and its trace."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from lightning_optim.analysis.lanczos import Quadrature, Times, quadrature
from lightning_optim.analysis.vectors import Vectors


class MeasuredSpectrum(NamedTuple):
    """The spectrum of a symmetric matrix as random vectors of +1 and -1 see it.

    Attributes:
        largest: The largest eigenvalue.
        smallest: The smallest eigenvalue.
        largest_error: The residual of the largest: an eigenvalue lies within it.
        smallest_error: The residual of the smallest.
        trace: The trace, which is the mean over the vectors.
        trace_error: Its standard error; NaN from one vector.
        runs: What each vector has seen.
    """

    largest: float
    smallest: float
    largest_error: float
    smallest_error: float
    trace: float
    trace_error: float
    runs: Sequence[Quadrature]


def measured_spectrum(times: Times, space: Vectors, steps: int, probes: int, seed: int = 0) -> MeasuredSpectrum:
    """Run Lanczos from several random vectors.

    Args:
        times: Multiplies the matrix by a vector of norm 1.
        space: The space of vectors.
        steps: Number of products in each run. As many vectors are held at a time.
        probes: Number of runs.
        seed: The seed of the vectors, which do not depend on how parameters are sharded.

    Raises:
        OptionError: where a product is not finite.
    """
    runs = [quadrature(times, space, space.random(seed, i, signs=True), steps) for i in range(probes)]
    ends = [(float(run.nodes[i]), _residual(run, i)) for run in runs for i in (0, -1)]
    (smallest, low), (largest, high) = min(ends), max(ends)
    traces = [space.dimension * float(run.nodes @ run.weights) for run in runs]
    trace = math.fsum(traces) / probes
    spread = math.fsum((t - trace) ** 2 for t in traces)
    error = math.sqrt(spread / (probes - 1) / probes) if probes > 1 else math.nan
    return MeasuredSpectrum(largest, smallest, high, low, trace, error, runs)


def _residual(run: Quadrature, i: int) -> float:
    _, vectors = torch.linalg.eigh(torch.diag(run.diagonal) + torch.diag(run.beside, 1) + torch.diag(run.beside, -1))
    return abs(float(vectors[-1, i]) * run.last)
