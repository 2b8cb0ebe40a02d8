"""What a loss looks like around the parameters: its curvature, and what learning rates follow from it."""

from lightning_optim.analysis.batch_size import (
    batch_eigenvalue,
    curvature_factor,
    effective_batch,
    eigenvector_overlap,
    full_eigenvalue,
    hessian_noise,
    learning_rate_factor,
    least_damping,
    noise_edge,
)
from lightning_optim.analysis.diagonal import Diagonal, RMed, hessian_diagonal, r_med
from lightning_optim.analysis.noise_scale import NoiseScale, from_two_sizes, noise_scale, steps_and_samples
from lightning_optim.analysis.running_noise_scale import RunningNoiseScale
from lightning_optim.analysis.spectrum_rates import Rates, from_spectrum, gradient_descent, heavy_ball, nesterov
from lightning_optim.analysis.stability import stability_threshold

__all__ = [
    "Diagonal",
    "NoiseScale",
    "RMed",
    "Rates",
    "RunningNoiseScale",
    "batch_eigenvalue",
    "curvature_factor",
    "effective_batch",
    "eigenvector_overlap",
    "from_spectrum",
    "from_two_sizes",
    "full_eigenvalue",
    "gradient_descent",
    "heavy_ball",
    "hessian_diagonal",
    "hessian_noise",
    "learning_rate_factor",
    "least_damping",
    "nesterov",
    "noise_edge",
    "noise_scale",
    "r_med",
    "stability_threshold",
    "steps_and_samples",
]
