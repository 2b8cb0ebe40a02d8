"""Changes of a spec from the command line: one place in it, another name, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_optim import OptimizerStrategy, OptionError
from lightning_optim.config.changes import changed_at
from tests.harness.data import Data
from tests.harness.modules import Configured
from tests.harness.trainers import QUIET

GROUPS: list[dict[str, Any]] = [
    {"params": "net.0.*", "lr": 1.0},
    {"params": ["net.2.*"], "name": "head", "betas": [0.5, 0.6]},
]
ADAMW: dict[str, Any] = {"name": "adamw", "betas": [0.8, 0.9], "groups": GROUPS}
STEPS: dict[str, Any] = {"name": "adan", "schedule": {"name": "multi_step", "milestones": [3, 7]}}


@pytest.mark.parametrize(
    ("before", "path", "value", "expected"),
    [
        ("torch.optim.SGD", "momentum", 0.9, {"name": "torch.optim.SGD", "momentum": 0.9}),
        ("adamw", "betas.0", 0.5, {"name": "adamw", "betas": [0.5, 0.999]}),
        ("torch.optim.AdamW", "betas.1", 0.5, {"name": "torch.optim.AdamW", "betas": [0.9, 0.5]}),
        (ADAMW, "groups.0.lr", 0.1, {**ADAMW, "groups": [{**GROUPS[0], "lr": 0.1}, GROUPS[1]]}),
        (ADAMW, "groups.net.0.*.lr", 0.1, {**ADAMW, "groups": [{**GROUPS[0], "lr": 0.1}, GROUPS[1]]}),
        (ADAMW, "groups.head.lr", 0.1, {**ADAMW, "groups": [GROUPS[0], {**GROUPS[1], "lr": 0.1}]}),
        (
            {"name": "adamw", "schedule": {"name": "cosine", "warmup_steps": 7}},
            "schedule.name",
            "linear",
            {"name": "adamw", "schedule": {"name": "linear", "warmup_steps": 7}},
        ),
        ("adamw", "schedule.name", "linear", {"name": "adamw", "schedule": {"name": "linear"}}),
        ({"name": "muon", "adamw": {"scale": 0.5}}, "adamw.scale", 0.25, {"name": "muon", "adamw": {"scale": 0.25}}),
        ({"name": "lion", "lr": 0.5}, "name", "torch.optim.SGD", {"name": "torch.optim.SGD", "lr": 0.5}),
        (STEPS, "schedule.milestones.1", 5, {**STEPS, "schedule": {"name": "multi_step", "milestones": [3, 5]}}),
        (STEPS, "schedule.milestones+", 9, {**STEPS, "schedule": {"name": "multi_step", "milestones": [3, 7, 9]}}),
        (
            {"name": "adan", "schedule": "multi_step"},
            "schedule.milestones.0",
            0.25,
            {"name": "adan", "schedule": {"name": "multi_step", "milestones": [0.25, 0.75]}},
        ),
        ({"name": "adan", "freeze": ["a.*", "b.*"]}, "freeze.1", "c.*", {"name": "adan", "freeze": ["a.*", "c.*"]}),
        (ADAMW, "groups.head.betas.1", 0.7, {**ADAMW, "groups": [GROUPS[0], {**GROUPS[1], "betas": [0.5, 0.7]}]}),
        (ADAMW, "groups.net.0.*.betas.0", 0.7, {**ADAMW, "groups": [{**GROUPS[0], "betas": [0.7, 0.9]}, GROUPS[1]]}),
        (ADAMW, "groups.1.params+", "a", {**ADAMW, "groups": [GROUPS[0], {**GROUPS[1], "params": ["net.2.*", "a"]}]}),
    ],
    ids=str,
)
def test_one_place_changes(before: Any, path: str, value: Any, expected: Any) -> None:
    assert OptimizerStrategy.parse(changed_at(before, path.split("."), value)).as_config() == expected


@pytest.mark.parametrize(
    ("before", "path", "value", "expected", "words"),
    [
        (
            {**ADAMW, "lr": 0.3, "state_bits": 8, "full_precision": []},
            "name",
            "torch.optim.SGD",
            {
                **{"name": "torch.optim.SGD", "lr": 0.3},
                "groups": [GROUPS[0], {"params": ["net.2.*"], "name": "head"}],
            },
            r"'torch.optim.SGD' does not take betas, state_bits, full_precision, betas of group 'head', set",
        ),
        ({"name": "lion", "betas": [0.8, 0.9]}, "name", "adan", "adan", r"'adan' does not take betas.*it is left out"),
        (
            {"name": "adan", "betas": [0.8, 0.9, 0.9], "lr": 0.5},
            "name",
            "torch.optim.Adam",
            {"name": "torch.optim.Adam", "lr": 0.5},
            r"'torch.optim.Adam' does not take betas, set for 'adan' before: it is left out",
        ),
        ({"name": "muon", "adamw": {"scale": 0.5}}, "name", "adan", "adan", r"'adan' does not take adamw"),
        (
            {"name": "adan", "communication": {"kind": "powersgd", "rank": 2}},
            "communication.kind",
            "bf16",
            {"name": "adan", "communication": {"kind": "bf16"}},
            r"communication 'bf16' does not take rank",
        ),
    ],
)
def test_another_name_keeps_what_fits_and_says_what_does_not(
    before: Any, path: str, value: Any, expected: Any, words: str
) -> None:
    with pytest.warns(UserWarning, match=words):
        found = changed_at(before, path.split("."), value)
    assert OptimizerStrategy.parse(found).as_config() == expected


@pytest.mark.parametrize(
    ("before", "path", "words"),
    [
        ("adamw", "betas.2", r"betas.2: betas=\[0.9, 0.999\] has 2 values, betas.0 to betas.1"),
        ("adamw", "betas.first", r"betas.first: betas=\[0.9, 0.999\] has 2 values"),
        ("adamw", "lr.x", r"lr=\{'x': 1\} must be a number"),
        ("adamw", "groups.0.lr", r"groups.0.lr: adamw has no groups here. Append one"),
        (
            ADAMW,
            "groups.2.lr",
            r"write groups.GROUP.OPTION, with the index or the name of a group: 0 \(net.0.\*\), 1 \(he",
        ),
        (ADAMW, "groups.heads.lr", r"1 \(head\). Did you mean head\?"),
        (ADAMW, "groups.lr", r"groups.lr: write groups.GROUP.OPTION"),
        (ADAMW, "groups.0.lrr", r"group 'net.0.\*' has no option 'lrr'. Did you mean lr"),
        (ADAMW, "groups.0.lr.1", r"groups.0.lr.1: groups.0.lr=1.0 is no list. Write groups.0.lr without an index"),
        (ADAMW, "groups.0.betas.1.1", r"groups.0.betas.1.1: write groups.GROUP.OPTION"),
        (STEPS, "schedule.milestones.2", r"milestones=\[3, 7\] has 2 values, schedule.milestones.0 to schedule.mi"),
        ({"name": "adan", "schedule": "cosine"}, "schedule.warmup.1", r"schedule.warmup=None is no list"),
        ("adamw", "schedule.name", r"schedule 1 is not one of"),
        ("adamw", "name", r"no optimizer named 1"),
    ],
)
def test_places_that_do_not_exist(before: Any, path: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        OptimizerStrategy.parse(changed_at(before, path.split("."), 1))


def test_a_command_line_of_many_changes() -> None:
    """In the order in which they stand, each of what was before it."""
    o = "--model.optimizer"
    arguments = [
        *(f"{o}.class_path=torch.optim.AdamW", f"{o}.init_args.lr=1e-2", f"{o}.betas.0=0.5", f"{o}.schedule=cosine"),
        *(f"{o}.schedule.warmup_steps=3", f"{o}.groups+={{params: net.0.*, lr: 1.0}}", f"{o}.groups.0.lr=2e-1"),
    ]
    kind: Any = Configured
    made = LightningCLI(
        kind, Data, run=False, args=arguments, trainer_defaults=QUIET, save_config_callback=None,
        seed_everything_default=False,
    )  # fmt: skip
    assert made.model.hparams["optimizer"] == {
        **{"name": "torch.optim.AdamW", "lr": 0.01, "betas": [0.5, 0.999]},
        **{"schedule": {"name": "cosine", "warmup_steps": 3}, "groups": [{"params": "net.0.*", "lr": 0.2}]},
    }
