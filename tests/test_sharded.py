"""Training sharded over two ranks equals replicated training, or is refused; no sum is silently over a part."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimizerStrategy
from tests.ranks import RankFailure, run_ranks
from tests.test_cpu_fsdp import Kind, build


def losses(kind: Kind, name: str, options: dict[str, Any]) -> list[float]:
    """The losses of rank 0 over a few steps."""
    module, strategy = build(kind)
    module.configure_optimizers = lambda: OptimizerStrategy(name, **options).configure(module)  # type: ignore[method-assign]
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy,
        max_steps=6,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(module, DataLoader(TensorDataset(x, x[:, :1]), batch_size=8))
    return module.losses


ELEMENTWISE: list[tuple[str, dict[str, Any]]] = [
    ("adan", {"lr": 0.02}),
    ("adamw", {"lr": 0.01, "state_bits": 8}),
    ("pnm", {"lr": 0.5}),
]
WITH_SUMS: list[tuple[str, dict[str, Any]]] = [
    ("lamb", {"lr": 0.01, "max_grad_norm": 0.1}),
    ("lars", {"lr": 0.2, "trust_coefficient": 0.02}),
    ("koala_v", {}),
    ("scalar_rmsprop", {}),
]


@pytest.mark.parametrize(("name", "options"), [*ELEMENTWISE, *WITH_SUMS])
def test_fsdp2_equals_ddp(name: str, options: dict[str, Any]) -> None:
    """To the five decimals that the module records."""
    replicated = run_ranks(losses, "ddp", name, options)[0]
    assert replicated[4] < replicated[0]  # the same batch, an epoch later
    assert run_ranks(losses, "fsdp2 full", name, options)[0] == pytest.approx(replicated, abs=2e-5)


@pytest.mark.parametrize(("name", "options"), [*ELEMENTWISE, *WITH_SUMS])
def test_fsdp1_equals_ddp(name: str, options: dict[str, Any]) -> None:
    replicated = run_ranks(losses, "ddp", name, options)[0]
    assert run_ranks(losses, "fsdp1 full", name, options)[0] == pytest.approx(replicated, abs=2e-5)


def test_fsdp2_takes_means_along_an_axis() -> None:
    """Adafactor with both axes factored, also of small matrices."""
    options = {"lr": 0.02, "min_dim_size_to_factor": 1}
    replicated = run_ranks(losses, "ddp", "adafactor", options)[0]
    assert run_ranks(losses, "fsdp2 full", "adafactor", options)[0] == pytest.approx(replicated, abs=2e-5)


def test_fsdp1_refuses_means_along_an_axis() -> None:
    with pytest.raises(RankFailure, match="row and column means, and FSDP1 cuts tensors without regard to rows"):
        run_ranks(losses, "fsdp1 full", "adafactor", {"min_dim_size_to_factor": 1})
