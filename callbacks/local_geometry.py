"""How uneven the curvature is that an optimizer finds: R_med of the Hessian's diagonal along the trajectory.

Jiang, Malik & Li 2023, "How does adaptive optimization impact local neural network geometry?", arXiv:2211.02254.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Trainer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.diagonal import diagonal_of, r_med
from lightning_optim.analysis.products import Products
from lightning_optim.callbacks.looking_callback import LookingCallback, Tick
from lightning_optim.errors import is_whole
from lightning_optim.reports.local_geometry import trajectories

NAME = "LocalGeometry"


class LocalGeometry(LookingCallback):
    """Measure R_med, the largest over the median absolute element of the Hessian's diagonal, with its error.

    It is a condition number as adaptive methods see it, coordinate by coordinate. Where Adam goes it is small, and
    where SGD with momentum goes it is larger. Compare runs of one model at equal loss, since rescaling a layer changes
    it: `lightning_optim.reports.local_geometry.trajectories` shows several runs in one picture.

    The diagonal is estimated by random probes, whose errors raise the median and so lower R_med; the error that is
    logged includes that. Training does not notice: no generator moves, gradients, buffers and data order are what they
    were. Under FSDP products are central differences.

    It logs `local_geometry/r_med`, `.../r_med_error`, `.../largest`, `.../median`, `.../negative` (the share of
    elements below zero), with `layers=True` `.../layer/<parameter>`, and with matplotlib a figure to TensorBoard.

    Source: Jiang, Malik & Li 2023, arXiv:2211.02254.

    Args:
        every_n_steps: Optimizer steps from one look to the next; the first is before training.
        probes: Number of probes in a look, from 2 to 10000. Each costs about 2 to 3 training steps; the error of the
            diagonal falls with the root.
        batches: Number of training batches of each rank that are looked at, the same in the whole fit.
        seed: Which batches these are, and the seed of the probes.
        layers: Also measure R_med of each parameter by itself.

    Attributes:
        history: What each look has found, with `step` and `loss`.

    Raises:
        OptionError: if an option is out of range; at the start of training, if the loader gives its batches only once.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> geometry = LocalGeometry(every_n_steps=2, probes=10)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=4, callbacks=[geometry], **options).fit(BoringModel())
        >>> [(found["step"], found["r_med"] >= 1) for found in geometry.history]
        [(0, True), (2, True), (4, True)]

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.LocalGeometry
                  init_args: {every_n_steps: 500, probes: 100}
    """

    prefix = "local_geometry"

    def __init__(
        self, every_n_steps: int = 1000, probes: int = 100, batches: int = 1, seed: int = 0, layers: bool = False
    ) -> None:
        super().__init__(every_n_steps, batches, seed)
        errors.check(NAME, "probes", probes, is_whole(probes, 2) and probes <= 10000, "an integer from 2 to 10000")
        errors.check(NAME, "layers", layers, isinstance(layers, bool), "True or False")
        self.probes, self.layers = int(probes), layers

    @override
    def products(self) -> int:
        return self.probes

    @override
    def look(self, trainer: Trainer, times: Products, tick: Tick) -> dict[str, float]:
        diagonal = diagonal_of(times, self.probes, self.seed, tick)
        whole = r_med(diagonal, seed=self.seed)
        space = times.space
        below = (space.flat(diagonal) < 0).to(space.dtype)
        negative = float(space.dots(below[None], torch.ones_like(below))[0]) / space.dimension
        found = {
            "r_med": float(whole),
            "r_med_error": whole.error,
            "largest": whole.largest,
            "median": whole.median,
            "negative": negative,
        }
        if self.layers and self.fixed is not None:
            for i, name in enumerate(self.fixed.parameters()):
                found[f"layer/{name}"] = float(r_med(diagonal.of(i), seed=self.seed))
        return found

    @override
    def draw(self, trainer: Trainer) -> Mapping[str, Any]:
        name = type(trainer.optimizers[0]).__name__ if trainer.optimizers else "run"
        return {"trajectory": trajectories({name: self.history})}
