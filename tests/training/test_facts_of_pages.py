"""What callbacks know about an optimizer is what its page declares, for every optimizer of the registry."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.language.definition import Definition
from lightning_optim.training import second_moment
from lightning_optim.training.batch_scaling import RULES, rule_of

every_optimizer = pytest.mark.parametrize("name", sorted(OPTIMIZERS))


def build(name: str, **options: Any) -> Optimizer:
    make: Any = OPTIMIZERS[name]
    optimizer: Optimizer = make([nn.Parameter(torch.ones(2, 2))], **options)
    return optimizer


def values(cls: type[Optimizer], path: str) -> tuple[dict[str, Any], float]:
    """Options in which the one at a path such as "betas.1" differs from all others, and its value."""
    option, _, index = path.partition(".")
    if not index:
        return {option: 0.625}, 0.625
    items = [0.75 + i / 16 for i in range(len(cls.options[option].default))]
    return {option: tuple(items)}, items[int(index)]


@every_optimizer
def test_the_decay_of_the_second_moment_is_the_one_that_the_page_declares(name: str) -> None:
    cls = OPTIMIZERS[name]
    declared = {path for slot in cls.slots.values() for path in (slot.mean_square_by, slot.second_moment_by) if path}
    assert len(declared) <= 1, "two slots of a page must not disagree"
    options, expected = values(cls, next(iter(declared))) if declared else ({}, None)
    optimizer = build(name, **options)
    assert second_moment.decay(optimizer, optimizer.param_groups[0]) == expected


@every_optimizer
def test_the_mean_square_is_the_slot_that_the_page_declares(name: str) -> None:
    optimizer = build(name)
    declared = [(n, slot.mean_square_by) for n, slot in optimizer.slots.items() if slot.mean_square_by]
    declared = [pair for pair in declared if pair[0] in optimizer.slots_of(0, optimizer.every_parameter()[0][1])]
    found = second_moment.mean_square(optimizer)
    assert ([(found.slot, ".".join(filter(None, found[1:])))] if found else []) == declared
    assert not any(slot.mean_square_by and slot.second_moment_by for slot in optimizer.slots.values())
    assert all(optimizer.slots[n].per == "element" for n, _ in declared)


@every_optimizer
def test_every_page_states_its_rule_for_the_batch_size(name: str) -> None:
    cls = OPTIMIZERS[name]
    pages = cls.__mro__[: cls.__mro__.index(Optimizer)]
    assert any("batch_scaling" in vars(page) for page in pages)
    assert cls.batch_scaling in (*RULES, None)
    assert rule_of(build(name)) == cls.batch_scaling
    assert "batch_scaling" in vars(Definition)


def test_a_class_of_another_library_with_the_name_of_ours_gets_the_same_decay() -> None:
    for name in second_moment.OTHERS:
        mine = next((cls for cls in OPTIMIZERS.values() if cls.__name__ == name), None)
        if mine is not None:
            lookalike = type(name, (torch.optim.SGD,), {})([nn.Parameter(torch.ones(2))], lr=0.1)
            keys = {path.partition(".")[0] for s in mine.slots.values() if (path := s.mean_square_by)}
            lookalike.param_groups[0].update({key: mine.options[key].default for key in keys})
            optimizer = build(mine.name)
            ours = second_moment.decay(optimizer, optimizer.param_groups[0])
            assert second_moment.decay(lookalike, lookalike.param_groups[0]) == ours
