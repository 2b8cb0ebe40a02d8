"""What docs/callbacks.md says of two callbacks in one run: that they go together, or a sentence why not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lightning_optim import callbacks as ours
from lightning_optim.errors import OptionError
from tests.harness.data import Data
from tests.harness.modules import Configured
from tests.harness.trainers import QUIET

average = ours.IterateAveraging
REFUSED: dict[str, tuple[Any, list[Callback]]] = {
    "choose the weights": ("adamw", [average("ema"), ours.LookaheadSync(k=2, evaluate="slow")]),
    "averages its weights itself": ("schedule_free_adamw", [average("ema")]),
    "weights itself, and": ("schedule_free_adamw", [ours.LookaheadSync(k=2)]),
    "two warm-ups": ("schedule_free_adamw_warm", [ours.WarmupFreeSchedule()]),
    "which decay=": ("schedule_free_adamw", [ours.WarmupFreeSchedule(decay="cosine")]),
    "does too": ("sgd", [ours.CurvatureSchedule(steps=2), ours.BatchSizeScaling(4, batch_size=4)]),
    "Two decays": ("cosine", [ours.WarmupFreeSchedule(decay="cosine")]),
    "which clips in its update": ("clipped", [ours.GradientNoise(clipping="after")]),
}
SPECS: dict[str, Any] = {
    "schedule_free_adamw_warm": {"name": "schedule_free_adamw", "warmup_steps": 2},
    "sgd": {"name": "sgd", "momentum": 0.9},
    "cosine": {"name": "adamw", "schedule": "cosine"},
    "clipped": {"name": "adan", "max_grad_norm": 1.0},
}
TOGETHER: dict[str, tuple[Any, list[Callback]]] = {
    "a sync before a snapshot": ("adamw", [average("ema"), ours.LookaheadSync(k=2)]),
    "factors multiply": ("adamw", [ours.WarmupFreeSchedule(), ours.BatchSizeScaling(4, batch_size=4)]),
    "a warm-up and a schedule": ("cosine", [ours.WarmupFreeSchedule()]),
    "a trial step": ("adamw", [ours.GradInit(iterations=1, gamma=1e9, table=False), ours.WarmupFreeSchedule()]),
    "a guard and an average": ("adamw", [ours.NonFiniteGuard(), average("ema"), ours.GradientNoise()]),
    "looks": ("adamw", [ours.CurvatureMonitor(steps=2, probes=1), ours.LocalGeometry(probes=2), average("ema")]),
}


def fit(spec: str, callbacks: list[Callback], **options: Any) -> int:
    quiet = {**QUIET, "enable_checkpointing": False, "max_steps": 3}
    trainer = Trainer(callbacks=callbacks, **{**quiet, **options})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a run of three steps is shorter than warm-ups
        trainer.fit(Configured(SPECS.get(spec, spec)), Data())
    return trainer.global_step


@pytest.mark.parametrize("why", REFUSED)
def test_what_does_not_go_together_is_refused(why: str) -> None:
    spec, callbacks = REFUSED[why]
    with pytest.raises(OptionError, match=why):
        fit(spec, callbacks)


@pytest.mark.parametrize("how", TOGETHER)
def test_what_goes_together_trains(how: str) -> None:
    spec, callbacks = TOGETHER[how]
    assert fit(spec, callbacks) == 3
