"""The optimizers that are measured on a CPU: all of this package, and their equivalents in other packages."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.contenders import SHARED, Contender
from benchmarks.peers import PEERS, Peer, missing
from lightning_optim import storage
from lightning_optim.core.optimizer import OPTIMIZERS

PACKAGES = ("torch.optim", "pytorch_optimizer", "optimi", "bitsandbytes", "torchao.optim")
BASE = Peer("torch AdamW fused", "torch.optim", "AdamW", 32, {"fused": True})


@dataclass(frozen=True)
class Entry:
    """One line of the measurement.

    Attributes:
        optimizer: Our word for the method.
        package: Whose it is; "ours" for this package.
        engine: Who runs it, where it is ours.
        contender: What takes the steps.
        warm: Steps before it runs as it will go on.
    """

    optimizer: str
    package: str
    engine: str
    contender: Contender
    warm: int

    @property
    def key(self) -> str:
        return f"{self.optimizer}/{self.contender.label}"


def base() -> Contender:
    """What everything is compared with."""
    return Contender(BASE.label, 32, functools.partial(BASE.make, **shared("adamw")), ours=False)


def shared(name: str) -> dict[str, Any]:
    """The options that all who take the place of an optimizer have."""
    return SHARED.get(name, {"lr": 1e-4})


def ours(name: str, engine: str) -> list[Entry]:
    """One of our optimizers at 32 bits, and at 8 where it has state that may be in codes."""
    cls = OPTIMIZERS[name]
    found = []
    for bits in (32, 8):
        if bits == 8 and not any(storage.can_be_quantized(slot) for slot in cls.slots.values()):
            continue
        options: dict[str, Any] = {**shared(name), "state_bits": bits, "engine": engine}
        label = f"ours, {bits} bits" if engine == "auto" else f"ours, {engine}, {bits} bits"
        contender = Contender(label, bits, functools.partial(cls, **options), ours=True)
        found.append(Entry(name, "ours", engine, contender, _warm(name)))
    return found


def others(name: str, packages: Sequence[str] = PACKAGES) -> tuple[list[Entry], dict[str, str]]:
    """What takes the place of one of our optimizers elsewhere, and why some of it cannot take part.

    Args:
        name: A word such as adamw.
        packages: Those that may take part.
    """
    found, absent = [], {}
    for peer in (*PEERS.get(name, ()), *MORE.get(name, ())):
        if peer.package not in packages or peer.dtype not in (None, torch.float32):
            continue
        if reason := missing(peer):
            absent[peer.label] = reason
            continue
        contender = Contender(peer.label, peer.bits, functools.partial(peer.make, **shared(name)), ours=False)
        found.append(Entry(name, peer.package, "", contender, _warm(name)))
    return found, absent


def _warm(name: str) -> int:
    return 8 if name in ("radam", "adabelief") else 3  # the first steps are not rectified, and shorter


def _torch(cls: str, fused: bool = False, foreach: bool = True, **options: Any) -> list[Peer]:
    """A class of torch in each of its ways, as far as `benchmarks/peers.py` does not have it."""
    ways: list[tuple[str, dict[str, Any]]] = [("for-loop", {"foreach": False})]
    ways += [("foreach", {"foreach": True})] if foreach else []
    ways += [("fused", {"fused": True})] if fused else []
    return [Peer(f"torch {cls} {way}", "torch.optim", cls, 32, {**options, **flags}) for way, flags in ways]


def _po(cls: str, **options: Any) -> Peer:
    return Peer(f"pytorch_optimizer {cls}", "pytorch_optimizer", cls, 32, options)


def _bnb(cls: str, bits: int, **options: Any) -> Peer:
    return Peer(f"bitsandbytes {cls}", "bitsandbytes", f"optim.{cls}", bits, options)


# Beyond `benchmarks/peers.py`. pytorch_optimizer's AdamW is torch's.
MORE: dict[str, list[Peer]] = {
    "adabelief": [_po("AdaBelief", rectify=True)],
    "adafactor": [*_torch("Adafactor"), _po("AdaFactor", relative_step=False)],
    "adam": _torch("Adam", fused=True),
    "adamax": [*_torch("Adamax"), _po("AdaMax")],
    "adamw": _torch("AdamW", foreach=False),
    "adan": [_po("Adan")],
    "adapnm": [_po("AdaPNM")],
    "diffgrad": [_po("DiffGrad")],
    "lamb": [_po("Lamb", max_grad_norm=0.0)],
    "lars": [_po("LARS")],
    "lion": [_po("Lion")],
    "padam": [_po("PAdam")],
    "pnm": [_po("PNM")],
    "radam": [*_torch("RAdam", foreach=False), _po("RAdam")],
    "rmsprop": [*_torch("RMSprop"), _bnb("RMSprop8bit", 8)],
    "sgdw": [
        *_torch("SGD", fused=True, momentum=0.9),
        _po("SGDW", momentum=0.9),
        Peer("optimi SGD", "optimi", "SGD", 32, {"momentum": 0.9}),
        _bnb("SGD8bit", 8, momentum=0.9),
    ],
}
