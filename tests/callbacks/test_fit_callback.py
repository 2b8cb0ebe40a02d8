"""Wrapping methods of one object, and taking that back in any order."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule

from lightning_optim import AdamW
from lightning_optim.callbacks import CheckpointIntegrity, GradInit, IterateAveraging, LookaheadSync
from lightning_optim.callbacks.fit_callback import wrap
from tests.harness.data import batches
from tests.harness.lives import every_callback, fit, torchs
from tests.harness.modules import Configured, Made
from tests.harness.trainers import trainer


class Speaker:
    def say(self, word: str) -> str:
        return word


def shout(say: Any, word: str) -> str:
    return f"{say(word)}!"


def ask(say: Any, word: str) -> str:
    return f"{say(word)}?"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_wrappers_are_undone_in_any_order(order: tuple[int, int]) -> None:
    speaker, other = Speaker(), Speaker()
    undo = [wrap(speaker, "say", shout), wrap(speaker, "say", ask)]
    assert speaker.say("yes") == "yes!?"
    assert other.say("yes") == "yes"
    undo[order[0]]()
    assert speaker.say("yes") == ("yes?" if order[0] == 0 else "yes!")
    undo[order[1]]()
    assert not vars(speaker)


def test_an_attribute_that_was_there_before_is_put_back() -> None:
    speaker: Any = Speaker()
    speaker.say = mine = str.upper
    undo = wrap(speaker, "say", shout)
    assert speaker.say("yes") == "YES!"
    undo()
    assert vars(speaker) == {"say": mine}


def test_what_another_package_has_wrapped_since_still_works() -> None:
    speaker: Any = Speaker()
    undo = wrap(speaker, "say", shout)
    inner = speaker.say
    speaker.say = lambda word: f"({inner(word)})"
    undo()
    assert speaker.say("yes") == "(yes)"


@every_callback
def test_a_callback_is_pickled_after_a_fit(make: Any, optimizer: Any) -> None:
    """As strategies that start processes do, for the next fit."""
    callback = make()
    fit(optimizer, callback)
    assert vars(pickle.loads(pickle.dumps(callback))).keys() <= vars(callback).keys()


class WithTest(Configured):
    def test_step(self, batch: Any, index: int) -> None:
        self.loss(batch)


class Mine(IterateAveraging):
    """The user's own."""


def go(fitting: Any, module: LightningModule) -> list[Any]:
    """Fit for one more epoch; the callbacks afterwards."""
    fitting.fit_loop.max_epochs += 1
    fitting.fit(module, batches())
    callbacks: list[Any] = list(fitting.callbacks)
    return callbacks


def test_each_run_has_the_companions_of_its_module() -> None:
    for mine in ([], [Mine("ema")]):
        fitting = trainer(*mine, max_epochs=0, limit_val_batches=0)
        for word in ("gadam", "adamw", "gadam", "ranger"):
            callbacks = go(fitting, Configured(word))
            averaging = [type(each) for each in callbacks if isinstance(each, IterateAveraging)]
            assert averaging == ([Mine] if mine else [IterateAveraging] if word == "gadam" else [])
            assert any(isinstance(each, LookaheadSync) for each in callbacks) == (word == "ranger")
            assert sum(isinstance(each, CheckpointIntegrity) for each in callbacks) == 1


def test_the_state_of_a_companion_is_saved_after_the_fit(tmp_path: Path) -> None:
    fitting = trainer(max_epochs=3)
    go(fitting, module := WithTest("gadam"))
    for _ in range(2):  # also when it was tested since
        fitting.save_checkpoint(tmp_path / "last.ckpt")
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert saved["callbacks"]["IterateAveraging"]["counts"] == [2]  # epochs 3 and 4 of 4
        fitting.test(module, batches(), verbose=False)


def test_a_module_of_another_kind_has_no_companions() -> None:
    fitting = trainer(max_epochs=0, limit_val_batches=0)
    go(fitting, Configured("gadam"))
    assert not [each for each in go(fitting, Made(torchs)) if isinstance(each, IterateAveraging | CheckpointIntegrity)]
    assert not vars(fitting.strategy).keys() & {"save_checkpoint", "load_checkpoint"}  # nor do they wrap anything


def test_one_callback_scales_each_new_module_once() -> None:
    """With a new module for each fold the weights are scaled again; a second fit of the same goes on."""
    callback = GradInit(gamma=10.0, iterations=1, table=False)

    def adamw(params: Any) -> torch.optim.Optimizer:
        return AdamW(params, lr=0.02)

    fitting, module = fit(adamw, callback, max_epochs=1)
    first = module.trained[0]
    assert torch.equal(fit(adamw, callback, max_epochs=1)[1].trained[0], first)
    last = fit(adamw, callback, max_epochs=1)
    last[0].fit_loop.max_epochs = 2
    before = torch.cat([p.detach().reshape(-1) for p in last[1].parameters()]).clone()
    last[0].fit(last[1])
    assert torch.equal(last[1].trained[4], before)
    assert fitting is not last[0]
