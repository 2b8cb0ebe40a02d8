"""What must hold for every optimizer of the registry on every engine that serves it, whatever its update.

The engines are the reference, the blocked and, where there is a compiler, the compiled one. The Triton engine has no
float64, in which laws are stated; `tests/engines/test_triton.py` holds it to the reference.
"""

from __future__ import annotations

import copy
import functools
import io
import itertools
import pickle
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim import engines, storage
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.errors import OptionError
from lightning_optim.language.options import Option
from lightning_optim.reports.memory import predicted_memory, state_memory
from lightning_optim.storage import Quantized
from tests.harness import problems
from tests.harness.problems import NAMES, SHAPES, apply, flat, gradients, make_params

MIRRORED = [name for name in NAMES if not OPTIMIZERS[name].inputs]  # a loss below its target has no mirror image
UNQUANTIZED = [name for name in NAMES if not any(storage.can_be_quantized(s) for s in OPTIMIZERS[name].slots.values())]
LARGE = (70, 61)  # enough elements for codes, and no whole number of blocks
Build = Callable[..., Optimizer]
Trajectory = Callable[..., Tensor]


def serves(engine: str, name: str) -> bool:
    """Whether an engine runs the update of an optimizer on this machine."""
    params = make_params(((3, 4),))
    return not engines.ENGINES[engine].refusal(problems.build(name, params).first_programs(), params)


REFERENCE = [(name, "reference") for name in NAMES]
FAST = [(name, engine) for name in NAMES for engine in ("blocked", "compiled") if serves(engine, name)]
ALL = (*REFERENCE, *FAST)


def cases(
    where: Callable[[str], bool] = lambda name: True, chosen: Sequence[tuple[str, str]] = ALL
) -> pytest.MarkDecorator:
    """Optimizers, each on each engine. `make quick` leaves out what is marked as of a fast engine."""
    rows = []
    for name, engine in chosen:
        marks = () if engine == "reference" else (pytest.mark.engines,)
        rows += [pytest.param(name, engine, marks=marks, id=f"{name}-{engine}")] if where(name) else []
    return pytest.mark.parametrize(("name", "engine"), rows)


every_optimizer = cases()


@pytest.fixture
def build(engine: str) -> Build:
    """Makes an optimizer that runs on the engine of the case."""
    return functools.partial(problems.build, engine=engine)


@pytest.fixture
def trajectory(engine: str) -> Trajectory:
    return functools.partial(problems.trajectory, engine=engine)


def run(optimizer: Optimizer, params: Sequence[Tensor], steps: int, skip: int = 0) -> None:
    for step, grads in enumerate(gradients(skip + steps, [tuple(p.shape) for p in params], params[0].dtype)):
        if step >= skip:
            apply(optimizer, params, grads, step)


@cases(lambda name: name in MIRRORED)
def test_maximize_mirrors(name: str, build: Build) -> None:
    """Walking up -f is walking down f, bit for bit."""
    params, mirrored = make_params(), make_params()
    down, up = build(name, params, weight_decay=0.1), build(name, mirrored, weight_decay=0.1, maximize=True)
    for grads in gradients(7):
        apply(down, params, grads)
        apply(up, mirrored, [-grad for grad in grads])
    assert torch.equal(flat(params), flat(mirrored))


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MIRRORED])
def test_maximize_is_refused_where_it_has_no_meaning(name: str) -> None:
    with pytest.raises(ValueError, match="maximize"):
        problems.build(name, make_params(), maximize=True)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state_bits", [32, 16, 8])
def test_save_load_continue_is_continue(name: str, build: Build, dtype: torch.dtype, state_bits: int) -> None:
    """Through a file without pickle, into an optimizer with other settings: bit for bit, codes included."""
    if state_bits == 8 and name in UNQUANTIZED:
        pytest.skip("it has no state to keep in 8 bits, and says so")
    params = make_params((*SHAPES, LARGE, (4100,)) if state_bits == 8 else SHAPES, dtype=dtype)
    optimizer = build(name, params, weight_decay=0.1, state_bits=state_bits)
    run(optimizer, params, 5)
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    run(optimizer, params, 5, skip=5)

    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved["params"]]
    other = build(name, resumed, lr=0.5, weight_decay=0.3, state_bits=state_bits)
    other.load_state_dict(saved["optimizer"])
    run(other, resumed, 5, skip=5)
    assert torch.equal(flat(params), flat(resumed))
    for p, q in zip(params, resumed, strict=True):
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert same(value, other.state[q][key])
    quantized = [
        value for state in optimizer.state.values() for value in state.values() if isinstance(value, Quantized)
    ]
    assert bool(quantized) == (state_bits == 8 and dtype != torch.float64)


def same(value: Any, other: Any) -> bool:
    """Whether two slots are kept alike and hold the same bits."""
    if isinstance(value, Quantized):
        return torch.equal(value.codes, other.codes) and torch.equal(value.scales, other.scales)
    return value.dtype == other.dtype and torch.equal(value, other)


@pytest.mark.parametrize("name", UNQUANTIZED)
def test_eight_bits_are_refused_where_there_is_nothing_to_keep_in_them(name: str) -> None:
    with pytest.raises(OptionError, match="state_bits=8 has nothing to keep"):
        problems.build(name, make_params(), state_bits=8)


@cases(lambda name: name not in UNQUANTIZED, [case for case in FAST if case[1] == "blocked"])
@pytest.mark.parametrize("state_format", ["log", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_engines_agree_on_codes(name: str, engine: str, state_format: str, dtype: torch.dtype) -> None:
    """Blocks of elements and whole tensors end in the same codes, bit for bit, on these numbers."""
    ends = []
    for each in ("reference", engine):
        params = make_params((LARGE, (300, 150)), dtype)
        optimizer = problems.build(name, params, state_bits=8, state_format=state_format, engine=each)
        run(optimizer, params, 4)
        ends.append((params, [value for p in params for value in optimizer.state[p].values()]))
    (params, slots), (others, other_slots) = ends
    assert torch.equal(flat(params), flat(others))
    assert all(same(value, other) for value, other in zip(slots, other_slots, strict=True))


@every_optimizer
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_continue_alike(name: str, build: Build, duplicate: Any) -> None:
    params = make_params()
    optimizer = build(name, params)
    run(optimizer, params, 3)
    twin_params, twin = duplicate((params, optimizer))
    run(optimizer, params, 3, skip=3)
    run(twin, twin_params, 3, skip=3)
    assert torch.equal(flat(params), flat(twin_params))


@cases(chosen=FAST)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-11), (torch.float32, 2e-6), (torch.bfloat16, 0.0), (torch.float16, 0.0)],
)
def test_engines_agree(name: str, engine: str, dtype: torch.dtype, tolerance: float) -> None:
    """A fast engine computes in blocks what the reference computes at once.

    Both do the same operations on the same numbers, so only sums over a tensor can differ, by their order; KOALA's
    recursion multiplies such a difference of 1e-16 by 1e4 in eight steps. In half precision the difference would have
    to cross a rounding boundary, and does not on these numbers.
    """
    eps = OPTIMIZERS[name].options.get("eps")
    options: dict[str, Any] = {"eps": 1e-3} if eps and eps.type is float else {}
    reference = problems.trajectory(name, dtype=dtype, engine="reference", **options)
    fast = problems.trajectory(name, dtype=dtype, engine=engine, **options)
    assert torch.isfinite(reference).all()
    torch.testing.assert_close(fast, reference, rtol=tolerance, atol=tolerance)


@every_optimizer
def test_two_groups_equal_one(name: str, build: Build) -> None:
    params, split = make_params(), make_params()
    one, two = build(name, params), build(name, [{"params": split[:2]}, {"params": split[2:]}])
    run(one, params, 6)
    run(two, split, 6)
    torch.testing.assert_close(flat(split), flat(params), rtol=1e-13, atol=1e-13)


@every_optimizer
def test_order_of_parameters_does_not_matter(name: str, build: Build) -> None:
    params, turned = make_params(), make_params()
    one, other = build(name, params), build(name, turned[::-1])
    for step, grads in enumerate(gradients(6)):
        apply(one, params, grads, step)
        apply(other, turned, grads, step)
    torch.testing.assert_close(flat(turned), flat(params), rtol=1e-13, atol=1e-13)


@every_optimizer
def test_rate_zero_moves_nothing(name: str, build: Build) -> None:
    params, before = make_params(), flat(make_params())
    run(build(name, params, lr=0.0, weight_decay=0.1), params, 4)
    assert torch.equal(flat(params), before)


def alternatives(option: Option) -> Iterator[Any]:
    """Some other values that an option can take."""
    kinds = [option.type]
    if typing.get_origin(option.type) in (typing.Union, types.UnionType):
        kinds = list(typing.get_args(option.type))
    for kind in kinds:
        args = typing.get_args(kind)
        if kind is bool:
            yield from (value for value in (True, False) if value is not option.default)
        elif typing.get_origin(kind) is typing.Literal:
            yield from (arg for arg in args if arg != option.default)
        elif kind is float:
            yield from (value for value in (0.3, 0.05, 2.5, 4.5, -0.5) if value != option.default)
        elif kind is int:
            yield from (3, 5)
        elif typing.get_origin(kind) is tuple:
            yield (0.5,) * len(args)
            if isinstance(option.default, tuple):
                yield from ((*option.default[:i], 0.4, *option.default[i + 1 :]) for i in range(len(args)))


def reacts(trajectory: Callable[..., Tensor], option: Option, contexts: list[dict[str, Any]]) -> bool:
    """Whether some value of the option, in some company of one other option, changes the iterates."""
    for context in contexts:
        try:
            plain = trajectory(**context)
        except ValueError:
            continue
        for value in alternatives(option):
            try:
                changed = trajectory(**{**context, option.name: value})
            except ValueError:
                continue  # out of its range, or a combination that is refused
            if not torch.equal(plain, changed):
                return True
    return False


@every_optimizer
def test_every_option_changes_the_iterates(name: str, trajectory: Trajectory) -> None:
    options = OPTIMIZERS[name].options
    storage_and_caution = {"state_bits", "state_format", "cautious", "cautious_decay"}  # which have tests of their own
    skipped = {"engine", "capturable", "owners", *storage_and_caution, *OPTIMIZERS[name].refuses}
    skipped |= {*OPTIMIZERS[name].matrix_options} - {"matrix"}  # which fit no shape here
    own = [option for option in options.values() if option.name not in skipped]
    contexts = [{}, *({other.name: value} for other in own for value in alternatives(other))]
    pairs = [{**a, **b} for a, b in itertools.combinations(contexts[1:], 2) if a.keys() != b.keys()]
    run_it = functools.partial(trajectory, name)
    dead = [o.name for o in own if not reacts(run_it, o, contexts) and not reacts(run_it, o, pairs)]
    assert not dead


@every_optimizer
def test_fewer_state_bits_are_kept_and_change_the_iterates_little(name: str, build: Build) -> None:
    """state_bits=16 keeps bfloat16 where a slot may be rounded, and float32 where it must be exact."""
    params = make_params(dtype=torch.float32)
    optimizer = build(name, params, state_bits=16)
    run(optimizer, params, 8)
    for p in params:
        for key, value in optimizer.state[p].items():
            slot = optimizer.slots.get(key)
            if slot is not None and slot.per == "element":
                assert value.dtype == (torch.float32 if slot.exact else torch.bfloat16)
    exact = make_params(dtype=torch.float32)
    run(build(name, exact), exact, 8)
    torch.testing.assert_close(flat(params), flat(exact), rtol=0.05, atol=0.05)


@every_optimizer
def test_16_bits_round_what_is_written_and_do_nothing_else(name: str, build: Build) -> None:
    """Bit for bit a run with state in float32, whose roundable slots are rounded by hand each time they are written."""
    params, others = make_params(dtype=torch.float32), make_params(dtype=torch.float32)
    optimizer, other = build(name, params, state_bits=16), build(name, others, state_bits=32)

    def round_by_hand() -> None:
        for q in others:
            slots = {key: other.slot(key, 0, q) for key in other.slots.keys() & other.state[q].keys()}
            for key in (key for key, slot in slots.items() if slot.per == "element" and not slot.exact):
                other.state[q][key].copy_(other.state[q][key].bfloat16())

    def closure(step: int, grads: list[Tensor]) -> float:
        round_by_hand()  # what a prediction has written
        for q, grad in zip(others, grads, strict=True):
            q.grad = grad
        if other.inputs:
            other.set_loss(*problems.loss_of(step))
        return 0.0

    for step, grads in enumerate(gradients(8, dtype=torch.float32)):
        apply(optimizer, params, grads, step)
        other.step(functools.partial(closure, step, grads))
        round_by_hand()
        assert torch.equal(flat(params), flat(others))
        for p, q in zip(params, others, strict=True):
            assert optimizer.state[p].keys() == other.state[q].keys()
            for key, value in optimizer.state[p].items():
                assert torch.equal(value.to(other.state[q][key].dtype), other.state[q][key]), key


@every_optimizer
def test_a_scheduler_takes_effect(name: str, build: Build) -> None:
    """A run under LambdaLR is the run in which the rate is set by hand, and no other."""
    scheduled, by_hand = make_params(), make_params()
    optimizer, manual = build(name, scheduled, lr=0.02), build(name, by_hand, lr=0.02)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for step, grads in enumerate(gradients(6)):
        apply(optimizer, scheduled, grads, step)
        scheduler.step()
        manual.param_groups[0]["lr"] = 0.02 * 0.5**step
        apply(manual, by_hand, grads, step)
    assert torch.equal(flat(scheduled), flat(by_hand))
    constant = make_params()
    run(build(name, constant, lr=0.02), constant, 6)
    assert not torch.equal(flat(constant), flat(scheduled))


@every_optimizer
def test_a_rate_in_a_tensor_is_a_rate(name: str, build: Build) -> None:
    rate = torch.tensor(0.02, dtype=torch.float64)
    params, plain = make_params(), make_params()
    optimizer, other = build(name, params, lr=rate), build(name, plain, lr=0.02)
    run(optimizer, params, 2)
    run(other, plain, 2)
    assert torch.equal(flat(params), flat(plain))
    rate.fill_(0.0)
    before = flat(params)
    run(optimizer, params, 2)
    still = flat(params)
    carried_on = name in ("koala_m", "lars") or optimizer.own_average  # by a velocity, or to the average
    assert torch.equal(before, still) or carried_on


@every_optimizer
def test_a_tensor_without_gradient_keeps_everything(name: str, build: Build) -> None:
    """Its values, its slots and its counter; and it goes on as if the step had not been."""
    if OPTIMIZERS[name].predicts():
        pytest.skip("its velocity moves every parameter before the gradient is taken")
    params, alone = make_params(SHAPES[1:4]), make_params(SHAPES[1:4])
    optimizer, lonely = build(name, params), build(name, alone[:1])
    steps = list(gradients(6, SHAPES[1:4]))
    shares_state = any(slot.per == "optimizer" for slot in optimizer.slots.values())
    for step, grads in enumerate(steps):
        missing = step % 2 == 1
        before = flat(params[:1])
        state = copy.deepcopy(optimizer.state[params[0]])
        apply(optimizer, params, [None if missing else grads[0], *grads[1:]], step)
        if missing:
            assert torch.equal(flat(params[:1]), before)
            assert all(torch.equal(value, optimizer.state[params[0]][key]) for key, value in state.items())
        else:
            apply(lonely, alone[:1], grads[:1], step)
    assert int(optimizer.state[params[0]]["step"]) == 3
    assert int(optimizer.state[params[1]]["step"]) == 6
    if not shares_state and name not in ("lamb", "lars"):  # those adapt vectors only where all are vectors
        torch.testing.assert_close(flat(params[:1]), flat(alone[:1]), rtol=1e-13, atol=1e-13)


@every_optimizer
def test_no_gradient_at_all_moves_nothing(name: str, build: Build) -> None:
    params = make_params()
    optimizer = build(name, params)
    before = flat(params)
    apply(optimizer, params, [None] * len(params))
    assert torch.equal(flat(params), before)
    assert all("step" not in state or int(state["step"]) == 0 for state in optimizer.state.values())


@every_optimizer
def test_gradients_are_left_alone(name: str, build: Build) -> None:
    options: dict[str, Any] = {"max_grad_norm": 0.1} if "max_grad_norm" in OPTIMIZERS[name].options else {}
    params = make_params()
    optimizer = build(name, params, weight_decay=0.1, **options)
    for step, grads in enumerate(gradients(3)):
        apply(optimizer, params, grads, step)
        assert all(p.grad is not None and torch.equal(p.grad, g) for p, g in zip(params, grads, strict=True))


@every_optimizer
def test_strides_do_not_matter(name: str, build: Build) -> None:
    """A transposed parameter, and a gradient laid out otherwise, give what contiguous ones give."""
    shapes = ((4, 6), (6, 4))
    params = make_params(shapes)
    turned = [torch.nn.Parameter(p.detach().t().contiguous().t()) for p in params]
    assert not turned[0].is_contiguous()
    optimizer, other = build(name, params), build(name, turned)
    for step, grads in enumerate(gradients(5, shapes)):
        apply(optimizer, params, grads, step)
        apply(other, turned, [grads[0], grads[1].t().contiguous().t()], step)
    torch.testing.assert_close(flat(turned), flat(params), rtol=1e-13, atol=1e-13)


@every_optimizer
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(name: str, build: Build, dtype: torch.dtype) -> None:
    """One step on half-precision parameters is one float32 step on the same numbers, rounded at the end."""
    if name == "adafactor":
        pytest.skip("its eps is the parameter's type's, so the two differ by design")
    shapes = ((64,), (8, 16))
    half = make_params(shapes, dtype)
    full = [torch.nn.Parameter(p.detach().float()) for p in half]
    grads = next(gradients(1, shapes, dtype))
    apply(build(name, half), half, grads)
    apply(build(name, full), full, [grad.float() for grad in grads])
    assert torch.equal(flat(half), flat(full).to(dtype))


@every_optimizer
def test_predicted_memory_is_the_memory(name: str, build: Build) -> None:
    for bits in (32, 16) if name in UNQUANTIZED else (32, 16, 8):
        options: dict[str, Any] = {"state_bits": bits}
        params = make_params((*SHAPES, LARGE), dtype=torch.float32)
        optimizer = build(name, params, **options)
        predicted = predicted_memory(optimizer)
        run(optimizer, params, 2)
        shared = {slot for slot, kind in optimizer.slots.items() if kind.per == "optimizer"}
        actual = [entry for entry in state_memory(optimizer) if entry.slot not in shared]
        assert sorted(actual, key=str) == sorted((e for e in predicted if e.slot not in shared), key=str)


@every_optimizer
def test_a_group_can_join_later(name: str, build: Build) -> None:
    params = make_params()
    optimizer = build(name, params[:3], **problems.moving(name))
    run(optimizer, params[:3], 2)
    rate = 0.01 if name == "prodigy" else 0.001  # it has one for all
    optimizer.add_param_group({"params": params[3:], "lr": rate})
    before = flat(params[3:])
    run(optimizer, params, 2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, rate]
    assert not torch.equal(flat(params[3:]), before)


@every_optimizer
def test_reset_forgets(name: str, build: Build) -> None:
    params, fresh = make_params(), make_params()
    optimizer = build(name, params)
    run(optimizer, params, 4)
    optimizer.reset()
    with torch.no_grad():
        for p, q in zip(params, fresh, strict=True):
            p.copy_(q)
    run(optimizer, params, 3)
    run(build(name, fresh), fresh, 3)
    assert torch.equal(flat(params), flat(fresh))


def elementwise(name: str) -> bool:
    program = problems.build(name, make_params(((3, 4),))).first_programs()[0]
    return not program.reductions and program.elementwise and not program.needs


@every_optimizer
def test_a_concatenation_is_its_parts_where_the_update_is_elementwise(name: str, build: Build) -> None:
    """And is not where the update sums over a tensor or takes means along an axis."""
    shapes = ((3, 4), (2, 4))
    parts = make_params(shapes)
    whole = [torch.nn.Parameter(torch.cat([p.detach() for p in parts]))]
    optimizer, other = build(name, parts), build(name, whole)
    for step, grads in enumerate(gradients(5, shapes)):
        apply(optimizer, parts, grads, step)
        apply(other, whole, [torch.cat(grads)], step)
    same = torch.allclose(flat(parts), flat(whole), rtol=1e-12, atol=1e-12)
    over_all = name in ("scalar_rmsprop", "moment_estimation_sgd", "prodigy")  # one sum over everything sees no seams
    assert same == (elementwise(name) or over_all)


NEEDS = {
    "adafactor": ("norm of each tensor", "row and column means"),
    "koala_m": ("loss", "norm of each tensor", "norm of all tensors"),
    "koala_v": ("loss", "norm of each tensor", "norm of all tensors"),
    "lamb": ("norm of each tensor",),
    "lars": ("norm of each tensor",),
    "mars": ("norm of each tensor",),
    "moment_estimation_sgd": ("norm of all tensors",),
    "prodigy": ("norm of all tensors",),
    "muon": ("whole matrix",),
    "scalar_rmsprop": ("norm of all tensors",),
    "soap": ("whole matrix",),
}


def test_needs_are_these() -> None:
    """What each update needs beyond one element, read off it; a change here is a change of cost at scale."""
    found = {}
    for name in NAMES:
        params = make_params(((3, 4),))
        needs = problems.build(name, params).first_programs()[0].needs
        if needs:
            found[name] = tuple(sorted(needs))
    assert found == {name: tuple(sorted(needs)) for name, needs in NEEDS.items()}
