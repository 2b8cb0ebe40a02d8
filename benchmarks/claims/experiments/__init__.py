"""The experiments, a module for each claim, which holds it as `CLAIM`."""

from __future__ import annotations

import importlib

from benchmarks.claims.claim import Claim
from lightning_optim.errors import OptionError, nearest, shown

CLAIMS = (  # as docs/claims.md lists them
    "warm_up",
    "layer_norms",
    "grad_init",
    "lookahead",
    "averaging",
    "acprop",
    "generalized_signsgd",
    "koala",
    "label_noise",
    "adafactor",
    "diffgrad",
    "decoupled_decay",
    "adan",
    "stationarity",
    "batch_size",
    "local_geometry",
    "moment_estimation",
    "eight_bits",
    "large_batches",
    "rmsprop",
)


def load(name: str) -> Claim:
    """A claim by its name.

    Raises:
        OptionError: for an unknown one.
    """
    if name not in CLAIMS:
        raise OptionError(f"there is no claim {shown(name)}.{nearest(name, CLAIMS)} There are {', '.join(CLAIMS)}.")
    claim: Claim = importlib.import_module(f"{__name__}.{name}").CLAIM
    return claim
