"""Specs at random: the optimizer that was asked for, or a sentence of our own and nothing changed.

A sentence of our own is an `OptionError` in one line. No other exception leaves a spec, whatever stands in it.
"""

from __future__ import annotations

import copy
import itertools
import math
import typing
from argparse import ArgumentError
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch.cli import LightningCLI

from lightning_optim import OptimizerStrategy, OptionError, create_optimizer, list_optimizers
from lightning_optim.config.recipes import find
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.distributed.communication import KINDS
from lightning_optim.engines import ENGINES
from lightning_optim.language.options import Option
from lightning_optim.training.shapes import SHAPES
from tests.harness.data import Data, batches
from tests.harness.modules import Configured, vector
from tests.harness.nets import plain_net
from tests.harness.trainers import QUIET, trainer

FUZZ = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}

# ---------------------------------------------------------------- values

numbers = st.one_of(
    st.floats(0, 0.99), st.floats(), st.integers(-3, 300), st.sampled_from([10**400, -(10**400), 1e38, 1e-45])
)
plain = st.one_of(
    st.none(), st.booleans(), numbers, st.text(max_size=8), st.lists(numbers, max_size=3), st.just({}), st.just([[]])
)
foreign = st.one_of(
    numbers.filter(lambda n: abs(n) < 1e30).map(np.float32),
    st.lists(st.floats(0, 1), max_size=3).map(np.array),
    st.lists(st.floats(0, 1), max_size=3).map(lambda items: torch.tensor(items, dtype=torch.float32)),
    st.sampled_from([object(), int, lambda: None, b"adan", {1}, complex(1, 2), torch.tensor(1j), slice(1)]),
)
anything = st.one_of(plain, foreign)


def fitting(option: Option) -> st.SearchStrategy[Any]:
    """Values of the declared type, most of them in range."""
    return (
        _of_type(option.type) if option.name != "engine" else st.sampled_from(["auto", "reference", "warp", *ENGINES])
    )


def _of_type(hint: Any) -> st.SearchStrategy[Any]:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return st.sampled_from(args)
    if origin is tuple:
        return st.tuples(*map(_of_type, args)).map(list)
    if args:
        return st.one_of(*map(_of_type, args))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        float: st.one_of(st.floats(1e-6, 0.99), st.floats(0, 2)),
        int: st.integers(0, 200),
        bool: st.booleans(),
        str: st.text(max_size=8),
        type(None): st.none(),
    }
    return simple[hint]


words = st.sampled_from(["bias", "norm", "embedding", "weight", "0.*", "*.bias", "net.0.*", "2.weight", "nrom", "*"])
whole = st.integers(-1, 12)
lengths = st.one_of(whole, st.floats(0, 1), st.sampled_from(["1 epoch", "0.5 epochs", "5 %", "five"]))
schedules = st.one_of(
    st.sampled_from([*SHAPES, "cosinus"]),
    st.fixed_dictionaries(
        {"name": st.sampled_from([*SHAPES])},
        optional={
            **{"warmup_steps": whole, "final": st.floats(0, 1), "end": whole, "gamma": st.floats(0, 2)},
            **{"warmup": lengths, "every": lengths, "cycle": lengths, "milestones": st.lists(lengths, max_size=3)},
            "monitor": st.just("loss"),
        },
    ),
)
communications = st.one_of(
    st.sampled_from([*KINDS, "fp8"]),
    st.fixed_dictionaries(
        {"kind": st.sampled_from([*KINDS])},
        optional={"rank": whole, "start": whole, "period": whole, "local_ranks": whole},
    ),
)


@st.composite
def specs(draw: Any, values: st.SearchStrategy[Any] = anything, wrong: int = 5) -> Any:
    """A mapping with a name; about one in `wrong` of its values is anything."""

    def maybe(right: st.SearchStrategy[Any]) -> Any:
        return draw(values if draw(st.integers(1, wrong)) == 1 else right)

    name = draw(st.sampled_from(list_optimizers()))
    options = OPTIMIZERS[find(name).base].options

    def some(most: int) -> dict[str, Any]:
        keys = draw(st.lists(st.sampled_from([*options]), max_size=most, unique=True))
        return {key: maybe(fitting(options[key])) for key in keys}

    spec: dict[Any, Any] = {"name": maybe(st.just(name)), **some(4)}
    more: dict[Any, Any] = {
        "no_decay": st.lists(words, max_size=3),
        "full_precision": st.lists(words, max_size=3),
        "schedule": schedules,
        "communication": communications,
    }
    for key in draw(st.lists(st.sampled_from([*more]), max_size=2, unique=True)):
        spec[key] = maybe(more[key])
    if draw(st.booleans()):
        params = st.one_of(words, st.lists(words, max_size=3))
        count = draw(st.integers(0, 2))
        spec["groups"] = maybe(st.just([{"params": maybe(params), **some(2)} for _ in range(count)]))
    if draw(st.integers(1, wrong)) == 1:
        spec[draw(st.one_of(st.text(max_size=8), st.integers(), st.none(), st.just("self")))] = draw(values)
    return spec


def attempt(action: Callable[[], Any], kind: type[Exception] = OptionError) -> tuple[Any, str]:
    """What an action returns, or what it says where it refuses. Any other exception is a failure."""
    try:
        return action(), ""
    except kind as error:
        return None, str(error)


def is_ours(text: str) -> bool:
    return "\n" not in text and 20 < len(text) < 1200 and "NestedArg" not in text


# ---------------------------------------------------------------- properties


@given(st.one_of(specs(), anything))
@settings(max_examples=150, **FUZZ)  # type: ignore[arg-type]
def test_a_spec_is_read_or_refused(spec: Any) -> None:
    strategy, refusal = attempt(lambda: OptimizerStrategy.parse(spec))
    if refusal:
        assert is_ours(refusal)
        return
    again = OptimizerStrategy.parse(strategy.as_config())
    assert again == strategy
    assert repr(again) == repr(strategy)
    yaml.safe_dump(strategy.as_config())  # of plain values only
    for key, value in strategy.given.items():
        asked = spec[key] if not isinstance(value, torch.Tensor) else value
        assert same(value, asked), key


def same(value: Any, asked: Any) -> bool:
    if isinstance(value, tuple):
        return len(value) == len(asked) and all(map(same, value, asked))
    return value is asked or bool(value == asked)


@given(specs())
@settings(max_examples=60, **FUZZ)  # type: ignore[arg-type]
def test_an_optimizer_is_what_was_asked_for(spec: Any) -> None:
    net = plain_net()
    before, registry = copy.deepcopy(net.state_dict()), dict(OPTIMIZERS)
    if isinstance(spec["name"], str) and spec["name"] in list_optimizers() and find(spec["name"]).callbacks:
        spec["name"] = find(spec["name"]).base  # a recipe warns that its callback is missing
    optimizer, refusal = attempt(lambda: create_optimizer(spec, net))
    if refusal:
        assert is_ours(refusal)
    else:
        strategy = OptimizerStrategy.parse(spec)
        assert type(optimizer) is strategy.optimizer_class
        params = [p for group in optimizer.param_groups for p in group["params"]]
        assert len(params) == 4
        assert set(params) == set(net.parameters())
        assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)
        by_groups = {key for split in strategy.groups for key in split.options}
        by_role = {"weight_decay", "adapt", "state_bits"}
        asked = strategy.given.keys() - by_groups - by_role - {"engine", "capturable"}
        groups: list[dict[str, Any]] = optimizer.param_groups
        for key, group in itertools.product(asked, groups):
            assert group[key] is strategy.given[key] or group[key] == strategy.given[key]
        assert optimizer.defaults["engine"] == strategy.options.get("engine", "auto")
        for split in strategy.groups:
            rows = [group for group in optimizer.param_groups if split.label in group["name"]]
            assert any(all(group[key] == value for key, value in split.options.items()) for group in rows)
        optimizer.state_dict()
    assert registry == OPTIMIZERS
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@given(specs(plain, wrong=12))
@settings(max_examples=15, **FUZZ)  # type: ignore[arg-type]
@pytest.mark.filterwarnings("ignore::UserWarning")  # callbacks of recipes say that one step is short
def test_a_fit_takes_its_step_or_does_not_begin(spec: Any) -> None:
    module = Configured(spec)
    before = vector(module)
    fitted = trainer(max_epochs=-1, max_steps=1)
    _, refusal = attempt(lambda: fitted.fit(module, batches()))
    if refusal:
        assert is_ours(refusal)
        assert not module.losses or "engine=" in refusal  # an engine sees a step before it can say what it lacks
        assert torch.equal(vector(module), before)
    else:
        assert fitted.global_step == 1
        assert {float(state["step"]) for state in fitted.optimizers[0].state.values()} == {1.0}
        assert len(module.losses) == 1


@given(specs(plain, wrong=8), st.data())
@settings(max_examples=15, **FUZZ)  # type: ignore[arg-type]
def test_a_command_line_says_the_same_as_python(spec: Any, data: Any) -> None:
    """Whole, or with one of its options behind it."""
    later = {key: spec[key] for key in data.draw(st.sets(st.sampled_from([*spec]), max_size=1)) if key != "name"}
    rest = {key: value for key, value in spec.items() if key not in later}
    try:
        text = yaml.safe_dump(rest, default_flow_style=True, width=math.inf, allow_unicode=True).strip()
        arguments = [f"--model.optimizer={text}"]
        for key, value in later.items():
            shown = yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n...\n").strip()
            arguments.append(f"--model.optimizer.{key}={shown}")
        clear = yaml.safe_load(text) == rest and all(c.isprintable() for c in "".join(arguments))
    except (ValueError, yaml.YAMLError):
        return
    if not clear or not all(isinstance(key, str) and key.isidentifier() for key in spec):
        return  # YAML itself does not keep it
    expected, _ = attempt(lambda: OptimizerStrategy.parse(spec))
    made, refusal = attempt(
        lambda: LightningCLI(
            Configured,
            Data,
            run=False,
            args=arguments,
            trainer_defaults=QUIET,
            save_config_callback=None,
            seed_everything_default=False,
            parser_kwargs={"exit_on_error": False},
        ),
        ArgumentError,
    )
    assert bool(refusal) == (expected is None)
    assert "NestedArg" not in refusal.partition("Given value")[0]
    if made is not None:
        assert OptimizerStrategy.parse(made.model.hparams["optimizer"]) == expected
