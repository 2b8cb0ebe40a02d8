"""The memory of a training before anything runs: a module on the meta device, on ranks that do not exist."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from lightning_optim.config.mixin import ConfiguredOptimizer
from lightning_optim.distributed.placement import block, is_dtensor, logical_shape
from lightning_optim.errors import OptionError, check_choice
from lightning_optim.estimate.activations import measure
from lightning_optim.estimate.candidates import Candidate, read_candidates
from lightning_optim.estimate.counting import count, unpredicted_note
from lightning_optim.estimate.fake_ranks import as_rank
from lightning_optim.estimate.placing import Make, maker, placed, quiet
from lightning_optim.estimate.result import MemoryEstimate, OptimizerEstimate
from lightning_optim.estimate.sending import exchanged, sent
from lightning_optim.estimate.sizes import read_size
from lightning_optim.estimate.spread import Spread, read_spread
from lightning_optim.reports.memory import Entry

COUNTED = 16  # ranks at most, where each holds something else


def estimate_memory(
    module: nn.Module | Callable[[], nn.Module],
    optimizer: Any = None,
    *,
    strategy: Any = "auto",
    devices: Any = 1,
    nodes: int = 1,
    precision: Any = "32-true",
    accelerator: str = "auto",
    sharding: str | None = None,
    bits: Sequence[int] | None = None,
    callbacks: Iterable[Any] = (),
    fits: int | str | None = None,
    activations: bool = False,
    data: Any = None,
    batch_size: int | None = None,
    build: str = "meta",
) -> MemoryEstimate:
    """The memory that a training will take on each rank: parameters, gradients, optimizer state, buffers.

    Nothing runs and nothing is allocated: torch builds, wraps and shards the module on the meta device. With
    `activations` it is built once more on the CPU, and runs two batches there.

    Args:
        module: A function that returns the module, such as its class, or a module, which stays as it is.
        optimizer: A spec as in a config, or a list of them. Default: what the module configures.
        strategy: As for the Trainer, a word or an object; "model_parallel" is FSDP2 over all ranks.
        devices: Ranks of a node.
        nodes: Number of nodes.
        precision: The Trainer's word, such as "bf16-true" or "16-mixed".
        accelerator: The Trainer's word.
        sharding: For the word "fsdp": "FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD" or "HYBRID_SHARD".
        bits: Bits of optimizer state to compare. Default: 32, 16 and 8.
        callbacks: The callbacks of the Trainer. Those of the optimizer come along.
        fits: Memory of a device, such as "24GB": whether it fits, and the largest model that does.
        activations: Measure activations, by two batches on the CPU.
        data: A DataLoader or a LightningDataModule for them. Default: the loader of the module.
        batch_size: Samples to which these batches are cut or repeated. Default: as they come.
        build: "meta", or "cpu" for a module whose constructor needs values of tensors.

    Raises:
        OptionError: for a wrong option, a module that cannot be built, and where no optimizer can be served.

    Example:
        >>> from lightning_optim import estimate_memory
        >>> estimate = estimate_memory(lambda: nn.Linear(4096, 4096), ["adamw", "adan"], strategy="ddp", devices=8)
        >>> [(one.name, one.bits, round(one.of("state") / 4096**2)) for one in estimate.optimizers]
        [('adamw', 32, 8), ('adamw', 16, 4), ('adamw', 8, 2), ('adan', 32, 16), ('adan', 16, 10), ('adan', 8, 7)]
    """
    check_choice("estimate_memory", "build", build, ["meta", "cpu"])
    spread = read_spread(strategy, devices, nodes, precision, accelerator, sharding)
    size, make = None if fits is None else read_size(fits), maker(module, build)
    first = make()
    own = first.optimizer_strategy() if optimizer is None and isinstance(first, ConfiguredOptimizer) else None
    counting = _Counting(make, spread, read_candidates(optimizer, bits, own), list(callbacks))
    counting.run()
    if spread.cuda and str(devices) in ("auto", "-1", "None") and not torch.cuda.is_available():
        counting.notes.append(f"devices={devices} is counted as 1: there is no GPU here. Give their number.")
    held = measure(module, data, spread, batch_size, counting.notes) if activations else None
    return counting.estimate(type(first).__name__, size, held)


class _Counting:
    """Counts candidates on as many ranks as differ.

    Attributes:
        found: By name, bits and whether they are of the spec: the entries of the counted ranks.
        like: For each rank, the counted rank that holds as much.
        notes: What was assumed or refused.
        parameters: Number of parameters of the module.
        trained: How many of them are trained.
    """

    def __init__(self, make: Make, spread: Spread, candidates: Sequence[Candidate], callbacks: Sequence[Any]) -> None:
        self._make, self._spread, self._candidates, self._callbacks = make, spread, candidates, callbacks
        self.found: dict[tuple[str, int | None, bool], dict[int, list[Entry]]] = {}
        self.like: list[int] = []
        self.notes: list[str] = []
        self._refused: dict[Candidate, OptionError] = {}
        self.parameters = self.trained = 0
        self._each_differs = False  # ranks own different matrices

    def run(self) -> None:
        """Count on rank 0, and on those that hold something else."""
        keys = self._count(0, first=True)
        firsts: dict[Any, int] = {}
        for rank, key in enumerate(keys):
            firsts.setdefault(key, rank)
        ranks = list(firsts.values())
        if len(ranks) > COUNTED:
            ranks = sorted({ranks[round(i * (len(ranks) - 1) / (COUNTED - 1))] for i in range(COUNTED)})
            self.notes.append(f"{len(ranks)} of {len(keys)} ranks were counted; the others are taken to be like them.")
        for rank in ranks[1:]:
            self._count(rank)
        self.found = {key: entries for key, entries in self.found.items() if len(entries) == len(ranks)}
        self.like = [min(ranks, key=lambda r: (keys[r] != keys[rank], abs(r - rank))) for rank in range(len(keys))]
        if not self.found:
            raise next(iter(self._refused.values()))
        left = {candidate.name: error for candidate, error in self._refused.items() if candidate.asked}
        self.notes += [f"{name} was left out: {error}" for name, error in left.items()]

    def estimate(self, title: str, size: int | None, activations: int | None) -> MemoryEstimate:
        """What was counted, with activations if they were measured."""
        if activations is None:
            self.notes.append("Activations are not counted; --activations (activations=True) measures them.")
        sharded = self._spread.kind in ("fsdp1", "fsdp2")
        estimates = [
            OptimizerEstimate(name, bits, asked, found, self.like, activations, self.parameters, sharded)
            for (name, bits, asked), found in self.found.items()
        ]
        return MemoryEstimate(title, self.parameters, self.trained, self._spread, estimates, size, self.notes)

    def _count(self, rank: int, first: bool = False) -> list[Any]:
        """Count all candidates on a rank; what is equal on two ranks if these hold as much, if it is the first."""
        spread = self._spread
        sharded = spread.kind in ("fsdp1", "fsdp2")
        with as_rank(rank, spread.ranks) if sharded else contextlib.nullcontext():
            module, notes = placed(self._make, spread)
            for candidate in self._candidates:
                if candidate not in self._refused:
                    trained = {p: p.requires_grad for p in module.parameters()}  # a spec may freeze some
                    try:
                        self._count_candidate(rank, module, candidate)
                    except OptionError as error:
                        self._refused[candidate] = error
                    for p, grad in trained.items():
                        p.requires_grad_(grad)
            if not first:
                return []
            self.notes += notes
            sizes = {p: logical_shape(p).numel() for p in module.parameters()}
            self.parameters = sum(sizes.values())
            self.trained = sum(size for p, size in sizes.items() if p.requires_grad)
            return self._keys(module)

    def _count_candidate(self, rank: int, module: nn.Module, candidate: Candidate) -> None:
        with quiet():
            optimizers = candidate.optimizers(module)
        if rank == 0 and (note := unpredicted_note(optimizers)):
            self.notes.append(note)
        name = candidate.name or ", ".join(type(one).__name__ for one in optimizers)
        companions = [
            one for one in candidate.callbacks() if not any(isinstance(c, type(one)) for c in self._callbacks)
        ]
        callbacks = [*self._callbacks, *companions]
        entries = sent(module, self._spread, callbacks)
        entries += count(module, optimizers, callbacks, self._spread.cuda)
        entries += exchanged(optimizers, self._spread)
        self._each_differs |= any(getattr(one, "has_slots_of_matrices", False) for one in optimizers)
        self.found.setdefault((name, candidate.bits, candidate.asked), {})[rank] = entries

    def _keys(self, module: nn.Module) -> list[Any]:
        """For each rank what is equal on two ranks if these hold as much."""
        spread = self._spread
        if spread.kind in ("single", "ddp"):
            return [0] * spread.ranks
        if spread.kind == "fsdp1" or self._each_differs:
            return [*range(spread.ranks)]
        names: tuple[str, ...] = ("data_parallel", "tensor_parallel")
        sharded = [p for p in module.parameters() if is_dtensor(p)]
        meshes = {p.device_mesh: [*(p.device_mesh.mesh_dim_names or ("",))] for p in sharded}
        if not all(name in names for of_mesh in meshes.values() for name in of_mesh):
            return [*range(spread.ranks)]  # a mesh of the user
        keys: list[Any] = []
        for rank in range(spread.ranks):
            at: dict[str, int] = dict(zip(names, divmod(rank, spread.mesh[1]), strict=True))
            sizes = tuple(block(p, [at[name] for name in meshes[p.device_mesh]])[1] for p in sharded)
            keys.append((at["tensor_parallel"], sizes))
        return keys
