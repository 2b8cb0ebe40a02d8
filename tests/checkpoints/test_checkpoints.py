"""A checkpoint goes on bit for bit where nothing changed, and within rounding or quantisation where something did."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim.checkpoints.consolidate import consolidate
from tests.harness.ranks import run_ranks
from tests.harness.runs import EPOCH, Run, Setting, fit, identical
from tests.harness.strategies import KINDS, Kind

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "checkpoint_matrix.json"
DOCS = ROOT / "docs" / "checkpoints.md"

# Float32 sums in another order differ by 1e-7 of the loss in a step, and eight steps of Adan at its rate let that grow.
ROUNDING = 1e-4
# Two uninterrupted runs, in 32 and in 8 bits, differ by less than this share of the loss after eight steps (measured:
# 4e-4); a checkpoint between them may add no more than they do.
QUANTISATION = 4e-3

Losses = list[float]  # of the whole batch: the mean over ranks


def losses_of(runs: Sequence[Run]) -> Losses:
    return torch.tensor([run.losses for run in runs], dtype=torch.float64).mean(0).tolist()


def file_of(folder: Path, saved: Setting) -> Path:
    return folder / str(saved) / "saved.ckpt"


def save_all(settings: Sequence[Setting], optimizer: Any, folder: Path) -> dict[Setting, Run]:
    """The uninterrupted runs, and checkpoints of runs that stop half way."""
    runs = {}
    for setting in settings:
        runs[setting] = fit(setting, optimizer)
        fit(setting, optimizer, folder=folder / str(setting))
    return runs


def load_all(
    pairs: Sequence[tuple[Setting, Setting]], optimizer: Any, folder: Path
) -> dict[tuple[Setting, Setting], Run]:
    return {(saved, now): fit(now, optimizer, resume=way(folder, saved, now)[0]) for saved, now in pairs}


def way(folder: Path, saved: Setting, now: Setting) -> tuple[Path, bool]:
    """The checkpoint to load, and whether it was consolidated first: a folder of shards is its own strategy's alone."""
    path = file_of(folder, saved)
    if saved.kind.endswith("sharded") and now.kind.split()[0] != saved.kind.split()[0]:
        return path.with_suffix(".consolidated"), True
    return path, False


def matrix(pairs: Sequence[tuple[Setting, Setting]], optimizer: Any, folder: Path) -> list[dict[str, Any]]:
    """Save and load; what came of each pair."""
    whole: dict[Setting, list[Run]] = {}
    saves = list(dict.fromkeys(saved for saved, _ in pairs))
    for ranks in sorted({saved.ranks for saved in saves}):
        own = [saved for saved in saves if saved.ranks == ranks]
        found = run_ranks(save_all, own, optimizer, folder, world_size=ranks, timeout=300)
        whole.update({saved: [runs[saved] for runs in found] for saved in own})
    for saved in saves:
        if saved.kind.endswith("sharded"):
            path = file_of(folder, saved)
            consolidate(path, path.with_suffix(".consolidated"))
    rows = []
    for ranks in sorted({now.ranks for _, now in pairs}):
        some = [pair for pair in pairs if pair[1].ranks == ranks]
        loaded = run_ranks(load_all, some, optimizer, folder, world_size=ranks, timeout=570)
        for saved, now in some:
            runs = [resumed[saved, now] for resumed in loaded]
            expected, got = losses_of(whole[saved])[EPOCH:], losses_of(runs)
            error = max(abs(a - b) / a for a, b in zip(expected, got, strict=True))
            exact = saved == now and all(map(identical, whole[saved], runs))
            consolidated = way(folder, saved, now)[1]
            rows.append(
                {"saved": saved, "loaded": now, "identical": exact, "error": error, "consolidated": consolidated}
            )
    return rows


def assert_portable(rows: Sequence[Mapping[str, Any]]) -> None:
    for row in rows:
        saved, now = row["saved"], row["loaded"]
        limit = ROUNDING if (saved.bits, now.bits) == (32, 32) else QUANTISATION
        assert row["error"] < limit, row
        assert row["identical"] == (saved == now), row


def of_2_ranks(kind: Kind, bits: int) -> Setting:
    return Setting(kind, bits, 1 if kind == "single" else 2)


SAME = [(of_2_ranks(kind, bits), of_2_ranks(kind, bits)) for kind in KINDS for bits in (32, 8)]
SOME = [
    (Setting("single", 8, 1), Setting("fsdp2 full", 8, 2)),
    (Setting("single", 32, 1), Setting("fsdp1 full", 8, 2)),
    (Setting("ddp", 32, 2), Setting("single", 8, 1)),
    (Setting("fsdp1 full", 8, 2), Setting("fsdp2 full", 32, 2)),
    (Setting("fsdp1 sharded", 8, 2), Setting("fsdp1 sharded", 8, 1)),
    (Setting("fsdp1 sharded", 32, 2), Setting("ddp", 8, 2)),
    (Setting("fsdp2 sharded", 32, 2), Setting("fsdp2 full", 8, 1)),
    (Setting("fsdp2 sharded", 8, 2), Setting("fsdp1 full", 8, 2)),
    (Setting("fsdp2 full", 8, 2), Setting("single", 32, 1)),
]


def test_core_of_the_matrix(tmp_path: Path) -> None:
    """Averages and slow weights travel with it: both callbacks are there."""
    assert_portable(matrix([*SAME, *SOME], "adan", tmp_path))


@pytest.mark.parametrize("name", ["koala_m", "prodigy"])
def test_scalars_travel(name: str, tmp_path: Path) -> None:
    """They stand in the parameter group, and KOALA's prediction has moved the weights when a checkpoint is written."""
    kinds: tuple[Kind, ...] = ("fsdp1 sharded", "fsdp2 sharded", "fsdp2 full")
    pairs = [(Setting(kind, 8, 2), Setting(kind, 8, 2)) for kind in kinds]
    assert_portable(matrix([*pairs, (pairs[0][0], Setting("single", 32, 1))], name, tmp_path))


def test_slots_of_matrices_travel_between_owners(tmp_path: Path) -> None:
    """They lie at ranks that follow from shapes and their number; files know nothing of these."""
    single, ddp = Setting("single", 32, 1), Setting("ddp", 32, 2)
    full, shards = Setting("fsdp2 full", 32, 2), Setting("fsdp2 sharded", 32, 2)
    pairs = [(one, one) for one in (single, ddp, full, shards)]
    pairs += [(ddp, single), (single, full), (full, ddp), (ddp, full), (shards, single)]
    pairs += [(shards, Setting("fsdp2 full", 8, 2))]
    assert_portable(matrix(pairs, {"name": "soap", "frequency": 2, "owners": True}, tmp_path))


def test_state_of_two_rules_travels(tmp_path: Path) -> None:
    """Muon keeps other slots for matrices than for the rest, and FSDP1 wants the same for all of a unit."""
    same = [(of_2_ranks(kind, 32), of_2_ranks(kind, 32)) for kind in KINDS if kind != "fsdp2 full"]
    some = [
        (Setting("single", 32, 1), Setting("fsdp1 full", 32, 2)),
        (Setting("fsdp1 full", 32, 2), Setting("fsdp2 full", 32, 2)),
        (Setting("fsdp1 sharded", 32, 2), Setting("ddp", 32, 2)),
        (Setting("fsdp2 sharded", 32, 2), Setting("single", 32, 1)),
    ]
    assert_portable(matrix([*same, *some], {"name": "muon", "lr": 0.01, "compute": "float32"}, tmp_path))


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_the_whole_matrix(tmp_path: Path) -> None:
    saves = [of_2_ranks(kind, bits) for kind in KINDS for bits in (32, 8)]
    loads = [
        Setting(k, b, n)
        for k in KINDS
        for n in (1, 2)
        for b in (32, 8)
        if (k, n) != ("single", 2) and (k, n) != ("ddp", 1)
    ]
    rows = matrix([(saved, now) for saved in saves for now in loads], "adan", tmp_path)
    assert_portable(rows)
    RESULT.write_text(json.dumps([_plain(row) for row in rows], indent=0) + "\n")


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "saved": str(row["saved"]), "loaded": str(row["loaded"]), "error": float(f"{row['error']:.1e}")}
