"""The optimizers that are measured on a GPU: ours at 32 and 8 bits, and their equivalents in other packages."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import PEERS, missing
from lightning_optim import Optimizer
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.program import Program
from lightning_optim.language.symbols import Kind, Symbol
from lightning_optim.storage import Quantized

NAMES = ("adamw", "adan", "lion", "lamb", "radam")
SHARED: dict[str, dict[str, Any]] = {
    name: {"lr": 1e-4, **({"weight_decay": 0.01} if name in ("adamw", "lamb") else {})} for name in NAMES
}


@dataclass(frozen=True)
class Contender:
    """Something that takes a step.

    Attributes:
        label: For tables.
        bits: Bits per value of state.
        make: The optimizer for parameters.
        ours: Whether it is this package's.
    """

    label: str
    bits: int
    make: Callable[[Sequence[Tensor]], torch.optim.Optimizer]
    ours: bool


def ours(name: str) -> list[Contender]:
    """One of our optimizers in the precisions that are compared, the Triton engine running it."""
    found = []
    for label, bits, form in (("32 bits", 32, "log"), ("8 bits", 8, "log"), ("8 bits, dynamic", 8, "dynamic")):
        options: dict[str, Any] = {**SHARED[name], "state_bits": bits, "state_format": form, "engine": "triton"}
        make = functools.partial(OPTIMIZERS[name], **options)
        found.append(Contender(f"ours, {label}", bits, make, ours=True))
    return found


def others(
    name: str, dtype: torch.dtype, packages: Sequence[str] | None = None
) -> tuple[list[Contender], dict[str, str]]:
    """What takes the place of one of our optimizers elsewhere, and why some of it cannot take part.

    Args:
        name: A word such as adamw.
        dtype: The type of the parameters.
        packages: Those that may take part; all if None.
    """
    found, absent = [], {}
    for peer in PEERS[name]:
        if packages is not None and peer.package not in packages:
            continue
        if reason := missing(peer):
            absent[peer.label] = reason
        elif peer.dtype in (None, dtype):
            make = functools.partial(peer.make, **SHARED[name])
            found.append(Contender(peer.label, peer.bits, make, ours=False))
    return found, absent


class OneByOne(torch.optim.Optimizer):
    """AdamW with one fused launch of torch for each tensor: what a launch costs where tensors are small."""

    def __init__(self, params: Sequence[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for p in params:
            zeros = (torch.zeros_like(p), torch.zeros_like(p), torch.zeros((), device=p.device))
            self.state[p] = dict(zip(("exp_avg", "exp_avg_sq", "step"), zeros, strict=True))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        numbers = {
            **{"lr": group["lr"], "beta1": 0.9, "beta2": 0.999, "weight_decay": group["weight_decay"], "eps": 1e-8},
            **{"amsgrad": False, "maximize": False},
        }
        for p in group["params"]:
            m, v, t = self.state[p].values()
            t += 1
            torch._fused_adamw_([p], [p.grad], [m], [v], [], [t], **numbers)


def one_by_one() -> Contender:
    """AdamW, one launch for each tensor."""
    return Contender("torch AdamW fused, a call per tensor", 32, functools.partial(OneByOne, **SHARED["adamw"]), False)


# ---------------------------------------------------------------------------------------------- bytes


def bytes_that_must_move(optimizer: torch.optim.Optimizer, state: int) -> int:
    """The bytes that a step cannot do without, each pass reading and writing what it needs once.

    For our optimizers it is read off the update, so a pass for sums counts what these sums need; for others it is the
    parameter and the state twice and the gradient once.

    Args:
        optimizer: After some steps. The update of the last one counts: that of the first may be another one.
        state: The bytes of its state.
    """
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    if not isinstance(optimizer, Optimizer):
        return sum(3 * p.numel() * p.element_size() for p in params) + 2 * state
    total = 0
    for batch in optimizer._runner.cached["update"].batches:
        for p in (param.source for param in batch.params):
            held = {"p", "g", *optimizer.state[p]}  # a vector of Adafactor lacks what a matrix in its batch has
            total += sum(_bytes_of(name, p, optimizer.state[p]) for name in _accesses(batch.program) if name in held)
    return total


def _accesses(program: Program) -> list[str]:
    """What a step reads and writes of a tensor, a name once for each time."""
    found = [*program.reads, *program.writes]
    for level in range(1, program.levels + 1):  # the sums of a level have a pass, and so have its means along axes
        sums = [symbol for symbol in program.reductions if symbol.level == level]
        found += [*_inputs(sums), *_inputs(program.averaged(level))]
    return found


def _inputs(symbols: Sequence[Any]) -> set[str]:
    """Names of the per-element inputs that some results need."""
    found: set[str] = set()
    waiting, seen = list(symbols), set()
    while waiting:
        symbol = waiting.pop()
        if not isinstance(symbol, Symbol) or id(symbol) in seen:
            continue
        seen.add(id(symbol))
        if symbol.name == "element":
            found.add(symbol.args[0])
        elif symbol.kind == Kind.ELEMENT or symbol in symbols:
            waiting += symbol.args
    return found


def _bytes_of(name: str, p: Tensor, state: dict[str, Any]) -> int:
    if name in ("p", "g"):
        return p.numel() * p.element_size()
    value: Tensor | Quantized = state[name]
    return value.nbytes if isinstance(value, Quantized) else value.numel() * value.element_size()
