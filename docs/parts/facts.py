"""What pages of optimizers state as facts: state by slot, cost of a step, strategies. Read off classes and results."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from docs.parts.markdown import table
from lightning_optim import storage
from lightning_optim.config.catalog import _sample, state_bits
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.reports.memory import predicted_memory

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
LARGE = 4096**2  # parameters of the sample


def bytes_by_slot(cls: type[Optimizer], **options: Any) -> dict[str, dict[int, float]]:
    """Bytes per parameter of each slot by `state_bits`, for a large matrix."""
    found: dict[str, dict[int, float]] = defaultdict(dict)
    can_be_quantized = any(storage.can_be_quantized(slot) for slot in cls.slots.values())
    for bits in state_bits():
        optimizer = _sample(cls, **{**options, "state_bits": bits if can_be_quantized else 32})
        for entry in predicted_memory(optimizer):
            if entry.slot != "step":
                found[entry.slot][bits] = found[entry.slot].get(bits, 0.0) + entry.bytes / LARGE
    return {slot: found[slot] for slot in cls.slots if slot in found}  # what reads them has no order


def state(cls: type[Optimizer]) -> str:
    """The table of slots, with what they cost."""
    kinds = {"element": "element", "tensor": "tensor", "optimizer": "optimizer", "matrix": "matrix"}
    found = bytes_by_slot(cls)
    if not found:
        return "It keeps no state."
    rows = []
    for name, sizes in found.items():
        slot = cls.slots[name]
        per = "row or column" if slot.without else kinds[slot.per]
        counted = not slot.without and slot.per in ("element", "matrix")
        rows.append([f"`{name}`", per, *(f"{size:.3g}" if counted else "about 0" for size in sizes.values())])
    totals = {bits: sum(sizes[bits] for sizes in found.values()) for bits in state_bits()}
    if len(rows) > 1:
        rows.append(["together", "", *(f"{size:.3g}" if size > 0.01 else "about 0" for size in totals.values())])
    return table(["slot", "one value per", *(f"{bits} bits" for bits in state_bits())], rows)


def cost(name: str) -> str:
    """How long a step takes beside torch's fused AdamW, as far as it was measured."""
    rows: dict[tuple[str, int], dict[str, Any]] = {}
    for case in json.loads((RESULTS / "cpu.json").read_text())["cases"].values():
        for row in case["rows"].values():
            if (row["optimizer"], row["package"], row["engine"]) == (name, "ours", "auto") and "times_base" in row:
                rows[case["title"], row["bits"]] = row
    if not rows:
        return beside_peers(name)
    titles = list(dict.fromkeys(title for title, _ in rows))
    lines = [
        [title, *(f"{rows[title, bits]['times_base']:.2f}" if (title, bits) in rows else "–" for bits in (32, 8))]
        for title in titles
    ]
    return (
        "Time of a step on one CPU thread, relative to torch's fused AdamW in the same run ([speed](../speed.md)):\n\n"
        + table(["model", "state in 32 bits", "in 8 bits"], lines)
    )


def beside_peers(name: str) -> str:
    """The cost of a step of an optimizer that was measured beside others than torch's AdamW."""
    title = OPTIMIZERS[name].title
    found = json.loads((RESULTS / "matrix.json").read_text())["rows"]
    rows = [
        [key, f"{row['times_base']:.2f}"] for key, row in found.items() if key.split(" / ")[0].split(",")[0] == title
    ]
    if not rows:
        return "The time of its step has not been measured side by side with others ([speed](../speed.md))."
    return "Time of a step on the tensors of GPT-2, as a ratio of the two ([speed](../speed.md)):\n\n" + table(
        ["ours / theirs", "ratio"], rows
    )


STRATEGIES = (
    "one process",
    "DDP",
    "FSDP1",
    "FSDP1, `use_orig_params=False`",
    "FSDP2",
    "FSDP2 with tensor parallelism",
)


def strategies(cls: type[Optimizer], **options: Any) -> dict[str, str]:
    """What each strategy does: "" where it serves, else why it refuses."""
    program = _sample(cls, **options).first_programs()[0]
    of_tensors = any(symbol.args[1] == "tensor" for symbol in program.reductions)
    rows = "it needs row and column means, and FSDP1 splits tensors without regard to rows"
    matrices = "it keeps matrices of other shapes, which checkpoints of FSDP1 cannot hold"
    tensors = "it needs whole tensors, which flat parameters do not show"
    two = "it needs whole matrices, and tensors are split along two dimensions"
    why: dict[str, str] = dict.fromkeys(STRATEGIES, "")
    if program.statistics:
        why["FSDP1"] = rows
    if program.of_matrices:
        why["FSDP1"] = matrices
    if program.statistics or program.matrices or of_tensors:
        why["FSDP1, `use_orig_params=False`"] = tensors
    if program.matrices:
        why["FSDP2 with tensor parallelism"] = two
    return why


def served(cls: type[Optimizer]) -> str:
    """The sentence or the table of strategies."""
    why = strategies(cls)
    if not any(why.values()):
        return (
            "Every strategy serves it: one process, DDP, FSDP1 (with `use_orig_params=False` where all parameters have "
            "equal options), FSDP2, and FSDP2 with tensor parallelism ([distributed training](../distributed.md))."
        )
    return table(["strategy", "serves it"], [[name, f"no: {no}" if no else "yes"] for name, no in why.items()])


def eight_bits() -> str:
    """Bytes of state by bits for all that keep state for each element, those that save most first."""
    rows = []
    for name, cls in OPTIMIZERS.items():
        found = bytes_by_slot(cls)
        totals = [sum(sizes[bits] for sizes in found.values()) for bits in state_bits()]
        if totals[0] > 0.01:
            saved = 1 - totals[-1] / totals[0]
            rows.append(
                (-saved, name, [f"[`{name}`](optimizers/{name}.md)", *(f"{t:.3g}" for t in totals), f"{saved:.0%}"])
            )
    return table(
        ["optimizer", *(f"{bits} bits" for bits in state_bits()), "saved at 8 bits"],
        [row for _, _, row in sorted(rows)],
    )
