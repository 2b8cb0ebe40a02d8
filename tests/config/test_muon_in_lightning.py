"""`optimizer: muon` as users of Trainer and LightningCLI meet it: one optimizer, whatever stands beside it."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_optim import OptionError, create_optimizer
from lightning_optim.callbacks import (
    GradientNoise,
    IterateAveraging,
    LookaheadSync,
    NonFiniteGuard,
    OptimizerStateMemory,
)
from lightning_optim.cli import main
from tests.harness.data import batches
from tests.harness.modules import Configured, vector
from tests.harness.ranks import run_ranks
from tests.harness.trainers import QUIET, Walk, trainer

MUON: dict[str, Any] = {"name": "muon", "lr": 0.01}


class Tied(nn.Module):
    """A head that is the embedding, of inputs that are made tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.tanh(self.inner(self.embed((x[:, 0] > 0).long()))))[:, :2]
        return found


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 2))


class Validated(Configured):
    def validation_step(self, batch: Any, index: int) -> None:
        self.loss(batch)


def fitted(
    spec: Any,
    *callbacks: Callback,
    kind: Any = Configured,
    of: Any = net,
    size: int = 8,
    ckpt_path: Any = None,
    **options: Any,
) -> Any:
    """The module, its Trainer and the weights after each step."""
    seed_everything(0, verbose=False)
    walk, module = Walk(), kind(spec, of)
    one = trainer(walk, *callbacks, **{"max_epochs": 1, **options})
    one.fit(module, batches(batch_size=size), ckpt_path=ckpt_path)
    return module, one, walk.weights


def matrix(module: Any) -> Tensor:
    found: Tensor = module.net[2].weight
    return found


# ------------------------------------------------------------------ accumulation, clipping, rates


def test_eight_samples_are_two_batches_of_four() -> None:
    whole, halves = fitted(MUON, size=8), fitted(MUON, size=4, accumulate_grad_batches=2)
    assert len(whole[2]) == len(halves[2]) == 4
    torch.testing.assert_close(torch.stack(halves[2]), torch.stack(whole[2]), rtol=1e-3, atol=1e-5)
    assert halves[1].optimizers[0].state[matrix(halves[0])]["step"] == 4


def test_a_tiny_clip_does_not_stop_a_matrix() -> None:
    """Its gradient is clipped, and not what becomes of it."""
    free, clipped = fitted(MUON, max_steps=1), fitted(MUON, max_steps=1, gradient_clip_val=1e-4)
    torch.testing.assert_close(matrix(clipped[0]), matrix(free[0]), rtol=1e-4, atol=1e-6)


def moved(spec: Any, **options: Any) -> list[float]:
    """How far a matrix and the head go in each of two steps."""
    seed_everything(0, verbose=False)
    start = Configured(spec, net)
    path = [vector(start), *fitted(spec, max_steps=2, **options)[2]]
    at = 0
    slices = {}
    for name, p in start.net.named_parameters():
        slices[name] = slice(at, at + p.numel())
        at += p.numel()
    return [float((path[k + 1] - path[k])[slices[name]].norm()) for k in range(2) for name in ("2.weight", "4.weight")]


class Halved(Configured):
    """With a scheduler of torch by the user."""

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def test_a_schedule_moves_both_rules() -> None:
    rates = fitted({**MUON, "schedule": "linear", "adamw": {"scale": 0.5}})[1].optimizers[0].param_groups
    assert {group["lr"] for group in rates} == {0.0}, "at its end"
    matrix_first, head_first, matrix_then, head_then = moved({**MUON, "adamw": {"scale": 0.5}}, kind=Halved)
    assert matrix_first > 0
    assert head_first > 0
    assert matrix_then == head_then == 0
    halved = moved({**MUON, "weight_decay": 0.0, "adamw": {"scale": 0.5}})
    whole = moved({**MUON, "weight_decay": 0.0})
    assert halved[0] == pytest.approx(whole[0])
    assert halved[1] == pytest.approx(whole[1] / 2, rel=1e-3)


# ------------------------------------------------------------------ precision and skipped steps


class Overflows(Configured):
    """Its second batch has an infinite loss."""

    def training_step(self, batch: Any, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        return loss * float("inf") if index == 1 else loss


def half() -> list[Any]:
    return [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=8.0))]


def test_bfloat16_and_float16_train_float32_weights() -> None:
    exact = fitted(MUON)[0]
    each: list[dict[str, Any]] = [{"precision": "bf16-mixed"}, {"plugins": half()}]
    for options in each:
        module, one, _ = fitted(MUON, **options)
        assert {p.dtype for p in module.parameters()} == {torch.float32}
        assert one.optimizers[0].state[matrix(module)]["exp_avg"].dtype == torch.float32
        torch.testing.assert_close(vector(module), vector(exact), rtol=0, atol=0.02)


@pytest.mark.parametrize("by", ["scaler", "guard"])
def test_a_skipped_step_leaves_weights_and_state(by: str) -> None:
    if by == "scaler":
        module, one, weights = fitted(MUON, kind=Overflows, plugins=half())
    else:
        with pytest.warns(UserWarning, match="NonFiniteGuard skips"):
            module, one, weights = fitted(MUON, NonFiniteGuard(), kind=Overflows)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[1], weights[2])
    assert all(float(one.optimizers[0].state[p]["step"]) == 3 for p in module.parameters())
    assert torch.isfinite(vector(module)).all()


# ------------------------------------------------------------------ models


def test_a_tied_head_and_layers_that_join_later() -> None:
    module, one, _ = fitted(MUON, of=Tied)
    state = one.optimizers[0].state
    assert list(state[module.net.embed.weight]) == ["step", "exp_avg", "exp_avg_sq"]
    assert list(state[module.net.inner.weight]) == ["step", "exp_avg"]

    class Unfreeze(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                pl_module.net[2].requires_grad_(True)

    def frozen() -> nn.Sequential:
        found = net()
        found[2].requires_grad_(False)
        return found

    module, one, _ = fitted(MUON, Unfreeze(), of=frozen)
    state = one.optimizers[0].state[matrix(module)]
    assert list(state) == ["step", "exp_avg"]
    assert float(state["step"]) == 2
    assert "muon: 2 tensors" in repr(one.optimizers[0])


def large() -> nn.Sequential:
    """With matrices that are kept in codes."""
    return nn.Sequential(nn.Linear(4, 68), nn.Linear(68, 68), nn.Linear(68, 2))


@pytest.mark.parametrize("bits", [32, 8])
def test_a_resumed_run_takes_the_same_steps(bits: int, tmp_path: Path) -> None:
    spec = {**MUON, "state_bits": bits, "schedule": {"name": "constant", "warmup_steps": 3}}
    _, one, _ = fitted(spec, of=large)
    one.save_checkpoint(tmp_path / "a.ckpt")
    resumed = fitted(spec, of=large, max_epochs=2, ckpt_path=tmp_path / "a.ckpt")
    straight = fitted(spec, of=large, max_epochs=2)
    assert torch.equal(vector(resumed[0]), vector(straight[0]))
    slots = [m[1].optimizers[0].state_dict()["state"] for m in (resumed, straight)]
    assert all(torch.equal(slots[0][k]["exp_avg"], slots[1][k]["exp_avg"]) for k in slots[0])


def test_validate_before_fit_changes_nothing() -> None:
    seed_everything(0, verbose=False)
    module, one = Validated(MUON, net), trainer(max_epochs=1)
    one.validate(module, batches(), verbose=False)
    one.fit(module, batches(), batches())
    assert torch.equal(vector(module), vector(fitted(MUON)[0]))


# ------------------------------------------------------------------ callbacks and the report


@pytest.mark.parametrize(
    "make",
    [lambda: IterateAveraging(), lambda: LookaheadSync(), lambda: GradientNoise(), lambda: OptimizerStateMemory()],
)
def test_callbacks_beside_it(make: Any) -> None:
    module, _, weights = fitted(MUON, make())
    assert len(weights) == 4
    assert torch.isfinite(vector(module)).all()


def test_the_report_is_told_once_and_in_the_table(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        memory = OptimizerStateMemory()
        _, one, _ = fitted(MUON, memory, max_epochs=2)
    said = [record.getMessage() for record in caplog.records]
    assert sum("4.weight [2, 6]: head" in text for text in said if text.startswith("Muon:")) == 1
    assert "4.weight [2, 6]: head" in repr(one.optimizers[0])
    printed = capsys.readouterr().out
    assert len(re.findall(r"adamw +│ 6 tensors", printed)) == 1
    assert re.search(r"4.weight \[2, 6\] +│ head", printed)


# ------------------------------------------------------------------ LightningCLI


@pytest.mark.parametrize(
    ("spec", "arguments", "expected"),
    [
        ("muon", [], {"lr": 1e-3, "adamw_scale": 1.0, "steps": 5}),
        ({"name": "muon", "lr": 0.02, "adamw": {"scale": 0.5}}, [], {"lr": 0.02, "adamw_scale": 0.5}),
        (
            {"name": "muon", "lr": 0.02, "adamw": {"scale": 0.5}},
            ["--model.optimizer.lr=0.1", "--model.optimizer.adamw.scale=0.25", "--model.optimizer.adamw.eps=1e-10"],
            {"lr": 0.1, "adamw_scale": 0.25, "adamw_eps": 1e-10},
        ),
        ("adan", ["--model.optimizer=muon", "--model.optimizer.adjust=original"], {"adjust": "original"}),
        ("muon", ["--model.optimizer.adamw.betas=[0.8, 0.9]"], {"betas": (0.8, 0.9)}),
        ("muon", ["--model.optimizer.adamw+=net.2.*"], {"lr": 1e-3}),
    ],
    ids=str,
)
def test_the_command_line(spec: Any, arguments: list[str], expected: dict[str, Any], tmp_path: Path) -> None:
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"dirpath": str(tmp_path), "filename": "end"},
    }
    content = {
        "seed_everything": 0,
        "model": {"class_path": "tests.harness.modules.Configured", "init_args": {"optimizer": spec}},
        "data": {"class_path": "tests.harness.data.Data"},
        "trainer": {**QUIET, "default_root_dir": str(tmp_path), "callbacks": [saving]},
    }
    (tmp_path / "config.in.yaml").write_text(yaml.safe_dump(content))
    main(["fit", "--config", str(tmp_path / "config.in.yaml"), *arguments])
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)
    group = saved["optimizer_states"][0]["param_groups"][0]
    assert {key: group[key] for key in expected} == expected
    state = saved["optimizer_states"][0]["state"]
    assert ["exp_avg_sq" in state[k] for k in range(4)] == [False, True, True, True]
    if "adamw+" in "".join(arguments):
        assert saved["hyper_parameters"]["optimizer"]["adamw"]["params"][-2:] == ["head", "net.2.*"]


# ------------------------------------------------------------------ ranks


def on_a_rank() -> tuple[Tensor, str]:
    module, one, _ = fitted(MUON, strategy="ddp")
    return vector(module), repr(one.optimizers[0])


def test_two_ranks_under_ddp_are_one_process() -> None:
    (first, report), (second, _) = run_ranks(on_a_rank)
    assert torch.equal(first, second)
    assert "4.weight [2, 6]: head" in report
    torch.testing.assert_close(first, vector(fitted(MUON)[0]), rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "adamw", "momentum": 0.9}, "'adamw' has no option 'momentum'"),
        ({"name": "sgd", "steps": 5}, "'sgd' has no option 'steps'"),
        ({"name": "adamw", "adamw": {"eps": 1e-8}}, "has no key 'adamw'"),
        ({"name": "muon", "adamw_eps": 1e-8, "adamw": {"eps": 1e-6}}, "the same"),
        ({"name": "muon", "adamw": {"momentum": 0.9}}, "momentum"),
        ({"name": "muon", "adamw": {"scale": 0}}, "scale"),
        ({"name": "muon", "adamw": {"scale": -1.0}}, "scale"),
        ({"name": "muon", "adamw": "bias"}, "must be a list"),
        ({"name": "muon", "adamw": ["nothing.*"]}, "no parameter matches"),
        ({"name": "muon", "ns_steps": 5}, "ns_steps"),
        ({"name": "muon", "steps": 0}, "steps"),
        ({"name": "muon", "adjust": "moonlight"}, "adjust"),
        ({"name": "muon", "adjust_lr_fn": "original"}, "adjust_lr_fn"),
        ({"name": "muon", "coefficients": [3.4, -4.7, 2.0]}, "coefficients"),
        ({"name": "muon", "groups": [{"params": "*0.weight", "blocks": 4}]}, "0.weight: blocks=4 does not divide"),
        ({"name": "muon", "groups": [{"params": "*0.weight", "blocks": [4, 4]}]}, "0.weight"),
        ({"name": "muon", "groups": [{"params": "*0.weight", "experts": True}]}, "0.weight"),
        ({"name": "muon", "groups": [{"params": "*0.bias", "matrix": True}]}, "0.bias: matrix=True"),
        ({"name": "muon", "groups": [{"params": "*0.weight", "adamw": {"eps": 1.0}}]}, "adamw"),
        ({"name": "muon", "adamw": ["*"]}, "no matrix"),
        ({"name": "muon", "cautious": True}, "cautious"),
        ({"name": "muon", "capturable": True}, "capturable"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_sentence(spec: Any, words: str) -> None:
    with pytest.raises(OptionError, match=re.escape(words)) as caught:
        create_optimizer(spec, net())
    assert "\n" not in str(caught.value)
