"""Literal float64 twins of the optimizers, written from the papers; they never import the package.

Every oracle is called as `oracle(params, gradients, *, lrs=None, losses=None, **options)` and returns the
parameters after each step, `result[k][j]` for step k and tensor j. `gradients[k][j]` is None for a tensor
that is skipped in step k, `lrs` is a learning rate per step that replaces `lr`, and `losses` holds the pairs
(mean loss, mean squared loss per sample) that only the KOALA methods read. All but these take `cautious` and
`cautious_decay`, which `driver.moved` understands.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from .acprop import acprop
from .adabelief import adabelief
from .adafactor import adafactor
from .adagrad import adagrad
from .adam import adam, adamw
from .adamax import adamax
from .adan import adan
from .ademamix import ademamix
from .adopt import adopt
from .diffgrad import diffgrad
from .driver import CAUTIOUS, Gradients, History, Oracle, Params
from .generalized_signsgd import generalized_signsgd
from .koala import koala_m, koala_v
from .layerwise import lamb, lars
from .lion import lion
from .mars import mars
from .moment_estimation_sgd import moment_estimation_sgd
from .muon import muon
from .nadam import nadam
from .padam import padam
from .pnm import adapnm, pnm
from .prodigy import prodigy
from .radam import radam
from .rmsprop import rmsprop
from .scalar_rmsprop import scalar_rmsprop
from .schedule_free import schedule_free_adamw, schedule_free_radam, schedule_free_sgd
from .sgd import sgd
from .sgdw import sgdw
from .soap import soap

__all__ = ["ORACLES", "Oracle"]


def _with_shared_options(oracle: Oracle) -> Oracle:
    @functools.wraps(oracle)
    def call(
        params: Params,
        gradients: Gradients,
        *,
        losses: Sequence[tuple[float, float]] | None = None,
        cautious: bool = False,
        cautious_decay: bool = False,
        **options: Any,
    ) -> History:
        token = CAUTIOUS.set((cautious, cautious_decay))
        try:
            return oracle(params, gradients, **options)
        finally:
            CAUTIOUS.reset(token)

    return call


ORACLES: dict[str, Oracle] = {
    oracle.__name__: _with_shared_options(oracle)
    for oracle in (
        acprop,
        adabelief,
        adafactor,
        adagrad,
        adam,
        adamax,
        adamw,
        adan,
        ademamix,
        adopt,
        adapnm,
        diffgrad,
        generalized_signsgd,
        lamb,
        lars,
        lion,
        mars,
        moment_estimation_sgd,
        nadam,
        muon,
        padam,
        pnm,
        prodigy,
        radam,
        rmsprop,
        scalar_rmsprop,
        schedule_free_adamw,
        schedule_free_radam,
        schedule_free_sgd,
        sgd,
        sgdw,
        soap,
    )
} | {"koala_m": koala_m, "koala_v": koala_v}
