"""Counts the bytes that DDP communicates in a step for each `communication`: `python -m benchmarks.communication`.

Two processes train a small transformer. On one rank, every tensor that is passed to an all-reduce is counted with its
bytes. These are counts, not timings. What crosses the network depends on the algorithm of the all-reduce; in a ring
over W ranks, each rank sends 2 (W - 1) / W times these bytes.
"""

from __future__ import annotations

import copy
import json
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from lightning.pytorch import Callback, LightningModule, Trainer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.ranks import on_ranks
from lightning_optim import AdamW
from lightning_optim.callbacks import Communication

RANKS = 2
START = 2  # steps before PowerSGD and post-local SGD begin; what is counted comes after them
SETTINGS: list[dict[str, Any]] = [
    {"kind": "fp32"},
    {"kind": "bf16"},
    {"kind": "fp16"},
    {"kind": "powersgd", "rank": 1},
    {"kind": "powersgd", "rank": 4},
    {"kind": "powersgd", "rank": 16},
    {"kind": "post_local_sgd", "period": 4},
    {"kind": "post_local_sgd", "period": 16},
]


@contextmanager
def counted() -> Iterator[list[int]]:
    """The bytes of each tensor that this process gives to a collective among several ranks meanwhile.

    Of an all-to-all these are what it sends, with what stays on this rank.
    """
    found: list[int] = []
    position = {"all_reduce": 0, "all_to_all_single": 1, "all_gather_into_tensor": 1}  # of the tensor that is sent
    real = {name: getattr(dist, name) for name in position}

    def counting(name: str) -> Callable[..., Any]:
        def call(*args: Any, **given: Any) -> Any:
            tensor = args[position[name]]
            if dist.get_world_size(given.get("group")) > 1 and (tensor.numel() or name != "all_reduce"):
                found.append(tensor.numel() * tensor.element_size())
            return real[name](*args, **given)

        return call

    for name in position:
        setattr(dist, name, counting(name))
    try:
        yield found
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


class Plain(Callback):
    """torch's hook that does what DDP does without one; DDP's own call does not pass through Python."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model: Any = trainer.strategy.model
        model.register_comm_hook(None, allreduce_hook)


class Transformer(LightningModule):
    """Two layers of a decoder over 1000 tokens."""

    def __init__(self, width: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.net = nn.Sequential(nn.Embedding(1000, width), layer, copy.deepcopy(layer), nn.Linear(width, 1000))
        self.calls: list[int] = []
        self.steps: list[tuple[int, int]] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        (tokens,) = batch
        return nn.functional.cross_entropy(self.net(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def on_train_batch_end(self, *_: Any) -> None:
        self.steps.append((len(self.calls), sum(self.calls)))
        self.calls.clear()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return AdamW(self.parameters(), lr=1e-3)


def count(setting: dict[str, Any], width: int = 256) -> dict[str, Any]:
    """Messages and bytes of a step on this rank, in the mean over the steps after `START`; and the weights' number."""
    callback: Callback = Plain()
    if setting["kind"] != "fp32":
        begins = {"start": START} if setting["kind"] in ("powersgd", "post_local_sgd") else {}
        callback = Communication(**setting, **begins)
    period = setting.get("period", 1)
    steps = START + 2 * period
    module = Transformer(width)
    tokens = torch.randint(0, 1000, (steps * 2, 9), generator=torch.Generator().manual_seed(int(os.environ["RANK"])))
    trainer = Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        max_steps=steps,
        callbacks=[callback],
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with counted() as module.calls:
        trainer.fit(module, DataLoader(TensorDataset(tokens), batch_size=2))
    after = module.steps[START:]
    messages, sent = (sum(one[i] for one in after) / len(after) for i in (0, 1))
    parameters = sum(p.numel() for p in module.parameters())
    return {**setting, "messages": messages, "bytes": sent, "parameters": parameters}


def count_all(settings: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [count(setting) for setting in settings]


def main() -> None:
    rows = on_ranks(RANKS, count_all, SETTINGS)
    table = Table(
        "communication", "all-reduces", "bytes", "relative to fp32", title="All-reduces of one rank in a step"
    )
    for row in rows:
        share = row["bytes"] / rows[0]["bytes"]
        options = " ".join(f"{k}={v}" for k, v in row.items() if k in ("rank", "period"))
        table.add_row(f"{row['kind']} {options}", f"{row['messages']:g}", f"{row['bytes']:,.0f}", f"{share:.3f}")
    Console().print(table)
    about = {"torch": torch.__version__, "machine": platform.machine(), "ranks": RANKS, "start": START}
    path = Path(__file__).parent / "results" / "communication.json"
    path.write_text(json.dumps({"about": about, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
