"""The memory of a training by optimizer, rank and kind, in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lightning_optim.estimate.sizes import largest
from lightning_optim.estimate.spread import Spread
from lightning_optim.reports.memory import Entry, Kind, summed

# What lives throughout a training.
KEPT: tuple[Kind, ...] = ("parameter", "gradient", "buffer", "state", "stage")
KINDS: tuple[Kind, ...] = (*KEPT, "communication", "exchange")


@dataclass(frozen=True)
class OptimizerEstimate:
    """The memory of a training with one optimizer at one number of bits.

    Attributes:
        name: The optimizer.
        bits: Bits of its state; None where it has no such choice.
        asked: Whether the spec, and not the comparison, has these bits.
        counted: The entries of the ranks that were counted.
        like: For each rank, the rank of `counted` that holds as much.
        activations: Bytes of activations on a rank; None if they were not measured.
        parameters: Number of parameters of the model.
        sharded: Whether communication buffers are free again when the optimizer steps.
    """

    name: str
    bits: int | None
    asked: bool
    counted: Mapping[int, Sequence[Entry]] = field(repr=False)
    like: Sequence[int] = field(repr=False)
    activations: int | None
    parameters: int
    sharded: bool

    def of(self, kind: Kind, rank: int | None = None) -> int:
        """Bytes of a kind on a rank, by default on the rank with the most in total."""
        entries = self.counted[self.like[self.largest_rank if rank is None else rank]]
        return sum(entry.bytes for entry in entries if entry.kind == kind)

    def total(self, rank: int | None = None) -> int:
        """The most that a rank holds at a time: all that is kept, and the larger of a backward pass and a step."""
        kept = sum(self.of(kind, rank) for kind in KEPT)
        sent, exchanged = self.of("communication", rank), self.of("exchange", rank)
        return kept + max(sent + (self.activations or 0), (0 if self.sharded else sent) + exchanged)

    @property
    def largest_rank(self) -> int:
        """The rank with the most."""
        return max(self.counted, key=self.total) if len(self.counted) > 1 else next(iter(self.counted))

    @property
    def smallest_rank(self) -> int:
        """The rank with the least."""
        return min(self.counted, key=self.total)

    @property
    def all_ranks(self) -> int:
        """The sum over all ranks."""
        return sum(self.total(rank) for rank in self.like)

    @property
    def per_parameter(self) -> float:
        """Bytes on the rank with the most, without activations, for each parameter of the whole model."""
        return (self.total() - (self.activations or 0)) / self.parameters if self.parameters else 0.0

    def fits(self, size: int) -> bool:
        """Whether every rank fits into this many bytes."""
        return self.total() <= size

    def largest_model(self, size: int) -> int:
        """The parameters of the largest model that fits, at the same bytes for each and the same activations."""
        return largest(size, self.total(), self.activations or 0, self.parameters)

    def slots(self) -> list[tuple[Entry, int]]:
        """The state by slot and type on the rank with the most, each with its bytes on all ranks."""
        states = {
            rank: summed((x for x in entries if x.kind in ("state", "stage")), "kind", "slot", "dtype")
            for rank, entries in self.counted.items()
        }
        keys = dict.fromkeys(key for of_rank in states.values() for key in of_rank)
        here = states[self.largest_rank]
        empty = {key: Entry(-1, key[1], key[2], 0, 0, key[0]) for key in keys}
        everywhere = {key: sum(states[at][key].bytes for at in self.like if key in states[at]) for key in keys}
        return [(here.get(key, empty[key]), everywhere[key]) for key in keys]

    def as_dict(self, size: int | None = None) -> dict[str, Any]:
        """Plain values for a JSON file."""

        def sizes(rank: int) -> dict[str, Any]:
            named = {f"{kind}_bytes": self.of(kind, rank) for kind in KINDS}
            return {"rank": rank, **named, "activation_bytes": self.activations, "total_bytes": self.total(rank)}

        found: dict[str, Any] = {
            "optimizer": self.name,
            "state_bits": self.bits,
            "of_config": self.asked,
            "largest_rank": sizes(self.largest_rank),
            "smallest_rank": sizes(self.smallest_rank),
            "all_ranks": {
                **{f"{kind}_bytes": sum(self.of(kind, rank) for rank in self.like) for kind in KINDS},
                "total_bytes": self.all_ranks,
            },
            "bytes_per_parameter": self.per_parameter,
            "slots": [
                {
                    "slot": x.slot,
                    "kind": x.kind,
                    "type": x.dtype,
                    "values": x.elements,
                    "bytes": x.bytes,
                    "all_ranks": n,
                }
                for x, n in self.slots()
            ],
        }
        if size is not None:
            found |= {"fits": self.fits(size), "largest_model_parameters": self.largest_model(size)}
        return found


@dataclass(frozen=True)
class MemoryEstimate:
    """The memory of a training before it runs.

    Attributes:
        module: The class of the module.
        parameters: Number of its parameters, each counted once.
        trained: How many of them are trained.
        spread: How it is spread over ranks.
        optimizers: One for each optimizer and number of bits.
        size: Bytes that a rank has; None where none was given.
        notes: What was assumed, left out or refused, as sentences.
    """

    module: str
    parameters: int
    trained: int
    spread: Spread
    optimizers: Sequence[OptimizerEstimate]
    size: int | None
    notes: Sequence[str]

    def of(self, name: str | None = None, bits: int | None = None) -> OptimizerEstimate:
        """The estimate of an optimizer, by default of the first, with the bits of its spec unless others are given.

        Raises:
            KeyError: where there is none.
        """
        for one in self.optimizers:
            if name in (None, one.name) and (one.asked if bits is None else one.bits == bits):
                return one
        raise KeyError(
            f"{name} at {bits} bits was not counted; counted are {[(x.name, x.bits) for x in self.optimizers]}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values for a JSON file."""
        spread = self.spread
        return {
            "module": self.module,
            "parameters": self.parameters,
            "trained_parameters": self.trained,
            "strategy": spread.kind,
            "sharding": spread.sharding or None,
            "nodes": spread.nodes,
            "ranks": spread.ranks,
            "precision": spread.precision,
            "size_bytes": self.size,
            "optimizers": [one.as_dict(self.size) for one in self.optimizers],
            "notes": list(self.notes),
        }
