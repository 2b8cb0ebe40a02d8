"""Callbacks for the Trainer. They decide when something happens; stages and pure functions do the arithmetic."""

from lightning_optim.callbacks.batch_size_scaling import BatchSizeScaling
from lightning_optim.callbacks.checkpoint_integrity import CheckpointIntegrity
from lightning_optim.callbacks.communication import Communication
from lightning_optim.callbacks.curvature_monitor import CurvatureMonitor
from lightning_optim.callbacks.curvature_schedule import CurvatureSchedule
from lightning_optim.callbacks.dashboard import Dashboard
from lightning_optim.callbacks.evaluation_weights import EvaluationWeights
from lightning_optim.callbacks.grad_init import GradInit
from lightning_optim.callbacks.gradient_noise import GradientNoise
from lightning_optim.callbacks.gradient_noise_scale import GradientNoiseScale
from lightning_optim.callbacks.gradient_norm_profile import GradientNormProfile
from lightning_optim.callbacks.iterate_averaging import IterateAveraging
from lightning_optim.callbacks.local_geometry import LocalGeometry
from lightning_optim.callbacks.lookahead_sync import LookaheadSync
from lightning_optim.callbacks.loss_input import LossInput
from lightning_optim.callbacks.non_finite_guard import NonFiniteGuard
from lightning_optim.callbacks.optimizer_state_memory import OptimizerStateMemory
from lightning_optim.callbacks.stationarity_monitor import StationarityMonitor
from lightning_optim.callbacks.warmup_free_schedule import WarmupFreeSchedule

__all__ = [
    "BatchSizeScaling",
    "CheckpointIntegrity",
    "Communication",
    "CurvatureMonitor",
    "CurvatureSchedule",
    "Dashboard",
    "EvaluationWeights",
    "GradInit",
    "GradientNoise",
    "GradientNoiseScale",
    "GradientNormProfile",
    "IterateAveraging",
    "LocalGeometry",
    "LookaheadSync",
    "LossInput",
    "NonFiniteGuard",
    "OptimizerStateMemory",
    "StationarityMonitor",
    "WarmupFreeSchedule",
]
