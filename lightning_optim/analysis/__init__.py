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
from lightning_optim.analysis.density import SpectralDensity, spectral_density
from lightning_optim.analysis.diagonal import Diagonal, RMed, hessian_diagonal, r_med
from lightning_optim.analysis.eigenvalues import Extremes, extreme_eigenvalues
from lightning_optim.analysis.gradient_square import FullGradient, full_gradient
from lightning_optim.analysis.noise_scale import NoiseScale, from_two_sizes, noise_scale, steps_and_samples
from lightning_optim.analysis.running_noise_scale import RunningNoiseScale
from lightning_optim.analysis.spectrum_rates import Rates, from_spectrum, gradient_descent, heavy_ball, nesterov
from lightning_optim.analysis.stability import stability_threshold
from lightning_optim.analysis.stationarity import Stationarity, stationarity

__all__ = [
    "Diagonal",
    "Extremes",
    "FullGradient",
    "NoiseScale",
    "RMed",
    "Rates",
    "RunningNoiseScale",
    "SpectralDensity",
    "Stationarity",
    "batch_eigenvalue",
    "curvature_factor",
    "effective_batch",
    "eigenvector_overlap",
    "extreme_eigenvalues",
    "from_spectrum",
    "from_two_sizes",
    "full_eigenvalue",
    "full_gradient",
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
    "spectral_density",
    "stability_threshold",
    "stationarity",
    "steps_and_samples",
]
