"""Under FSDP1 a rank may hold no element of what is trained, a bias for instance; it counts steps as the others do."""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import pytest
import torch

from lightning_optim import AdamW, ScheduleFreeAdamW
from lightning_optim.callbacks import (
    EvaluationWeights,
    GradientNoise,
    IterateAveraging,
    LookaheadSync,
    OptimizerStateMemory,
    WarmupFreeSchedule,
)
from lightning_optim.distributed.names import plain_name
from tests.harness.data import batches
from tests.harness.journeys import Outer
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer

LAST = "net.3.bias"


def ours(params: Any) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.02)


def torchs(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02)


class OneBias(Outer):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        named = {plain_name(name): p for name, p in self.named_parameters()}
        return self.make([named[LAST]])


def fit(kind: Kind, make: Any, averaging: bool) -> dict[str, Any]:
    evaluating = IterateAveraging(start=0) if averaging else LookaheadSync(5, evaluate="slow")
    warmup, noise = WarmupFreeSchedule("linear"), GradientNoise(0.1)
    module = OneBias(make, with_norm=True)
    callbacks = [warmup, evaluating, noise, OptimizerStateMemory()]
    fitting = trainer(*callbacks, strategy=strategy_of(kind), max_epochs=3)
    with redirect_stdout(StringIO()) as printed:
        fitting.fit(module, batches(), batches(batch_size=16))
    (p,) = fitting.optimizers[0].param_groups[0]["params"]
    return {
        "size": p.numel(),
        "steps": [warmup.state_dict()["steps"], evaluating.state_dict()["steps"], noise.state_dict()["steps"]],
        "losses": module.seen["val"],
        "reported": printed.getvalue().count("after the first step"),
    }


@pytest.mark.parametrize(("make", "averaging"), [(ours, False), (torchs, True)])
def test_a_rank_without_an_element_counts_along(make: Any, averaging: bool) -> None:
    whole, divided = (run_ranks(fit, kind, make, averaging) for kind in ("ddp", "fsdp1 full"))
    assert [rank["size"] for rank in divided] == [0, 2]
    for rank in (*whole, *divided):
        assert rank["steps"] == [[12]] * 3
        assert rank["losses"] == pytest.approx(whole[0]["losses"], abs=1e-6)
    assert [rank["reported"] for rank in divided] == [1, 0]


def average(kind: Kind) -> list[float]:
    module = OneBias(lambda params: ScheduleFreeAdamW(params, lr=0.02), with_norm=True)
    trainer(EvaluationWeights(), strategy=strategy_of(kind), max_epochs=3).fit(
        module, batches(), batches(batch_size=16)
    )
    return module.seen["val"]


def test_a_rank_without_an_element_evaluates_the_average_along() -> None:
    """Recomputed statistics are means over all ranks, so all must ask for them together."""
    whole, divided = (run_ranks(average, kind) for kind in ("ddp", "fsdp1 full"))
    assert len(set(whole[0])) == 6
    for losses in (*whole, *divided):
        assert losses == pytest.approx(whole[0], abs=1e-6)
