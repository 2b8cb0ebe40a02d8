"""The gradient noise scale: the batch size at which noise and signal in a gradient are of equal size.

McCandlish, Kaplan, Amodei & the OpenAI Dota Team 2018, "An Empirical Model of Large-Batch Training", arXiv:1812.06162:
B = tr(Sigma) / |G|^2 (section 2.2), unbiased estimates of both from two batch sizes (appendix A.1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_optim.distributed.placement import local, shard_of
from lightning_optim.distributed.reductions import Reductions
from lightning_optim.errors import OptionError, check, is_number, shown

Part = Tensor | Sequence[Tensor | None]
"""The gradient over one part: a tensor, or one for each parameter, None where there is none."""


@dataclass(frozen=True)
class NoiseScale:
    """An estimate of the gradient noise scale. It unpacks into the estimate and its standard error.

    Attributes:
        estimate: tr(Sigma) / |G|^2, in samples; NaN where the estimate of |G|^2 is not above 0.
        standard_error: Of the estimate, to first order, in samples; infinite where too few parts can tell.
        trace: tr(Sigma), the summed variance of one sample's gradient, in loss^2 / parameter^2. Unbiased.
        trace_error: Its standard error.
        signal: |G|^2, the squared norm of the gradient without noise, in the same unit. Unbiased; it may be negative.
        signal_error: Its standard error.
    """

    estimate: float
    standard_error: float
    trace: float
    trace_error: float
    signal: float
    signal_error: float

    def __iter__(self) -> Iterator[float]:
        yield self.estimate
        yield self.standard_error

    @property
    def resolved(self) -> bool:
        """Whether |G|^2 is above 0 by more than twice its standard error. If not, the estimate says little."""
        return self.signal > 2 * self.signal_error

    def __str__(self) -> str:
        if not self.signal > 0:
            return (
                f"not resolved: |G|^2 = {self.signal:.3g} ± {self.signal_error:.2g}, so the noise hides the gradient; "
                f"tr(Sigma) = {self.trace:.3g} ± {self.trace_error:.2g}"
            )
        words = "" if self.resolved else ", not resolved: |G|^2 is within two standard errors of 0"
        return f"{self.estimate:.4g} ± {self.standard_error:.2g} samples{words}"


def noise_scale(gradients_of_parts: Sequence[Part] | Tensor, sizes: float | Sequence[float] | Tensor) -> NoiseScale:
    """The gradient noise scale from the gradients over several parts of a batch.

    tr(Sigma) = sum_i b_i |g_i - g|^2 / (n - 1), and |G|^2 = |g|^2 - tr(Sigma) / B, for n parts with gradients g_i over
    b_i samples, B samples together, and g the mean over all. For parts of one size these are the two-batch estimates of
    the paper. Standard errors are by the jackknife over parts. Two parts give an estimate, and no finite error.

    Args:
        gradients_of_parts: For each part the gradient of the mean loss over its samples: a tensor, or a list with a
            tensor for each parameter, of any shapes; one (parts, parameters) tensor also serves. DTensors are summed
            over their shards, with one message; then all ranks must call this.
        sizes: Samples in each part, or one number for all; tokens where the loss is a mean over tokens.

    Returns:
        The estimate, with what it is made of. Memory beside the gradients: one tensor of the largest parameter in
        float64, twice.

    Raises:
        OptionError: if there are less than two parts, if parts are no lists of real tensors or have other tensors than
            the first, without gradients, for a size not above 0, or where a gradient is not finite.

    Example:
        >>> one_by_one = [(1, 0), (0, 2), (3, 1), (-1, 1), (2, 2), (0, 1), (1, -1), (2, 0)]
        >>> found = noise_scale(torch.tensor(one_by_one, dtype=torch.float64), 1)
        >>> print(found)
        2.294 ± 2 samples, not resolved: |G|^2 is within two standard errors of 0
        >>> round(found.trace, 4), round(found.signal, 4)
        (2.7857, 1.2143)
        >>> estimate, standard_error = found
    """
    parts = _listed(gradients_of_parts)
    _check_parts(parts)
    b = torch.tensor(_sizes(sizes, len(parts)), dtype=torch.float64, device="cpu")
    squares, products, whole = _inner_products(parts, b / b.sum())
    if not bool(squares.isfinite().all()):
        raise OptionError(
            "noise_scale: a gradient holds NaN or infinity, or values whose squares overflow. Leave such parts out."
        )
    return _jackknife(squares, products, whole, b)


def from_two_sizes(small: float, large: float, small_size: float, large_size: float) -> tuple[float, float]:
    """tr(Sigma) and |G|^2 from the mean squared norms of gradients at two batch sizes. Unbiased.

    Args:
        small: Mean of the squared norm over batches of `small_size` samples.
        large: Mean of the squared norm over batches of `large_size` samples.
        small_size: Samples in a small batch; the harmonic mean, if they differ.
        large_size: Samples in a large batch, more than in a small one.

    Raises:
        OptionError: if the sizes are not in this order, or not above 0.

    Example:
        >>> trace, signal = from_two_sizes(2.5, 1.0, 8, 64)
        >>> round(trace, 9), round(signal, 9), round(trace / signal, 9)
        (13.714285714, 0.785714286, 17.454545455)
    """
    ordered = is_number(small_size) and is_number(large_size) and 0 < small_size < large_size
    check("from_two_sizes", "small_size", small_size, ordered, f"above 0 and below large_size={shown(large_size)}")
    trace = (small - large) / (1 / small_size - 1 / large_size)
    return trace, (large_size * large - small_size * small) / (large_size - small_size)


def steps_and_samples(batch: float, critical: float) -> tuple[float, float]:
    """What training at a batch size costs: steps and samples, each relative to the least that any batch size needs.

    (S / S_min - 1) (E / E_min - 1) = 1 (equation 2.11 of the paper): at the critical batch size, which the noise scale
    approximates, both are twice their least.

    Args:
        batch: Samples in a step, above 0.
        critical: The critical batch size, in samples, at least 0.

    Raises:
        OptionError: if a size is out of range.

    Example:
        >>> steps_and_samples(100, 100), steps_and_samples(25, 100)
        ((2.0, 2.0), (5.0, 1.25))
    """
    check("steps_and_samples", "batch", batch, is_number(batch) and batch > 0, "a number above 0")
    known = is_number(critical) and critical >= 0
    check("steps_and_samples", "critical", critical, known, "a number of at least 0; a noise scale may be unresolved")
    return 1 + critical / batch, 1 + batch / critical if critical else math.inf


def ratio(trace: float, signal: float, variances: tuple[float, float, float]) -> NoiseScale:
    """The noise scale from estimates of tr(Sigma) and |G|^2, with its standard error by the delta method.

    Args:
        trace: The estimate of tr(Sigma).
        signal: The estimate of |G|^2.
        variances: Variance of the first, of the second, and their covariance.
    """
    of_trace, of_signal, both = variances
    estimate, error = math.nan, math.inf
    if signal > 0:
        estimate = trace / signal
        spread = of_trace - 2 * estimate * both + estimate * estimate * of_signal
        error = math.sqrt(max(0.0, spread)) / signal if math.isfinite(spread) else math.inf
    return NoiseScale(estimate, error, trace, math.sqrt(of_trace), signal, math.sqrt(of_signal))


def _listed(gradients_of_parts: Any) -> list[list[Tensor | None]]:
    """The parts, each as a list of real tensors."""
    try:
        given = [[part] if isinstance(part, Tensor | np.ndarray) else list(part) for part in gradients_of_parts]
    except TypeError:
        given = [[gradients_of_parts]]
    parts: list[list[Any]] = [[torch.from_numpy(g) if isinstance(g, np.ndarray) else g for g in one] for one in given]
    parts = [[g.to_dense() if isinstance(g, Tensor) and g.is_sparse else g for g in part] for part in parts]
    wrong = [g for part in parts for g in part if g is not None and not (isinstance(g, Tensor) and not g.is_complex())]
    if wrong:
        raise OptionError(
            f"noise_scale: gradients_of_parts holds {shown(wrong[0])}; it must have one entry for each part, a real "
            "tensor or a list of such tensors."
        )
    return parts


def _check_parts(parts: Sequence[Sequence[Tensor | None]]) -> None:
    if len(parts) < 2:
        raise OptionError(
            f"noise_scale: {len(parts)} part{'' if len(parts) == 1 else 's'} given; noise is seen between parts, so it "
            "needs the gradients over at least two, of as many samples each as you like."
        )
    for i, part in enumerate(parts):
        if [None if g is None else g.shape for g in part] != [None if g is None else g.shape for g in parts[0]]:
            raise OptionError(
                f"noise_scale: part {i} has other tensors than part 0. Each part is the gradient with respect to the "
                "same parameters; give zeros where one had none."
            )
    if not any(g is not None and g.numel() for g in parts[0]):
        raise OptionError("noise_scale: no part has a gradient. Is the model frozen, or the loss detached?")


def _sizes(sizes: float | Sequence[float] | Tensor, parts: int) -> list[float]:
    listed = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    found = list(listed) if isinstance(listed, Iterable) else [listed] * parts
    if len(found) != parts or not all(is_number(size) and 0 < size < math.inf for size in found):
        raise OptionError(
            f"noise_scale: sizes={shown(sizes)} must be the samples in a part, a number above 0, or one such number "
            f"for each of the {parts} parts."
        )
    return [float(size) for size in found]


@torch.no_grad()
def _inner_products(parts: Sequence[Sequence[Tensor | None]], shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """|g_i|^2 and <g_i, g> of each part, and |g|^2 of the weighted mean g, in float64 over all shards."""
    given = [i for i, g in enumerate(parts[0]) if g is not None]
    found = []
    for i in given:
        gradients = [local(part[i]).reshape(-1) for part in parts]  # type: ignore[arg-type]
        gradients = [g if g.is_floating_point() else g.double() for g in gradients]
        mean = torch.zeros_like(gradients[0], dtype=torch.float64)
        for g, share in zip(gradients, shares.tolist(), strict=True):
            mean.add_(g.double(), alpha=share)
        squares = [torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in gradients]
        found.append(torch.stack([*squares, *(g.double() @ mean for g in gradients), mean @ mean]).cpu())
    tensors: list[Tensor] = [parts[0][i] for i in given]  # type: ignore[misc]
    groups = [shard_of(g).process_groups for g in tensors]
    total = torch.stack(Reductions(tensors).reduce_tensors(found, groups)).sum(0)
    n = len(parts)
    return total[:n], total[n : 2 * n], total[2 * n]


def _jackknife(squares: Tensor, products: Tensor, whole: Tensor, b: Tensor) -> NoiseScale:
    """Estimates from all parts, and variances from leaving out one after the other."""
    n, total = len(b), b.sum()
    # Variances are squares of squares: in units of the largest, they neither overflow nor vanish.
    unit = float(squares.max()) or 1.0
    squares, products, whole = squares / unit, products / unit, whole / unit

    def estimates(square_sum: Tensor, mean_square: Tensor, size: Tensor, count: int) -> Tensor:
        trace = (square_sum - size * mean_square) / (count - 1)
        return torch.stack([trace, mean_square - trace / size])

    full = estimates((b * squares).sum(), whole, total, n)
    covariance = torch.full((2, 2), math.inf, dtype=torch.float64, device="cpu")
    if n > 2:
        rest = total - b
        mean_square = (total**2 * whole - 2 * total * b * products + b**2 * squares) / rest**2
        without = estimates((b * squares).sum() - b * squares, mean_square, rest, n - 1)
        away = without - without.mean(1, keepdim=True)
        covariance = away @ away.T * (n - 1) / n
    trace, signal = full.tolist()
    scaled = ratio(trace, signal, (float(covariance[0, 0]), float(covariance[1, 1]), float(covariance[0, 1])))
    measured = ("trace", "trace_error", "signal", "signal_error")
    return replace(scaled, **{name: unit * getattr(scaled, name) for name in measured})
