"""Options that are "total": the length of the run, which the Trainer knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_optim import AdEMAMix, OptionError, create_optimizer
from tests.harness.data import batches
from tests.harness.modules import Configured, vector
from tests.harness.nets import plain_net
from tests.harness.trainers import trainer

TOTAL: dict[str, Any] = {"name": "ademamix", "lr": 0.05, "betas": (0.9, 0.99, 0.999), "t_alpha": "total"}


def fit(spec: Any, *callbacks: Any, ckpt_path: Path | None = None, **options: Any) -> Configured:
    torch.manual_seed(0)
    module = Configured(spec)
    trainer(*callbacks, **{"max_epochs": 3, **options}).fit(module, batches(), ckpt_path=ckpt_path)
    return module


def length_in(module: Configured) -> float:
    optimizer: Any = module.trainer.optimizers[0]
    assert {group["t_alpha"] for group in optimizer.param_groups} == {"total"}
    return float(optimizer.total_steps)


def test_total_is_the_number_of_steps_of_the_run() -> None:
    steps = 3.0 * len(batches())
    expected = vector(fit({**TOTAL, "t_alpha": steps, "t_beta3": steps}))
    assert torch.equal(vector(fit({**TOTAL, "t_beta3": "total"})), expected)
    assert not torch.equal(vector(fit({**TOTAL, "t_alpha": steps / 3, "t_beta3": steps})), expected)
    half = {**TOTAL, "t_alpha": steps / 2, "t_beta3": steps / 2}
    accumulated = fit({**TOTAL, "t_beta3": "total"}, accumulate_grad_batches=2)
    assert torch.equal(vector(accumulated), vector(fit(half, accumulate_grad_batches=2)))


def test_a_group_may_have_it_alone() -> None:
    module = fit({**TOTAL, "groups": [{"params": "bias", "t_alpha": None}]})
    assert {group["t_alpha"] for group in module.trainer.optimizers[0].param_groups} == {None, "total"}


@pytest.mark.parametrize("every", [3, 4])
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_a_resumed_run_has_the_length_of_the_whole(every: int, tmp_path: Path) -> None:
    """From the middle of an epoch too, where nobody may have asked for the loader before."""

    def saver() -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path, filename="{step}", save_top_k=-1, every_n_train_steps=every)

    whole = fit(TOTAL, saver())
    resumed = fit(TOTAL, saver(), ckpt_path=tmp_path / f"step={every}.ckpt")
    assert length_in(whole) == length_in(resumed) == 3 * len(batches())
    assert resumed.trainer.global_step == 3 * len(batches())
    if every == len(batches()):
        assert torch.equal(vector(whole), vector(resumed))


def test_a_length_that_nobody_knows_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = AdEMAMix([parameter], t_beta3="total")
    assert "AdEMAMix" in repr(optimizer)
    parameter.grad = torch.ones(2)
    with pytest.raises(
        OptionError, match=r"AdEMAMix: t_beta3='total' is the number of steps of the whole run.*not known"
    ):
        optimizer.step()
    assert torch.equal(parameter.detach(), torch.ones(2))
    with pytest.raises(OptionError, match=r"'total' as t_alpha or t_beta3 is the length of a run.*ConfiguredOptimizer"):
        create_optimizer(TOTAL, plain_net())
    with pytest.raises(OptionError, match=r"neither max_epochs nor max_steps. Set max_steps"):
        fit(TOTAL, max_epochs=-1)
    assert length_in(fit(TOTAL, max_epochs=-1, max_steps=3)) == 3


def test_a_word_that_is_no_length_is_refused() -> None:
    with pytest.raises(OptionError, match=r"t_alpha='all' must be a number or 'total' or null"):
        create_optimizer({"name": "ademamix", "t_alpha": "all"}, plain_net())
