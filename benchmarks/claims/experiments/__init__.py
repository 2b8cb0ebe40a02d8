"""The experiments, a module for each claim, which holds it as `CLAIM`."""

from __future__ import annotations

import importlib
from pathlib import Path

from benchmarks.claims.claim import Claim
from lightning_optim.errors import OptionError, nearest, shown

ORDER = (  # as docs/claims.md lists them
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


def names() -> tuple[str, ...]:
    """The names of all claims."""
    return tuple(name for name in ORDER if (Path(__file__).parent / f"{name}.py").exists())


def load(name: str) -> Claim:
    """A claim by its name.

    Raises:
        OptionError: for an unknown one.
    """
    if name not in names():
        raise OptionError(f"there is no claim {shown(name)}.{nearest(name, names())} There are {', '.join(names())}.")
    claim: Claim = importlib.import_module(f"{__name__}.{name}").CLAIM
    return claim
