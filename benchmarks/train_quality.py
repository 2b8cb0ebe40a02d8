"""Compares training with 8-bit state and with 32-bit state: `python -m benchmarks.train_quality`.

There are two small problems and several optimizers, with the same seeds for both. A seed fixes the initial weights and
the order of the data, so two runs of one seed differ only by the rounding of the state. The final loss is compared with
the spread of the 32-bit runs over seeds.

Each run is saved at once and not repeated. `--budget 600` stops after ten minutes, and the same command continues from
there.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import sysconfig
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.pages import RESULTS, table, write_part
from lightning_optim import Optimizer, create_optimizer
from lightning_optim.storage import Quantized

BITS = (32, 8)
SEEDS = 7
TAIL = 0.1  # the last part of the steps, whose mean loss is the final training loss


class Task(Protocol):
    """Something to train."""

    name: str
    steps: int
    options: ClassVar[dict[str, dict[str, Any]]]

    def model(self) -> nn.Module: ...

    def batches(self, generator: torch.Generator, steps: int) -> Iterator[tuple[Tensor, Tensor]]: ...

    def held_out(self) -> tuple[Tensor, Tensor]: ...


class Digits:
    """Handwritten digits, which come with scikit-learn, and a perceptron with two hidden layers."""

    name = "digits"
    steps = 500
    options: ClassVar[dict[str, dict[str, Any]]] = {
        "adamw": {"lr": 3e-3, "weight_decay": 0.1},
        "adan": {"lr": 1e-2, "weight_decay": 0.02},
        "sgdw": {"lr": 0.1, "momentum": 0.9},
        "lamb": {"lr": 1e-2},
        "adapnm": {"lr": 3e-3},
    }

    def __init__(self) -> None:
        pixels, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        self.images = torch.tensor(pixels / 16, dtype=torch.float32)[order]
        self.labels = torch.tensor(labels)[order]

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )

    def batches(self, generator: torch.Generator, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            chosen = torch.randint(1297, (64,), generator=generator)
            yield self.images[chosen], self.labels[chosen]

    def held_out(self) -> tuple[Tensor, Tensor]:
        return self.images[1297:], self.labels[1297:]


class Block(nn.Module):
    """A layer of a transformer that looks back."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.mlp(self.norm_2(x))
        return result


class LanguageModel(nn.Module):
    """Two such layers on bytes."""

    def __init__(self, width: int = 64, length: int = 32) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256)
        for rows in (self.bytes, self.places):
            nn.init.normal_(rows.weight, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        x = self.bytes(text) + self.places.weight[: text.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class PythonSources:
    """The next byte of the sources of Python's standard library, and a small transformer."""

    name = "bytes"
    steps = 600
    options: ClassVar[dict[str, dict[str, Any]]] = {
        "adamw": {"lr": 3e-3, "weight_decay": 0.1},
        "adan": {"lr": 5e-3, "weight_decay": 0.02},
        "sgdw": {"lr": 0.1, "momentum": 0.9},
        "lamb": {"lr": 2e-2},
        "adapnm": {"lr": 3e-3},
    }
    length, batch = 32, 16

    def __init__(self, size: int = 2_000_000) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(file.read_bytes() for file in files)[:size]
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        self.border = len(self.text) * 9 // 10

    def model(self) -> nn.Module:
        return LanguageModel(length=self.length)

    def batches(self, generator: torch.Generator, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(steps):
            yield self._at(torch.randint(self.border - self.length - 1, (self.batch,), generator=generator))

    def held_out(self) -> tuple[Tensor, Tensor]:
        starts = torch.arange(self.border, len(self.text) - self.length - 1, 200)
        return self._at(starts)

    def _at(self, starts: Tensor) -> tuple[Tensor, Tensor]:
        windows = self.text[starts[:, None] + torch.arange(self.length + 1)]
        return windows[:, :-1], windows[:, 1:]


TASKS: dict[str, type[Digits] | type[PythonSources]] = {task.name: task for task in (Digits, PythonSources)}


@dataclass(frozen=True)
class Run:
    """One training."""

    task: str
    optimizer: str
    bits: int
    seed: int
    train_loss: float
    held_out_loss: float
    coded: float  # share of the parameters whose state is in codes
    seconds: float


def train(task: Task, optimizer_name: str, bits: int, seed: int, steps: int) -> Run:
    """Train once, with a learning rate that falls by a cosine."""
    torch.manual_seed(seed)
    model = task.model()
    optimizer = create_optimizer({"name": optimizer_name, **task.options[optimizer_name], "state_bits": bits}, model)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5 + 0.5 * math.cos(math.pi * t / steps))
    losses = []
    begin = time.perf_counter()
    for inputs, targets in task.batches(torch.Generator().manual_seed(seed), steps):
        loss = cross_entropy(model(inputs).flatten(0, -2), targets.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - begin
    model.eval()
    with torch.no_grad():
        inputs, targets = task.held_out()
        held_out = cross_entropy(model(inputs).flatten(0, -2), targets.flatten()).item()
    last = statistics.fmean(losses[-max(1, round(TAIL * steps)) :])
    return Run(task.name, optimizer_name, bits, seed, last, held_out, coded_share(optimizer), seconds)


def coded_share(optimizer: Optimizer) -> float:
    """The share of the parameters that have state in codes."""
    params = [p for _, p in optimizer.every_parameter()]
    coded = [p for p in params if any(isinstance(value, Quantized) for value in optimizer.state[p].values())]
    return sum(p.numel() for p in coded) / sum(p.numel() for p in params)


def go_on(
    path: Path, tasks: Sequence[Task], optimizers: Sequence[str], seeds: int, scale: float, budget: float
) -> list[Run]:
    """Do the runs that are not in the file yet, saving each, until all are done or the budget is spent."""
    runs = [Run(**run) for run in json.loads(path.read_text())["runs"]] if path.exists() else []
    done = {(run.task, run.optimizer, run.bits, run.seed) for run in runs}
    end = time.monotonic() + budget
    wanted = [(t, o, b, s) for t in tasks for s in range(seeds) for o in optimizers for b in BITS]
    for task, optimizer, bits, seed in wanted:
        if (task.name, optimizer, bits, seed) in done:
            continue
        if time.monotonic() > end:
            break
        runs.append(train(task, optimizer, bits, seed, max(2, round(scale * task.steps))))
        save(path, runs, {task.name: round(scale * task.steps) for task in tasks})
    return runs


def save(path: Path, runs: Sequence[Run], steps: dict[str, int]) -> None:
    about = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "steps": steps,
        "options": {task.name: task.options for task in TASKS.values()},
    }
    path.parent.mkdir(exist_ok=True)
    text = json.dumps({"about": about, "runs": [vars(run) for run in runs]}, indent=1)
    temporary = path.with_suffix(".part")
    temporary.write_text(text + "\n")
    temporary.replace(path)


def page(runs: Sequence[Run]) -> str:
    """The table: final losses over the seeds, and the differences between runs of one seed."""
    rows = []
    for task, optimizer in dict.fromkeys((run.task, run.optimizer) for run in runs):
        of = {
            bits: {r.seed: r for r in runs if (r.task, r.optimizer, r.bits) == (task, optimizer, bits)} for bits in BITS
        }
        seeds = sorted(of[32].keys() & of[8].keys())
        if len(seeds) < 2:
            continue
        cells = [task, f"`{optimizer}`", str(len(seeds)), f"{100 * of[8][seeds[0]].coded:.0f} %"]
        for what in ("train_loss", "held_out_loss"):
            exact, few = ([getattr(of[bits][seed], what) for seed in seeds] for bits in BITS)
            gaps = [b - a for a, b in zip(exact, few, strict=True)]
            error = statistics.stdev(gaps) / len(gaps) ** 0.5
            cells += [
                f"{statistics.fmean(exact):.4f} ± {statistics.stdev(exact):.4f}",
                f"{statistics.fmean(few):.4f} ± {statistics.stdev(few):.4f}",
                f"{statistics.fmean(gaps):+.4f} ± {error:.4f}",
                "yes" if min(exact) <= statistics.fmean(few) <= max(exact) else "no",
            ]
        rows.append(cells)
    both = [
        f"{loss}{what}" for loss in ("training", "held out") for what in (", 32 bits", ", 8 bits", ", difference", "")
    ]
    head = ["task", "optimizer", "seeds", "quantized", *(word if "," in word else "within" for word in both)]
    return table(head, rows)


def main(args: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--optimizers", nargs="+", default=list(Digits.options), choices=Digits.options)
    parser.add_argument("--seeds", type=int, default=SEEDS)
    parser.add_argument("--scale", type=float, default=1.0, help="multiplies the number of steps")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds after which no new run starts")
    parser.add_argument("--out", type=Path, default=RESULTS / "train_quality.json")
    parser.add_argument("--page", action="store_true", help="write the table to docs/state.md")
    given = parser.parse_args(args)
    torch.set_num_threads(1)
    tasks = [TASKS[name]() for name in given.tasks]
    runs = go_on(given.out, tasks, given.optimizers, given.seeds, given.scale, given.budget)
    print(page(runs))
    if given.page:
        write_part("state.md", "training", page(runs))


if __name__ == "__main__":
    main()
