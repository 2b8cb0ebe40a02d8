"""What cannot be right is refused, and what is only unusual is served."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_optim import SGDW, AdamW, KoalaV, OptionError, create_optimizer, engines
from lightning_optim.storage import Quantized, quantized
from tests.harness.problems import apply, build, flat, gradients, make_params

ENGINES = ["auto", *engines.ENGINES]
SHAPES = ((64, 70), (3,))


def engine_that_serves(name: str, bits: int = 32) -> str:
    """The engine, or a skipped test where this machine lacks what it needs."""
    probe = build("adamw", make_params(SHAPES, torch.float32), state_bits=bits, engine=name)
    params = [p for _, p in probe.every_parameter()]
    if name != "auto" and (why := engines.ENGINES[name].refusal(probe.first_programs(), params)):
        pytest.skip(why)
    return name


@pytest.fixture(autouse=True)
def _quiet_interpreter() -> Iterator[None]:
    """Triton's interpreter is NumPy, which warns of what is masked out and of what is not a number."""
    with np.errstate(all="ignore"):
        yield


# ---------------------------------------------------------------------------------------------- devices


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [32, 8])
def test_state_on_another_device(engine: str, bits: int) -> None:
    """A model that moved after its optimizer was made, or state that was moved by hand."""
    params = make_params(SHAPES, torch.float32)
    optimizer = build("adamw", params, state_bits=bits, engine=engine_that_serves(engine, bits))
    apply(optimizer, params, [torch.ones_like(p) for p in params])
    optimizer.state[params[0]]["exp_avg"] = optimizer.state[params[0]]["exp_avg"].to("meta")
    before = flat(params)
    with pytest.raises(RuntimeError, match=r"exp_avg of a parameter of shape \(64, 70\) is on meta, .* on cpu\. Move"):
        apply(optimizer, params, [torch.ones_like(p) for p in params])
    assert torch.equal(flat(params), before)


def test_parameters_on_several_devices() -> None:
    """`auto` takes the engine that serves any tensor; one that cannot says so."""
    params = [nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, device="meta"))]
    grads = [torch.ones_like(p) for p in params]
    optimizer = build("adamw", params)
    apply(optimizer, params, grads)
    assert params[0][0] < 1
    assert "engine: reference (a parameter is not on the CPU.)" in repr(optimizer)
    for engine in engines.ENGINES.keys() - {"reference"}:
        with pytest.raises(OptionError, match=rf"engine='{engine}' cannot serve here: .*Use engine='auto'"):
            apply(build("adamw", params, engine=engine), params, grads)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128])
def test_types_that_a_gpu_engine_cannot_serve(dtype: torch.dtype) -> None:
    """It computes in float32: twice the precision is refused by name and served by `auto`."""
    params = make_params(((5,),), dtype)
    programs = build("adamw", params).first_programs()
    rows = [torch.view_as_real(p) if p.is_complex() else p for p in params]
    refusal = engines.triton.refusal(programs, rows) if not engines.triton._missing() else "float64"
    assert ("float64" in refusal) == (dtype != torch.complex64)
    ends = []
    for engine in ("auto", "reference"):
        params = make_params(((5,),), dtype)
        optimizer = build("adamw", params, engine=engine)
        for grads in gradients(3, ((5,),), dtype):
            apply(optimizer, params, grads)
        ends.append(flat(params))
    assert torch.equal(*ends)


# ---------------------------------------------------------------------------------------------- shared memory

SHARING: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "the same memory": lambda b: [b, b.view(-1)],
    "one within the other": lambda b: [b, b[3:5]],
    "by one element": lambda b: [b.view(-1)[:51], b.view(-1)[50:]],
    "rows and columns": lambda b: [b[2], b[:, 3]],
    "of two types": lambda b: [b, b.view(torch.int32).view(torch.float32)[1]],
    "third of three": lambda b: [b[:2], b[4:], b[1:3]],
}
APART: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "one after the other": lambda b: [b[:3], b[3:]],
    "columns of a matrix": lambda b: [b[:, 0], b[:, 1:4], b[:, 4:]],
    "turned": lambda b: [b[:5].t(), b[5:].t()],
    "empty": lambda b: [b, b[:0]],
    "types side by side": lambda b: [b[:5].view(torch.float16), b[5:]],
}


@pytest.mark.parametrize("views", SHARING.values(), ids=SHARING)
def test_parameters_that_share_memory_are_refused(views: Callable[[Tensor], list[Tensor]]) -> None:
    params = [nn.Parameter(part) for part in views(torch.zeros(10, 10))]
    with pytest.raises(OptionError, match=r"AdamW: two parameters of shapes .* share memory.*tie weights by using one"):
        AdamW(params)
    with pytest.raises(OptionError, match="share memory"):
        AdamW([{"params": [p]} for p in params])
    optimizer = AdamW(params[:-1])
    with pytest.raises(OptionError, match="share memory"):
        optimizer.add_param_group({"params": params[-1]})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("views", APART.values(), ids=APART)
def test_views_of_one_buffer_that_are_apart_are_served(views: Callable[[Tensor], list[Tensor]]) -> None:
    buffer = torch.zeros(10, 10)
    params = [nn.Parameter(part) for part in views(buffer)]
    optimizer = SGDW([{"params": [p]} for p in params], lr=0.5)
    apply(optimizer, params, [torch.ones_like(p) for p in params])
    assert all(torch.equal(p, torch.full_like(p, -0.5)) for p in params)


def test_an_expanded_parameter_is_refused() -> None:
    with pytest.raises(OptionError, match=r"a parameter of shape \(7,\) is expanded: its elements share memory"):
        AdamW([nn.Parameter(torch.zeros(1).expand(7))])


def test_tied_weights_count_once() -> None:
    net = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    net[1].weight = net[0].weight
    optimizer = create_optimizer("adamw", net)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1]


def test_parameters_without_memory_are_served() -> None:
    params = [nn.Parameter(torch.empty(3, 3, device="meta")) for _ in range(3)]
    assert AdamW(params).param_groups[0]["params"] == params
    freed = nn.Parameter(torch.zeros(5))  # what FSDP1 leaves of a parameter between two uses
    freed.untyped_storage().resize_(0)
    AdamW([freed, *(nn.Parameter(torch.zeros(5)) for _ in range(2))])


# ---------------------------------------------------------------------------------------------- what changed


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("shape", [(64, 140), (32, 70), (140, 64)])
def test_a_parameter_that_changed_its_shape(engine: str, bits: int, shape: tuple[int, ...]) -> None:
    """Engines that go by addresses wrote beyond the end of the state."""
    params = make_params(SHAPES, torch.float32)
    optimizer = build("adamw", params, state_bits=bits, engine=engine_that_serves(engine, bits))
    apply(optimizer, params, [torch.ones_like(p) for p in params])
    params[0].data = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=rf"has the shape \(64, 70\), and its parameter \({shape[0]}, {shape[1]}\)"):
        apply(optimizer, params, [torch.ones_like(p) for p in params])
    assert not params[0].any()
    optimizer.reset()
    apply(optimizer, params, [torch.ones_like(p) for p in params])
    assert params[0].all()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_gradient_of_another_shape(engine: str) -> None:
    """Torch looks when a gradient is given; what becomes of the parameter later it does not see."""
    p = nn.Parameter(torch.zeros(8))
    optimizer = SGDW([p], lr=0.1, engine=engine_that_serves(engine))
    p.grad = torch.ones(8)
    p.data = torch.zeros(16)
    with pytest.raises(RuntimeError, match=r"a gradient has the shape \(8,\), and its parameter \(16,\)\. Did"):
        optimizer.step()
    assert not p.any()


@pytest.mark.parametrize("engine", ENGINES)
def test_a_parameter_that_is_turned_where_it_is(engine: str) -> None:
    """Its address stays the same; the state follows the elements by their indices, as in torch.optim."""
    ends = []
    for make in (
        functools.partial(AdamW, engine=engine_that_serves(engine)),
        functools.partial(torch.optim.AdamW, foreach=False),
    ):
        p = nn.Parameter(torch.arange(64.0 * 64).view(64, 64) / 64)
        optimizer = make([p], lr=0.1)
        for grad in (torch.ones(64, 64), torch.linspace(-1, 1, 64 * 64).view(64, 64)):
            p.grad = grad
            optimizer.step()
            p.data = p.data.t()
        ends.append(p.detach())
    torch.testing.assert_close(*ends, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- groups


def test_a_group_for_which_there_is_nothing_to_keep_in_8_bits() -> None:
    params = make_params(SHAPES, torch.float32)
    with pytest.raises(OptionError, match=r"KoalaV: state_bits=8 has nothing to keep in 8 bits"):
        KoalaV([{"params": params, "state_bits": 8}])
    optimizer = KoalaV(params[:1])
    with pytest.raises(OptionError, match=r"KoalaV: state_bits=8 has nothing to keep in 8 bits"):
        optimizer.add_param_group({"params": params[1:], "state_bits": 8})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("option", [{"engine": "reference"}, {"capturable": True}])
def test_a_group_cannot_have_what_is_one_for_all(option: dict[str, Any]) -> None:
    """It was dropped without a word, and another engine ran."""
    params = make_params(SHAPES, torch.float32)
    word = next(iter(option))
    with pytest.raises(OptionError, match=rf"AdamW: {word} is one for all groups; give it to AdamW\(\.\.\.\)"):
        AdamW([{"params": params, **option}])
    optimizer = AdamW(params[:1])
    with pytest.raises(OptionError, match=rf"AdamW: {word} is one for all groups"):
        optimizer.add_param_group({"params": params[1:], **option})
    assert AdamW(optimizer.param_groups).param_groups[0]["lr"] == 1e-3  # groups as an optimizer holds them have neither


# ---------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("state_format", ["log", "dynamic"])
@pytest.mark.parametrize(("old", "new"), [(64, 256), (256, 64), (2048, 256)])
def test_a_checkpoint_with_another_block_size(
    old: int, new: int, state_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint holds values, so it loads; quantized anew they move by what a code is worth in new blocks.

    The engine is plain torch, which takes the size of a block from one place; kernels print theirs into their text.
    """
    options: dict[str, Any] = {"state_bits": 8, "state_format": state_format, "engine": "reference"}
    monkeypatch.setattr(quantized, "BLOCK", old)
    params = make_params(SHAPES, torch.float32)
    optimizer = build("adamw", params, **options)
    for grads in gradients(5, SHAPES, torch.float32):
        apply(optimizer, params, grads)
    saved = optimizer.state_dict()
    monkeypatch.setattr(quantized, "BLOCK", new)
    twin = build("adamw", params, **options)
    twin.load_state_dict(saved)
    blocks = -(-64 * 70 // new)
    values = twin.state_dict()["state"][0]
    for name in ("exp_avg", "exp_avg_sq"):
        kept = twin.state[params[0]][name]
        assert isinstance(kept, Quantized)
        assert kept.codes.shape == (blocks, new)
        assert len(kept.scales) == blocks
        was, now = saved["state"][0][name], values[name]
        # One code near the largest value of a block of normal numbers is at most 2 % of it, in every format.
        assert (now - was).abs().max() <= 0.02 * was.abs().max()
        assert torch.equal(now == 0, was == 0) or name == "exp_avg"
    before = flat(params)
    apply(twin, params, [torch.ones_like(p) for p in params])
    assert torch.isfinite(flat(params)).all()
    assert not torch.equal(flat(params), before)


@pytest.mark.parametrize("state_format", ["log", "dynamic"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("engine", ENGINES)
def test_one_bad_gradient_element_spoils_one_element(bad: float, state_format: str, engine: str) -> None:
    """The other elements of its block go on bit for bit, and its own state starts again from zero.

    The bad element is no extreme of its block, since those stand in the scales; what is compared is a run in which the
    gradient of that element was zero from the start, which the state of a bad element is taken back to.
    """
    name = engine_that_serves(engine, 8)
    ends = []
    at = (5, 6)  # element 356, in the middle of the second block
    for poison in (0.0, bad):
        params = make_params(((64, 70),), torch.float32)
        optimizer = build("adamw", params, state_bits=8, state_format=state_format, engine=name, weight_decay=0.0)
        for step, grads in enumerate(gradients(6, ((64, 70),), torch.float32)):
            grads[0][at] = poison if step == 2 else 0.0
            apply(optimizer, params, grads, step)
        ends.append((params[0].detach(), optimizer.state_dict()["state"][0]))
    (clean, clean_state), (spoiled, spoiled_state) = ends
    others = torch.ones(64, 70, dtype=torch.bool)
    others[at] = False
    assert torch.equal(spoiled[others], clean[others])
    assert not torch.isfinite(spoiled[at]), "the parameter shows what happened"
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(spoiled_state[slot], clean_state[slot])
        assert spoiled_state[slot][at] == 0


def test_in_32_bits_a_bad_element_stays_bad_and_spoils_no_other() -> None:
    params = make_params(((64, 70),), torch.float32)
    optimizer = build("adamw", params)
    for step, grads in enumerate(gradients(3, ((64, 70),), torch.float32)):
        if step == 1:
            grads[0][5, 6] = float("nan")
        apply(optimizer, params, grads, step)
    for value in (params[0], optimizer.state[params[0]]["exp_avg"], optimizer.state[params[0]]["exp_avg_sq"]):
        assert value.isnan().sum() == 1
        assert value[5, 6].isnan()
