"""Files of other classes, other libraries and other programs that keep something in the state."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import LAMB, AdamW, Adan, Lion
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from tests.harness.engines import quantizes
from tests.harness.problems import NAMES, apply, build, flat, gradients, make_params

SHAPES = ((64, 70), (3,))


def made(name: str, steps: int = 3, **options: Any) -> tuple[Optimizer, list[Tensor]]:
    params = make_params(SHAPES, torch.float32)
    optimizer = build(name, params, **options)
    for step, grads in enumerate(gradients(steps, SHAPES, torch.float32)):
        apply(optimizer, params, grads, step)
    return optimizer, params


def pages() -> list[type[Optimizer]]:
    return [OPTIMIZERS[name] for name in NAMES]


# ---------------------------------------------------------------------------------------------- another class


@pytest.mark.parametrize("with_class", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_options_stay_where_the_class_differs(name: str, with_class: bool) -> None:
    """And a sentence names both. Files of earlier versions do not say their class, but their options and slots do.

    Except where one page has all options and the same slots of another: an early file of it looks alike.
    """
    alike = [{"adam", "adamw"}, {"adabelief", "acprop"}, {"sgd", "sgdw"}] if not with_class else []
    source, _ = made(name, lr=0.123)
    saved = source.state_dict()
    if not with_class:
        for group in saved["param_groups"]:
            del group["optimizer_class"]
    for cls in pages():
        optimizer = cls(make_params(SHAPES, torch.float32))
        before = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            optimizer.load_state_dict(copy.deepcopy(saved))
        words = [str(one.message) for one in said]
        if cls is type(source) or ({cls.name, name} in alike and not words):
            assert (words, optimizer.param_groups[0]["lr"]) == ([], 0.123)
            continue
        after = [{k: group[k] for k in before[0]} for group in optimizer.param_groups]
        assert after == before
        assert len(words) == 1
        assert words[0].startswith(f"{cls.__name__} loads a checkpoint of ")
        assert type(source).__name__ in words[0]
        params = [p for _, p in optimizer.every_parameter()]
        apply(optimizer, params, [torch.ones_like(p) for p in params])
        assert torch.isfinite(flat(params)).all()


def test_the_class_stands_in_the_file_alone() -> None:
    optimizer, _ = made("adamw")
    saved = optimizer.state_dict()
    assert [group["optimizer_class"] for group in saved["param_groups"]] == ["AdamW"]
    optimizer.load_state_dict(saved)
    assert "optimizer_class" not in optimizer.param_groups[0]


def test_through_torch_and_back_nothing_is_lost() -> None:
    optimizer, params = made("adamw", lr=0.123)
    theirs = torch.optim.AdamW(params)
    theirs.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    twin = AdamW(make_params(SHAPES, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.load_state_dict(theirs.state_dict())
    assert twin.param_groups[0]["lr"] == 0.123
    assert torch.equal(twin.state_dict()["state"][0]["exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])


# ---------------------------------------------------------------------------------------------- other programs


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("engine", ["reference", "blocked", "auto"])
def test_what_other_programs_keep_in_the_state_stays(bits: int, engine: str) -> None:
    """Through steps, a save, a load, a copy: tensors, numbers, lists, and entries that belong to no parameter."""
    optimizer, params = made("adamw", state_bits=bits, engine=engine)
    twin, others = made("adamw", state_bits=bits, engine=engine)
    first, last = params
    optimizer.state[first]["slow_buffer"] = first.detach().clone()
    optimizer.state[last].update(slow_buffer=last.detach().clone(), history=[torch.ones(2), 3], note="mine", seen=4)
    optimizer.state["of the whole"] = {"count": 5, "sum": torch.ones(2)}  # type: ignore[index]
    for step, grads in enumerate(gradients(3, SHAPES, torch.float32)):
        optimizer.state[first]["slow_buffer"] = optimizer.state[first]["slow_buffer"] + 1  # replaced in each step
        apply(optimizer, params, grads, step)
        apply(twin, others, grads, step)
    assert torch.equal(flat(params), flat(others))
    saved = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.load_state_dict(saved)
    for given in (twin, copy.deepcopy(twin)):
        a, b = given.param_groups[0]["params"]
        assert torch.equal(given.state[a]["slow_buffer"], optimizer.state[first]["slow_buffer"])
        assert given.state[a]["slow_buffer"] is not saved["state"][0]["slow_buffer"]
        assert given.state[b]["history"][1] == 3
        assert (given.state[b]["note"], given.state[b]["seen"]) == ("mine", 4)
        assert given.state["of the whole"]["count"] == 5  # type: ignore[index]
    apply(twin, others, [torch.ones_like(p) for p in others])
    apply(optimizer, params, [torch.ones_like(p) for p in params])
    assert repr(twin)


def test_state_of_other_programs_before_the_first_step() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])
    optimizer.state[p]["slow"] = torch.ones(3)
    optimizer.state[p]["theirs"] = torch.ones(3)
    twin = AdamW([nn.Parameter(torch.ones(3))])
    with pytest.warns(
        UserWarning, match="slow of the checkpoint is left out"
    ):  # our Lookahead's, which is not attached
        twin.load_state_dict(optimizer.state_dict())
    p.grad = torch.ones(3)
    optimizer.step()
    assert list(optimizer.state[p]) == ["slow", "theirs", "step", "exp_avg", "exp_avg_sq"]


# ---------------------------------------------------------------------------------------------- other libraries


@pytest.mark.parametrize("counter", [3, 3.0, torch.tensor(3), torch.tensor([3], dtype=torch.int32)], ids=str)
@pytest.mark.parametrize("name", ["adamw", "lamb", "adan"])
def test_a_counter_in_the_group(name: str, counter: Any) -> None:
    """apex and TransformerEngine, timm's LAMB, the authors' Adan."""
    optimizer, params = made(name)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"]:
        group["step"] = counter
        for key in ("state_bits", "state_format", "optimizer_class", "maximize"):
            group.pop(key)
    for slots in saved["state"].values():
        del slots["step"]
    twin = OPTIMIZERS[name]([nn.Parameter(p.detach().clone()) for p in params])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        twin.load_state_dict(saved)
    assert "step" not in twin.param_groups[0]
    others = [p for _, p in twin.every_parameter()]
    apply(optimizer, params, [torch.ones_like(p) for p in params])
    apply(twin, others, [torch.ones_like(p) for p in others])
    assert torch.equal(flat(params), flat(others))


def test_a_key_step_in_a_group_of_ours_is_a_users() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = AdamW([{"params": [p], "step": 7}])
    p.grad = torch.ones(3)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert (float(optimizer.state[p]["step"]), optimizer.param_groups[0]["step"]) == (1.0, 7)


def codes(values: Tensor) -> dict[str, Tensor]:
    """Block-wise codes as bitsandbytes keeps them: a code book, an index for each value, a scale for each block."""
    book = torch.linspace(-1, 1, 256)
    blocks = torch.nn.functional.pad(values.reshape(-1), (0, -values.numel() % 256)).view(-1, 256)
    absmax = blocks.abs().amax(1)
    index = ((blocks / absmax.clamp_min(1e-30)[:, None] + 1) * 127.5).round().to(torch.uint8)
    return {"state": index.view(-1)[: values.numel()].view(values.shape), "qmap": book, "absmax": absmax}


@pytest.mark.parametrize("packed", [True, False])
def test_bitsandbytes(packed: bool) -> None:
    """Its first and second state are the moments, in float32 or as codes. Only the form is tested, with our codes."""
    optimizer, params = made("adamw")
    saved = optimizer.state_dict()
    state: dict[int, dict[str, Any]] = {}
    for i, slots in saved["state"].items():
        moments = (slots["exp_avg"], slots["exp_avg_sq"])
        parts = [codes(x) if i == 0 else {"state": x} for x in moments]
        held = {f"{key}{n}": value for n, part in enumerate(parts, 1) for key, value in part.items()}
        state[i] = {"step": 3, **({"__bnb_optimizer_quant_state__": held} if packed else held)}
    groups = [{"lr": 0.5, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "alpha": 0.0, "params": [0, 1]}]
    twin = AdamW([nn.Parameter(p.detach().clone()) for p in params])
    twin.load_state_dict({"state": state, "param_groups": groups})
    found = twin.state_dict()["state"]
    assert twin.param_groups[0]["lr"] == 0.5
    assert torch.equal(found[1]["exp_avg"], saved["state"][1]["exp_avg"])
    scale = saved["state"][0]["exp_avg"].abs().max()
    assert (found[0]["exp_avg"] - saved["state"][0]["exp_avg"]).abs().max() < scale / 200
    assert found[0].keys() == {"step", "exp_avg", "exp_avg_sq"}


def test_adan_of_its_authors_keeps_the_negative_gradient() -> None:
    optimizer, params = made("adan")
    saved = copy.deepcopy(optimizer.state_dict())
    for slots in saved["state"].values():
        slots["neg_pre_grad"] = -slots.pop("prev_grad")
    twin = Adan([nn.Parameter(p.detach().clone()) for p in params])
    twin.load_state_dict(saved)
    assert torch.equal(twin.state_dict()["state"][0]["prev_grad"], optimizer.state_dict()["state"][0]["prev_grad"])


def test_lion_pytorch() -> None:
    from lion_pytorch import Lion as Theirs  # type: ignore[import-untyped]

    params = make_params(SHAPES, torch.float32)
    theirs = Theirs(params, lr=0.01, weight_decay=0.1)
    for grads in gradients(3, SHAPES, torch.float32):
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
        theirs.step()
    others = [nn.Parameter(p.detach().clone()) for p in params]
    optimizer = Lion(others)
    with pytest.warns(UserWarning, match="exp_avg taken; step starts fresh"):
        optimizer.load_state_dict(theirs.state_dict())
    for own in (params, others):
        for p in own:
            p.grad = torch.ones_like(p)
    theirs.step()
    optimizer.step()
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["weight_decay"]) == (0.01, 0.1)
    assert torch.allclose(flat(params), flat(others), rtol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [32, 8])
def test_a_slot_that_a_file_lacks_starts_fresh(name: str, bits: int) -> None:
    """Each slot of each optimizer, whatever is kept relative to it."""
    if bits == 8 and not quantizes(name):
        pytest.skip("it has nothing to keep in 8 bits")
    optimizer, params = made(name, state_bits=bits)
    saved = optimizer.state_dict()
    lone = [key for key in saved["param_groups"][0] if key in optimizer.slots]
    keys = [*saved["state"][0], *lone]
    for key in keys if len(saved["state"][0]) > 1 else lone:
        file = copy.deepcopy(saved)
        for held in (*file["state"].values(), file["param_groups"][0]):
            held.pop(key, None)
        others = [nn.Parameter(p.detach().clone()) for p in params]
        twin = build(name, others, state_bits=bits)
        words = f"{key}.* starts fresh"
        with pytest.warns(UserWarning, match=words):
            twin.load_state_dict(file)
        found = twin.state_dict()
        value = found["state"][0].get(key, found["param_groups"][0].get(key))
        assert twin.slots.get(key) is None or twin.slots[key].copies or value is not None
        apply(twin, others, [torch.ones_like(p) for p in others])
        assert torch.isfinite(flat(others)).all()


def test_options_of_lamb_are_found_in_a_file_of_apex() -> None:
    p = nn.Parameter(torch.ones(2))
    group = {"lr": 0.5, "bias_correction": False, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.0, "step": 2}
    moments = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    optimizer = LAMB([p])
    optimizer.load_state_dict({"state": {0: moments}, "param_groups": [{**group, "params": [0]}]})
    assert optimizer.param_groups[0]["bias_correction"] is False
    assert float(optimizer.state[p]["step"]) == 2
