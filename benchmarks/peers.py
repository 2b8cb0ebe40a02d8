"""Optimizers of other packages, if they are installed.

The package itself needs none of them. `pip install bitsandbytes torchao flashoptim torch-optimi` installs all of them.
A missing one is left out, and the tables say so.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "flashoptim": "flashoptim", "optimi": "torch-optimi"}

Make = Callable[[list[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package.

    Attributes:
        label: For tables.
        package: What has to be imported.
        path: The class, from the package on.
        bits: Bits per value of state.
        options: Beside those that all contenders share.
        dtype: The type that parameters and gradients must have for this state; None for any.
    """

    label: str
    package: str
    path: str
    bits: int
    options: dict[str, Any]
    dtype: torch.dtype | None = None

    def make(self, params: Sequence[Tensor], **shared: Any) -> torch.optim.Optimizer:
        """The optimizer for these parameters."""
        found = module(self.package)
        for word in self.path.split("."):
            found = getattr(found, word)
        optimizer: torch.optim.Optimizer = found(list(params), **{**shared, **self.options})
        return optimizer


def _torch(cls: str, bits: int = 32, **options: Any) -> Peer:
    how = next(iter(options), "")
    return Peer(f"torch {cls} {how}".strip(), "torch.optim", cls, bits, options)


_FLASH = {"master_weight_bits": None}
_OPTIMI = {"betas": (0.9, 0.999), "eps": 1e-8}

# Beside `lr` and, where it is set, `weight_decay`, the options of each are those that give the same mathematics.
PEERS: dict[str, list[Peer]] = {
    "adamw": [
        _torch("AdamW", fused=True),
        _torch("AdamW", foreach=True),
        Peer("bitsandbytes AdamW 32-bit", "bitsandbytes", "optim.AdamW", 32, {}),
        Peer("bitsandbytes AdamW8bit", "bitsandbytes", "optim.AdamW8bit", 8, {}),
        Peer("torchao AdamW8bit", "torchao.optim", "AdamW8bit", 8, {}),
        Peer("torchao AdamWFp8", "torchao.optim", "AdamWFp8", 8, {}),
        Peer("torchao AdamW4bit", "torchao.optim", "AdamW4bit", 4, {}),
        Peer("flashoptim FlashAdamW", "flashoptim", "FlashAdamW", 8, _FLASH),
        Peer(
            "flashoptim FlashAdamW 32-bit",
            "flashoptim",
            "FlashAdamW",
            32,
            {"master_weight_bits": None, "quantize": False},
        ),
        Peer("optimi AdamW", "optimi", "AdamW", 32, _OPTIMI),
        Peer("optimi AdamW bfloat16", "optimi", "AdamW", 16, {**_OPTIMI, "kahan_sum": False}, torch.bfloat16),
    ],
    "adan": [Peer("optimi Adan", "optimi", "Adan", 32, {"eps": 1e-8})],
    "lion": [
        Peer("bitsandbytes Lion 32-bit", "bitsandbytes", "optim.Lion", 32, {}),
        Peer("bitsandbytes Lion8bit", "bitsandbytes", "optim.Lion8bit", 8, {}),
        Peer("flashoptim FlashLion", "flashoptim", "FlashLion", 8, _FLASH),
        Peer("optimi Lion", "optimi", "Lion", 32, {}),
    ],
    "lamb": [
        Peer("bitsandbytes LAMB 32-bit (clips, no trust ratio)", "bitsandbytes", "optim.LAMB", 32, {}),
        Peer("bitsandbytes LAMB8bit (no trust ratio)", "bitsandbytes", "optim.LAMB8bit", 8, {}),
    ],
    "radam": [_torch("RAdam", foreach=True), Peer("optimi RAdam", "optimi", "RAdam", 32, _OPTIMI)],
}


@functools.cache
def module(name: str) -> Any:
    """The module of a peer; raises what its import raises."""
    return importlib.import_module(name)


def missing(peer: Peer) -> str:
    """Why a peer cannot be used here; empty where it can."""
    try:
        module(peer.package)
    except ImportError:
        return "not installed"
    except Exception as error:  # a package for another build of torch fails in its own ways
        return f"cannot be imported: {type(error).__name__}"
    return ""


def versions() -> dict[str, str]:
    """The versions of the packages that are installed."""
    installed = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    return {name: installed[name] for name in PACKAGES.values() if name in installed}
