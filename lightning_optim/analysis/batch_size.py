"""How curvature and the learning rate depend on the batch size.

Granziol, Zohren & Roberts 2022, "Learning rates as a function of batch size: a random matrix theory approach to
neural network training", JMLR 23(173), arXiv:2006.09092. The Hessian of a batch is that of all data plus a symmetric
matrix of noise. Throughout, `noise` is the number κ = P σ² / B of parameters times the variance of an element of that
matrix; it falls with the batch size like 1 / B.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor

from lightning_optim import errors
from lightning_optim.analysis.vectors import Vectors
from lightning_optim.errors import OptionError, is_number

Rule = Literal["linear", "sqrt"]


def learning_rate_factor(batch: int, reference: int, rule: Rule = "linear", most: float = math.inf) -> float:
    """The factor on a learning rate that was tuned at batch size `reference`, as long as noise dominates curvature.

    Args:
        batch: Global batch size, in samples.
        reference: Batch size for which the learning rate is right, in samples.
        rule: "linear" is batch / reference, for SGD; "sqrt" is its root, for adaptive methods.
        most: Upper bound of the factor.

    Raises:
        OptionError: if a batch size is not above 0, or if there is no such rule.

    Example:
        >>> learning_rate_factor(4096, 256), learning_rate_factor(4096, 256, "sqrt")
        (16.0, 4.0)
        >>> learning_rate_factor(4096, 256, most=8)
        8
    """
    _check("learning_rate_factor", batch=batch, reference=reference, most=most)
    errors.check_choice("learning_rate_factor", "rule", rule, ["linear", "sqrt"])
    ratio = batch / reference
    return min(math.sqrt(ratio) if rule == "sqrt" else ratio, most)


def curvature_factor(
    batch: int,
    reference: int,
    eigenvalue: float | Tensor,
    noise: float | Tensor,
    rule: Rule = "linear",
    samples: float = math.inf,
) -> float:
    """The factor on a learning rate between two batch sizes, from the largest eigenvalues of both batch Hessians.

    For SGD ("linear") a step is stable up to 2 / λ' of the batch Hessian, so this is λ'(reference) / λ'(batch). It is
    linear in the batch as long as noise dominates, and constant once it does not. For adaptive methods ("sqrt") the
    curvature is divided by its root, so it is the root of that.

    Args:
        batch: Global batch size, in samples.
        reference: Batch size for which the learning rate is right, in samples.
        eigenvalue: The largest eigenvalue of the Hessian on all data, above 0.
        noise: κ at batch size `reference`; 0 where that is all data.
        rule: "linear" for SGD, "sqrt" for adaptive methods.
        samples: Number of samples in the data set, for batches that are drawn without replacement.

    Raises:
        OptionError: if an argument is out of range.

    Example:
        >>> round(curvature_factor(64, 16, eigenvalue=0.5, noise=0.05), 6)  # 0.6 / 0.525
        1.142857
        >>> round(curvature_factor(4, 1, eigenvalue=1e-3, noise=0.8), 6)  # noise alone: the root, as of its norm
        2.0
    """
    owner, eigenvalue, noise = "curvature_factor", number(eigenvalue), number(noise)
    _check(owner, batch=batch, reference=reference, eigenvalue=eigenvalue, samples=samples)
    errors.check_choice(owner, "rule", rule, ["linear", "sqrt"])
    _check_noise(owner, noise)
    one, other = effective_batch(reference, samples), effective_batch(batch, samples)
    known = math.isfinite(one) or (noise == 0 and batch == reference)
    allowed = f"below {samples:g}, the size of the data set: on all of it nothing is known about the noise of a batch"
    errors.check(owner, "reference", reference, known, allowed)
    there = noise * one / other if noise else 0.0
    ratio = batch_eigenvalue(eigenvalue, noise) / batch_eigenvalue(eigenvalue, there)
    return math.sqrt(ratio) if rule == "sqrt" else ratio


def effective_batch(batch: float, samples: float = math.inf) -> float:
    """Batch size B / (1 - B / N) with which noise falls when B of N samples are drawn without replacement.

    Args:
        batch: Batch size B, in samples.
        samples: Number of samples N in the data set, at least the batch size. For B = N there is no noise: infinity.

    Raises:
        OptionError: if the batch is larger than the data set.

    Example:
        >>> round(effective_batch(64, 50000), 6)
        64.082025
    """
    _check("effective_batch", batch=batch, samples=samples)
    errors.check("effective_batch", "batch", batch, batch <= samples, f"at most {samples:g}, the size of the data set")
    return math.inf if batch == samples else batch / (1 - batch / samples)


def batch_eigenvalue(eigenvalue: float | Tensor, noise: float | Tensor) -> float:
    """Where an extreme eigenvalue of the Hessian on all data lies in the Hessian of a batch (equation 6.4).

    It moves outward to λ + κ / λ if |λ| > √κ. Otherwise it disappears in the noise, whose spectrum ends at ±2√κ.

    Args:
        eigenvalue: The largest or smallest eigenvalue λ on all data.
        noise: κ of the batch.

    Example:
        >>> round(batch_eigenvalue(0.5, 0.05), 6), round(batch_eigenvalue(0.5, 0.8), 6)
        (0.6, 1.788854)
    """
    eigenvalue, noise = number(eigenvalue), number(noise)
    _check_noise("batch_eigenvalue", noise, eigenvalue=eigenvalue)
    if abs(eigenvalue) > math.sqrt(noise):
        return eigenvalue + noise / eigenvalue
    return math.copysign(noise_edge(noise), eigenvalue)


def full_eigenvalue(of_batch: float | Tensor, noise: float | Tensor) -> float:
    """The extreme eigenvalue on all data, from that of a batch: the inverse of `batch_eigenvalue`.

    Args:
        of_batch: The largest or smallest eigenvalue of the Hessian of a batch.
        noise: κ of the batch.

    Raises:
        OptionError: if the eigenvalue lies within the spectrum of the noise, which tells nothing about all data.

    Example:
        >>> round(full_eigenvalue(0.6, 0.05), 6)
        0.5
    """
    of_batch, noise = number(of_batch), number(noise)
    _check_noise("full_eigenvalue", noise, of_batch=of_batch)
    if abs(of_batch) <= noise_edge(noise):
        raise OptionError(
            f"full_eigenvalue: of_batch={of_batch:g} lies within the noise, whose spectrum ends at "
            f"{noise_edge(noise):g}, so it does not depend on the eigenvalue of all data. Take a larger batch."
        )
    size = abs(of_batch) * (1 + math.sqrt(1 - (noise_edge(noise) / of_batch) ** 2)) / 2
    return math.copysign(size, of_batch)


def noise_edge(noise: float) -> float:
    """The largest eigenvalue 2√κ of the noise itself (equation 6.3).

    Example:
        >>> noise_edge(0.25)
        1.0
    """
    _check_noise("noise_edge", noise)
    return 2 * math.sqrt(noise)


def eigenvector_overlap(eigenvalue: float | Tensor, noise: float | Tensor) -> float:
    """The squared cosine between an extreme eigenvector on all data and that of a batch: 1 - κ / λ² (equation 6.5).

    Example:
        >>> round(eigenvector_overlap(0.5, 0.05), 6), eigenvector_overlap(0.5, 0.8)
        (0.8, 0.0)
    """
    eigenvalue, noise = number(eigenvalue), number(noise)
    _check_noise("eigenvector_overlap", noise, eigenvalue=eigenvalue)
    return max(0.0, 1 - noise / eigenvalue / eigenvalue) if eigenvalue else 0.0


def hessian_noise(products: Sequence[Tensor | Sequence[Tensor]]) -> float:
    """Estimate κ from the products of the Hessians of several batches with one vector of norm 1 (equation 6.7).

    It is the variance of the products over batches, summed over elements, without bias.

    Args:
        products: For each batch the list of tensors H_b z, whole or DTensors.

    Raises:
        OptionError: for fewer than two batches, for tensors of other shapes than those of the first, or where one is
            not finite.

    Example:
        >>> round(hessian_noise([[torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 0.0])]]), 6)
        0.5
    """
    several = isinstance(products, Iterable)
    found = [[one] if isinstance(one, Tensor) else list(one) for one in products] if several else []
    if len(found) < 2:
        raise OptionError(f"hessian_noise: products of {len(found)} batches given; it needs those of two or more.")
    if not found[0] or any([x.shape for x in one] != [x.shape for x in found[0]] for one in found):
        raise OptionError("hessian_noise: give the same tensors for each batch, one for each parameter.")
    space = Vectors(found[0])
    noise = noise_between(space, [space.flat(product) for product in found])
    if not math.isfinite(noise):
        raise OptionError("hessian_noise: a product is not finite. Leave that batch out.")
    return noise


def noise_between(space: Vectors, vectors: Sequence[Tensor]) -> float:
    """The variance of vectors, summed over elements, without bias. See `hessian_noise`."""
    mean = torch.stack(list(vectors)).mean(0)
    return math.fsum(float(space.dots((v - mean)[None], v - mean)) for v in vectors) / (len(vectors) - 1)


def least_damping(lr: float, eigenvalue: float | Tensor, noise: float | Tensor) -> float:
    """The least damping δ with which steps along (H + δ)⁻¹ g are stable on a batch (equation 6.10).

    Args:
        lr: Learning rate.
        eigenvalue: The largest eigenvalue λ on all data, to which the preconditioner belongs.
        noise: κ of the batch.

    Example:
        >>> round(least_damping(2.0, 0.5, 0.05), 6), round(least_damping(4.0, 0.5, 0.05), 6)
        (0.1, 0.7)
    """
    eigenvalue = number(eigenvalue)
    _check("least_damping", lr=lr)
    return max(0.0, lr / 2 * batch_eigenvalue(eigenvalue, noise) - eigenvalue)


def number(value: float | Tensor) -> float:
    """A tensor with one element, such as an eigenvalue that `extreme_eigenvalues` has found, as a number.

    Example:
        >>> number(torch.tensor([2.0])), number(3.0)
        (2.0, 3.0)
    """
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value  # type: ignore[return-value]


def _check(owner: str, **values: float) -> None:
    for name, value in values.items():
        errors.check(owner, name, value, is_number(value) and value > 0, "a number above 0")


def _check_noise(owner: str, noise: float, **eigenvalues: float) -> None:
    errors.check(owner, "noise", noise, is_number(noise) and 0 <= noise < math.inf, "a number of at least 0")
    for name, value in eigenvalues.items():
        errors.check(owner, name, value, is_number(value) and math.isfinite(value), "a finite number")
