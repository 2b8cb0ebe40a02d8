"""Every optimizer takes every kind of tensor that torch.optim takes, on every engine, or says why not.

What is served ends where a plain copy of the same values ends. What is refused leaves everything as it was.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_optim import SGDW, OptionError
from lightning_optim.core.foreign_stages import attach, on_gradients
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.distributed.clipping import clip_gradient_norm
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.engines import ENGINES
from lightning_optim.stages.average import Average
from lightning_optim.stages.noise import Noise
from tests.harness import problems
from tests.harness.engines import quantizes, serving
from tests.harness.kinds import REFUSED, SERVED, Kind, in_collective, minus, two, written_down
from tests.harness.problems import NAMES, gradients, make_params

pytestmark = [
    pytest.mark.usefixtures("quiet_interpreter", "one_process"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(scope="module")
def one_process() -> Iterator[None]:
    """A process group of this process alone, for collectives."""
    store: Any = dist
    dist.init_process_group("gloo", store=store.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Pair:
    """Tensors of several kinds in one optimizer, and plain copies of them in another.

    Args:
        name: The optimizer.
        kinds: The kinds, by what they are called.
        options: Options of both optimizers.
    """

    def __init__(self, name: str, kinds: dict[str, Kind], **options: Any) -> None:
        few = options.get("engine") == "triton"  # whose interpreter is slow
        rows = [(w, kind, shape) for w, kind in kinds.items() for shape in kind.shapes[: 1 if few else None]]
        self.name, self.options = name, options
        self.words = [f"{word} {shape}" for word, _, shape in rows]
        self.kinds, shapes = [kind for _, kind, _ in rows], [shape for *_, shape in rows]
        values = [
            self._of_kind(kind, p.detach())
            for kind, p in zip(self.kinds, make_params(shapes, torch.float32), strict=True)
        ]
        self.steps = [
            [self._of_kind(kind, grad) for kind, grad in zip(self.kinds, grads, strict=True)]
            for grads in gradients(4, shapes, torch.float32)
        ]
        self.params = [kind.parameter(x) for kind, x in zip(self.kinds, values, strict=True)]
        self.plain: list[Tensor] = [nn.Parameter(written_down(p), requires_grad=p.requires_grad) for p in self.params]
        self.optimizer, self.other = self.build(self.params), self.build(self.plain)

    @staticmethod
    def _of_kind(kind: Kind, x: Tensor) -> Tensor:
        return (torch.complex(x, x.flip(0)) if kind.dtype.is_complex else x).to(kind.dtype)

    def build(self, params: Sequence[Tensor]) -> Optimizer:
        return problems.build(self.name, list(params), **self.options)

    def step(self, k: int) -> None:
        grads = [
            None if kind.frozen else kind.grad(x.clone()) for kind, x in zip(self.kinds, self.steps[k], strict=True)
        ]
        copies = [None if grad is None else written_down(grad) for grad in grads]
        for optimizer, params, given in ((self.optimizer, self.params, grads), (self.other, self.plain, copies)):
            for p, grad in zip(params, given, strict=True):
                p.grad = grad
            if optimizer.inputs:
                optimizer.set_loss(*problems.loss_of(k))
            optimizer.step()
        for p, expected in zip(self.params, copies, strict=True):
            assert expected is None or (p.grad is not None and torch.equal(written_down(p.grad), expected))

    def resume(self) -> None:
        """Continue from the checkpoint of the plain run, and that one from the checkpoint of the other."""
        saved, of_plain = copy.deepcopy(self.optimizer.state_dict()), copy.deepcopy(self.other.state_dict())
        self.optimizer, self.other = self.build(self.params), self.build(self.plain)
        self.optimizer.load_state_dict(of_plain)
        self.other.load_state_dict(saved)

    def assert_equal(self, **closeness: Any) -> None:
        for word, p, q in zip(self.words, self.params, self.plain, strict=True):
            found, expected = self.optimizer.state[p], self.other.state[q]
            assert found.keys() == expected.keys(), word
            for key, a, b in [("p", p, q), *((key, found[key], expected[key]) for key in expected)]:
                a, b = written_down(a), written_down(b)
                torch.testing.assert_close(a, b, **closeness, msg=functools.partial("{}, {}: {}".format, word, key))


def exact(optimizer: Optimizer) -> bool:
    """Whether no program sums over elements: sums in another order may differ in the last places."""
    return all(not program.reductions and program.elementwise for program in optimizer.first_programs())


@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
def test_a_kind_ends_where_plain_tensors_end(name: str, engine: str) -> None:
    """Also where the two continue from each other's checkpoint: files know no order in memory."""
    kinds = {w: kind for w, kind in SERVED.items() if not (kind.dtype.is_complex and OPTIMIZERS[name].real_only)}
    pair = Pair(name, kinds, engine=engine)
    for k in range(4):
        pair.step(k)
        if k == 1:
            pair.resume()
    pair.assert_equal(**{"rtol": 0.0, "atol": 0.0} if exact(pair.other) else {"rtol": 2e-5, "atol": 1e-6})


@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
def test_what_is_refused_changes_nothing(name: str, engine: str) -> None:
    """Not the parameters and slots of others in the step, nor a counter."""
    for word, (kind, message) in REFUSED.items():
        shape = kind.shapes[0]
        (x,), (good,) = (
            [p.detach() for p in make_params((shape,), torch.float32)],
            make_params(((3,),), torch.float32),
        )
        if kind.dtype.is_complex:
            if OPTIMIZERS[name].real_only:
                continue
            x = torch.complex(x, x)
        if kind.param is not Kind.param:
            with pytest.raises(OptionError, match=message):
                problems.build(name, [good, kind.parameter(x)], engine=engine)
            optimizer = problems.build(name, [good], engine=engine)
            with pytest.raises(OptionError, match=message):
                optimizer.add_param_group({"params": [kind.parameter(x)]})
            assert len(optimizer.param_groups) == 1, word
            continue
        params = [good, nn.Parameter(x)]
        optimizer = problems.build(name, params, engine=engine)
        for steps in (0, 2):  # before there is state, and later
            for k in range(steps):
                problems.apply(optimizer, params, [torch.ones_like(p) for p in params], k)
            before, saved = problems.flat(params), copy.deepcopy(optimizer.state_dict())
            good.grad, params[1].grad = torch.ones_like(good), kind.grad(x)
            with pytest.raises(RuntimeError, match=message):
                optimizer.step()
            assert torch.equal(problems.flat(params), before), word
            assert str(optimizer.state_dict()) == str(saved), word


@pytest.mark.parametrize("engine", ["auto", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_a_wrapper_of_two_tensors_moves_as_two(name: str, engine: str) -> None:
    """A class that handles operations itself has no address; `auto` takes the reference, as torch's optimizers do."""
    (x,), steps = make_params(((6, 4),), torch.float32), list(gradients(3, ((6, 4),), torch.float32))
    wrapped, plain = nn.Parameter(two(x.detach().clone(), x.detach().clone())), nn.Parameter(x.detach().clone())
    optimizer, other = (problems.build(name, [p], engine=e) for p, e in ((wrapped, engine), (plain, "reference")))
    for k, (grad,) in enumerate(steps):
        for one, p, given in ((optimizer, wrapped, two(grad.clone(), grad.clone())), (other, plain, grad)):
            p.grad = given
            if one.inputs:
                one.set_loss(*problems.loss_of(k))
            one.step()
    both: Any = wrapped.detach()
    assert torch.equal(both.a, plain)
    assert torch.equal(both.b, plain)


@pytest.mark.parametrize("engine", [name for name in ENGINES if name != "reference"])
def test_engines_that_walk_over_memory_refuse_a_wrapper(engine: str) -> None:
    wrapped = nn.Parameter(two(torch.ones(3), torch.ones(3)))
    optimizer = problems.build("adamw", [wrapped], engine=engine)
    wrapped.grad = two(torch.ones(3), torch.ones(3))
    with pytest.raises(OptionError, match=r"TwoTensor, which is no memory of its own\. Use engine='auto'"):
        optimizer.step()


def test_state_that_was_made_in_inference_mode_can_be_written_outside() -> None:
    params, others = make_params(((6, 4),), torch.float32), make_params(((6, 4),), torch.float32)
    optimizer, other = problems.build("adamw", params), problems.build("adamw", others)
    for p in (*params, *others):
        p.grad = torch.ones_like(p)
    with torch.inference_mode():
        optimizer.step()
    for one in (other, other, optimizer):
        one.step()
    assert torch.equal(params[0], others[0])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int64, torch.int8, torch.bool])
@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
def test_few_bits_and_integers_are_not_trained(name: str, engine: str, dtype: torch.dtype) -> None:
    """They may be there, as the frozen weights of a quantized model are."""
    p, codes = nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(4, 3).to(dtype), requires_grad=False)
    optimizer = problems.build(name, [p, codes], engine=engine)
    if optimizer.predicts():
        pytest.skip("it moves all parameters before there are gradients")
    problems.apply(optimizer, [p], [torch.ones(4, 3)])
    before = p.detach().clone()
    codes.grad = torch.ones(4, 3).to(dtype)
    with pytest.raises(
        RuntimeError, match=rf"cannot train a parameter of shape \(4, 3\) in {str(dtype)[6:]}\. Train it"
    ):
        problems.apply(optimizer, [p], [torch.ones(4, 3)])
    assert torch.equal(p, before)
    assert optimizer.state[p]["step"] == 1
    codes.grad = None
    problems.apply(optimizer, [p], [torch.ones(4, 3)])
    assert optimizer.state[p]["step"] == 2
    assert torch.equal(codes.float(), torch.ones(4, 3))


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
def test_a_model_that_changes_its_dtype_in_training_takes_its_state_along(name: str, engine: str, bits: int) -> None:
    """In place, as `module.double()` does. It ends near the model that has not changed."""
    if (bits == 8 and not quantizes(name)) or engine == "triton":
        pytest.skip("it has no state to keep in 8 bits, or computes in float32")
    (p,), (q,) = (make_params(((64, 65),), torch.float32) for _ in range(2))
    optimizer, other = (problems.build(name, [x], engine=engine, state_bits=bits) for x in (p, q))
    for step, dtype in enumerate((torch.float32, torch.float64, torch.float32, torch.float64)):
        p.data = p.data.to(dtype)
        for one, x in ((optimizer, p), (other, q)):
            problems.apply(one, [x], list(gradients(step + 1, ((64, 65),), x.dtype))[-1], step)
    torch.testing.assert_close(p.float(), q, rtol=1e-4 if bits == 32 else 0.1, atol=1e-5 if bits == 32 else 0.02)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("bits", [32, 8])
def test_state_that_was_loaded_in_inference_mode_can_be_written_outside(bits: int, inside: bool) -> None:
    (p,) = make_params(((64, 65),), torch.float32)
    optimizer = problems.build("adamw", [p], state_bits=bits)
    p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.inference_mode(inside):
        found = copy.deepcopy(optimizer.state_dict())
    with torch.inference_mode():
        optimizer.load_state_dict(found)
    optimizer.step()
    assert optimizer.state[p]["step"] == 2


@pytest.mark.parametrize("dress", [written_down, minus, in_collective, lambda x: torch._efficientzerotensor(x.shape)])
def test_a_loss_may_be_lazy(dress: Any) -> None:
    params, others = make_params(((6, 4),), torch.float32), make_params(((6, 4),), torch.float32)
    loss = dress(torch.tensor(0.7))
    for one, given in ((params, loss), (others, float(written_down(loss)))):
        optimizer = problems.build("koala_v", one)
        one[0].grad = torch.ones_like(one[0])
        optimizer.set_loss(given, given)
        optimizer.step()
    assert torch.equal(params[0], others[0])


@pytest.mark.parametrize("word", [word for word, kind in SERVED.items() if kind.param is Kind.param])
@pytest.mark.parametrize("of_torch", [False, True])
def test_stages_and_clipping_take_what_gradients_there_are(word: str, of_torch: bool) -> None:
    """Noise that is written into gradients, clipping, and stages in the pass."""
    kind = SERVED[word]
    make: Any = torch.optim.SGD if of_torch else SGDW

    def run(grads: Any) -> list[Tensor]:
        params = [nn.Parameter(x.clone()) for x in values]
        optimizer = make(params, lr=0.1)
        indices = global_indices([(str(i), p) for i, p in enumerate(params)], optimizer)
        noise = Noise(indices, in_pass=False)
        attach(Average(), optimizer)
        before = on_gradients(noise, optimizer)
        for _ in range(2):
            for p, grad in zip(params, grads(), strict=True):
                p.grad = grad
            clip_gradient_norm(params, 0.5)
            before.run()
            optimizer.step()
        return [*params, *(optimizer.state[p]["average"] for p in params)]

    pair = Pair("sgdw", {word: kind})
    values, given = [p.detach() for p in pair.plain], pair.steps[0]
    found = run(lambda: [kind.grad(x.clone()) for x in given])
    expected = run(lambda: [written_down(kind.grad(x.clone())) for x in given])
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(written_down(a), written_down(b), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
def test_tensors_without_elements_keep_their_first_values(name: str, engine: str) -> None:
    """In any number of bits, and beside others; their files load."""
    for shapes in (((0,), (0, 5), (5, 0), (6, 0, 3)), ((0, 5), (3, 4), (5, 0), ())):
        for bits in (32, 16, 8) if quantizes(name) else (32, 16):
            params = make_params(shapes, torch.float32)
            optimizer = problems.build(name, params, engine=engine, state_bits=bits)
            steps = list(gradients(3, shapes, torch.float32))
            for k in (0, 1):
                problems.apply(optimizer, params, steps[k], k)
            for value in [x for state in optimizer.state.values() for x in state.values()]:
                assert value.isfinite().all()
            other = problems.build(name, params, engine=engine, state_bits=bits)
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            problems.apply(other, params, steps[2], 2)
            assert all(int(state["step"]) == 3 for state in other.state.values())


def test_a_file_with_means_of_no_elements_loads() -> None:
    """Earlier versions wrote them, as NaN, and refused them."""
    (p,) = make_params(((0, 5),), torch.float32)
    optimizer = problems.build("adafactor", [p])
    problems.apply(optimizer, [p], [torch.ones_like(p)])
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][0]["col_var"].fill_(torch.nan)
    optimizer.load_state_dict(saved)
    assert optimizer.state[p]["col_var"].tolist() == [[0.0] * 5]
