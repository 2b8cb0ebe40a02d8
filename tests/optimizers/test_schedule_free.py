"""Schedule-Free: worked numbers, both forms of the recursion, modes of the optimizer, and files of its authors."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_optim import OptionError, ScheduleFreeAdamW, ScheduleFreeRAdam, ScheduleFreeSGD
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.stages import Average, Lookahead
from tests.harness.engines import quantizes, serving
from tests.harness.problems import apply, build, flat, gradients, make_params
from tests.harness.worked_numbers import GRADIENTS, START, read
from tests.optimizers.settings import SETS
from tests.oracles import ORACLES

NAMES = [name for name, cls in OPTIMIZERS.items() if cls.evaluates()]
LRS = [0.02, 0.05, 0.05, 0.03, 0.01]
WORKED = [
    pytest.param(
        "schedule_free_adamw",
        {"lr": 0.05, "weight_decay": 0.1, "warmup_steps": 3},
        None,
        """
        t=1 y A [-0.016666665942, 0.282833335185, -0.286216665556, -0.871850002083, -0.46591666626, -1.00501666638]
        t=1 y v [-0.0665833327381, 0.0931500003086, -1.51078333611]
        t=5 y A [0.0166883473559, 0.397649392387, -0.415035488587, -0.871515858828, -0.506569347926, -1.09799677404]
        t=5 y B [0.197146438564, 1.35015899642, -0.466282468973, -0.513070312052, 0.616674558054, 0.387830809486]
        t=5 y C [0.164303935323, -1.04880672305, -0.118791184558, 0.811576319216, -1.16287695886, -0.468934637843,
        -1.76599256921, -1.14699360892, -1.82616896013, -0.364150618838, -1.35826521361, 0.316362756745, 0.17002546435,
        -0.0788414121487, -2.62729140088, -0.473174737339]
        t=5 y v [-0.0559516783248, -0.0106723356178, -1.45815819858]
        t=5 x A [0.0171563654818, 0.39717624899, -0.411296523568, -0.873019055062, -0.498923272377, -1.09311712197]
        t=5 x v [-0.0563864724322, -0.00328652363873, -1.45366677744]
        """,
        id="schedule_free_adamw",
    ),
    pytest.param(
        "schedule_free_adamw",
        {},
        LRS,
        """
        t=1 y A [-0.0199999991304, 0.280000002222, -0.289999998667, -0.8700000025, -0.469999999512, -1.00999999966]
        t=1 y v [-0.0699999992857, 0.0900000003704, -1.51000000333]
        t=5 y A [0.0219514421975, 0.411363222084, -0.416542029067, -0.914759184355, -0.468079124769, -1.0981463237]
        t=5 y B [0.181114356174, 1.40635278924, -0.477606708215, -0.552073544841, 0.625402836383, 0.427787893572]
        t=5 y C [0.119486806277, -1.03968386737, -0.118268916019, 0.820632834166, -1.1954152368, -0.493244498518,
        -1.7957071822, -1.15875336494, -1.82976525341, -0.340037393518, -1.34195705829, 0.286149376941, 0.199512587901,
        -0.108608979603, -2.64763388896, -0.50298972558]
        t=5 y v [-0.067959193378, 0.0146328832873, -1.43243384622]
        t=5 x A [0.0216967573176, 0.40842635314, -0.412460161771, -0.916300856729, -0.465280233503, -1.09468625639]
        t=5 x v [-0.0683074100868, 0.0182484288423, -1.43207664201]
        """,
        id="schedule_free_adamw_moving_lr",
    ),
    pytest.param(
        "schedule_free_sgd",
        {"lr": 0.5, "weight_decay": 0.1},
        None,
        """
        t=1 y A [-0.115, 0.24, -0.3315, -0.8055, -0.6325, -1.2355]
        t=1 y v [-0.1875, -0.1655, -1.4235]
        t=5 y A [-0.0553230206769, 0.602766072068, -0.620149212466, -0.801532798663, -0.641204552567, -1.5298251325]
        t=5 y B [0.763201357052, 1.27427880894, -0.378309597138, -0.275645401894, 0.991906551226, 0.612457966445]
        t=5 y C [0.195394504161, -1.20762037468, -0.402051693714, 1.44196684796, -0.402525839642, -0.419816491792,
        -0.555798309229, -0.939303903651, -1.3295295221, -0.930472475393, -1.39837106101, 0.347575070449,
        0.309492392292, 0.00441797012994, -2.93148967726, -0.0678420185023]
        t=5 y v [-0.168294537698, -0.483624383808, -1.20637860075]
        t=5 x A [-0.0559929495906, 0.590608990763, -0.601656536315, -0.812306863242, -0.61537077728, -1.50467245349]
        t=5 x v [-0.171435837195, -0.446525716917, -1.21239416866]
        """,
        id="schedule_free_sgd",
    ),
    pytest.param(
        "schedule_free_radam",
        {"lr": 0.05, "weight_decay": 0.1},
        None,
        """
        t=1 y A [0, 0.3, -0.27, -0.89, -0.45, -0.99]
        t=1 y v [-0.05, 0.11, -1.53]
        t=8 y A [0.00421823229412, 0.297735243415, -0.27151645462, -0.88956691054, -0.453985229222, -0.993410501808]
        t=8 y B [0.0628217023501, 1.33895674225, -0.48431210629, -0.616476855901, 0.494618641713, 0.362599999391]
        t=8 y C [0.111237476511, -0.935044753514, -0.0320128647227, 0.702817890701, -1.33582634234, -0.461856105415,
        -1.89536106868, -1.28570856878, -1.84009869359, -0.2428296523, -1.26996825279, 0.270575552342, 0.162220043971,
        -0.188720885363, -2.52303822707, -0.537570826542]
        t=8 y v [-0.0462369217341, 0.109480221231, -1.52854409489]
        t=8 x A [0.00400889354714, 0.297921484271, -0.271427306887, -0.889607764173, -0.453919913349, -0.993263145827]
        t=8 x v [-0.046390173532, 0.109407610572, -1.52885841339]
        """,
        id="schedule_free_radam",
    ),
]


@pytest.mark.parametrize("engine", ["reference", pytest.param("auto", marks=pytest.mark.engines)])
@pytest.mark.parametrize(("name", "options", "lrs", "printed"), WORKED)
def test_worked_numbers(name: str, options: dict[str, Any], lrs: list[float] | None, printed: str, engine: str) -> None:
    """The points of gradients y, and the averages x, which `eval()` puts into the parameters."""
    expected = re.findall(r"t=(\d+) ([xy]) (\w \[[^\]]*\])", printed)
    params = {key: nn.Parameter(torch.tensor(START[key])) for key in "ABCv"}
    optimizer = OPTIMIZERS[name](list(params.values()), engine=engine, **options)
    for t in range(1, 1 + max(int(when) for when, *_ in expected)):
        for key, p in params.items():
            p.grad = torch.tensor(GRADIENTS[(t - 1) % len(GRADIENTS)][key])
        if lrs is not None:
            optimizer.param_groups[0]["lr"] = lrs[t - 1]
        optimizer.step()
        for when, which, text in expected:
            if int(when) == t:
                optimizer.eval() if which == "x" else optimizer.train()
                np.testing.assert_allclose(params[text[0]].detach(), read(text)[text[0]], rtol=6e-12, atol=1e-15)
        optimizer.train()


@pytest.mark.parametrize("engine", ["reference", pytest.param("auto", marks=pytest.mark.engines)])
@pytest.mark.parametrize(("name", "options"), [(name, options) for name in NAMES for options in ({}, *SETS[name])])
def test_both_forms_of_the_recursion_agree_on_y_and_x(name: str, options: dict[str, Any], engine: str) -> None:
    """50 steps with x, y and z in memory, on tensors of every kind; the package keeps z and the parameter."""
    rng = np.random.default_rng(3)
    shapes = ((), (5,), (6, 2), (2, 6), (4, 4), (3, 2, 2), (2, 3, 2, 2))
    start = [rng.normal(size=shape) for shape in shapes]
    steps = [[np.asarray(rng.normal(size=shape)) for shape in shapes] for _ in range(50)]
    params = [nn.Parameter(torch.tensor(value)) for value in start]
    optimizer = OPTIMIZERS[name](params, engine=engine, **options)
    for grads in steps:
        for p, grad in zip(params, grads, strict=True):
            p.grad = torch.tensor(grad)
        optimizer.step()
    for p, y in zip(params, ORACLES[name](start, steps, **options)[-1], strict=True):
        np.testing.assert_allclose(p.detach(), y, rtol=0, atol=1e-10)
    optimizer.eval()
    for p, x in zip(params, ORACLES[name](start, steps, averages=True, **options)[-1], strict=True):
        np.testing.assert_allclose(p.detach(), x, rtol=0, atol=1e-10)


# ---------------------------------------------------------------- modes


def run(optimizer: Optimizer, params: Sequence[Tensor], steps: int, skip: int = 0) -> None:
    for step, grads in enumerate(gradients(skip + steps, [tuple(p.shape) for p in params], params[0].dtype)):
        if step >= skip:
            apply(optimizer, params, grads, step)


@pytest.mark.usefixtures("exact_roots", "torch_functions")
def test_triton_evaluates_as_the_reference_does() -> None:
    pytest.importorskip("triton")
    found = []
    for engine in ("reference", "triton"):
        params = make_params(((70, 61), (5,)), torch.float32)
        optimizer = build("schedule_free_adamw", params, engine=engine)
        run(optimizer, params, 4)
        optimizer.eval()
        found.append(flat(params))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [32, 8])
def test_what_is_evaluated_leaves_no_trace(name: str, engine: str, dtype: torch.dtype, bits: int) -> None:
    """Bit for bit, whatever is stored in which type; both modes may be asked for twice."""
    if bits == 8 and not quantizes(name):
        pytest.skip("it has nothing to keep in 8 bits")
    shapes = ((70, 61), (5,), (), (0,))
    params, others = make_params(shapes, dtype), make_params(shapes, dtype)
    one, other = (build(name, those, engine=engine, state_bits=bits, lr=0.1) for those in (params, others))
    for step in range(7):
        run(one, params, 1, skip=step)
        run(other, others, 1, skip=step)
        for _ in range(2):
            one.eval()
            one.eval()
            assert not one.is_training
            one.train()
            one.train()
        assert torch.equal(flat(params), flat(others))
        assert one.state[params[0]].keys() == other.state[others[0]].keys()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", [Average, Lookahead])
def test_weights_of_training_come_back_beside_a_stage(name: str, stage: Any) -> None:
    """Whose own slot `raw` begins as zeros, and not as the parameter."""
    params = make_params()
    optimizer = build(name, params)
    optimizer.append(stage())
    for grads in gradients(3):
        apply(optimizer, params, grads)
    before = flat(params)
    optimizer.eval()
    optimizer.train()
    assert torch.equal(flat(params), before)


@pytest.mark.parametrize("name", NAMES)
def test_a_step_in_evaluation_mode_is_refused(name: str) -> None:
    params = make_params()
    optimizer = build(name, params)
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"is in evaluation mode: .* Call train\(\) of the optimizer before"):
        run(optimizer, params, 1)
    assert not any(float(state["step"]) for state in optimizer.state.values())
    optimizer.train()
    run(optimizer, params, 1)


def test_other_optimizers_have_no_modes() -> None:
    params = make_params()
    optimizer = build("adamw", params)
    run(optimizer, params, 1)
    before = flat(params)
    optimizer.eval()
    assert optimizer.is_training
    assert torch.equal(flat(params), before)
    assert "train_mode" not in optimizer.param_groups[0]
    run(optimizer, params, 1, skip=1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("saved_in", ["train", "eval"])
@pytest.mark.parametrize("loaded_in", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_either_mode_goes_on_bit_for_bit(
    name: str, saved_in: str, loaded_in: str, dtype: torch.dtype
) -> None:
    params = make_params(dtype=dtype)
    optimizer = build(name, params, weight_decay=0.1)
    run(optimizer, params, 6)
    getattr(optimizer, saved_in)()
    file = io.BytesIO()
    torch.save({"params": params, "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    assert {group["train_mode"] for group in saved["optimizer"]["param_groups"]} == {saved_in == "train"}
    optimizer.train()
    run(optimizer, params, 3, skip=6)

    others = make_params(dtype=dtype)
    twin = build(name, others)
    run(twin, others, 2)
    getattr(twin, loaded_in)()
    with torch.no_grad():
        for p, value in zip(others, saved["params"], strict=True):
            p.copy_(value)
    twin.load_state_dict(saved["optimizer"])
    assert twin.is_training == (saved_in == "train")
    twin.train()
    run(twin, others, 3, skip=6)
    assert torch.equal(flat(params), flat(others))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_in_the_same_mode(name: str, duplicate: Any) -> None:
    params = make_params()
    optimizer = build(name, params)
    run(optimizer, params, 6)
    optimizer.eval()
    others, twin = duplicate((params, optimizer))
    assert not twin.is_training
    for one, those in ((optimizer, params), (twin, others)):
        one.train()
        run(one, those, 2, skip=6)
    assert torch.equal(flat(params), flat(others))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_in_evaluation_mode_without_the_points_of_training_goes_on_from_the_average(name: str) -> None:
    """As official files are, or one whose weights were changed by hand: y = beta x + (1 - beta) z."""
    params = make_params()
    optimizer = build(name, params, lr=0.1)
    run(optimizer, params, 6)
    trained = flat(params)
    optimizer.eval()
    saved = optimizer.state_dict()
    for state in saved["state"].values():
        state.pop("raw", None)
    others = [nn.Parameter(p.detach().clone()) for p in params]
    twin = build(name, others, lr=0.1)
    twin.load_state_dict(saved)
    twin.train()
    torch.testing.assert_close(flat(others), trained, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("through_a_file", [True, False])
def test_weights_that_were_changed_by_hand_go_on_from_what_they_are(name: str, through_a_file: bool) -> None:
    """y = beta x + (1 - beta) z of the new x; a tensor that nobody has written comes back bit for bit."""
    params = make_params()
    optimizer = build(name, params, lr=0.1)
    run(optimizer, params, 6)
    trained = [p.detach().clone() for p in params]
    optimizer.eval()
    if through_a_file:
        saved = optimizer.state_dict()
        params = [nn.Parameter(p.detach().clone()) for p in params]
        optimizer = build(name, params, lr=0.1)
        optimizer.load_state_dict(saved)
    with torch.no_grad():
        params[2].mul_(2.0)
        params[3].copy_(params[3].clone())  # the same values
    x = params[2].detach().clone()
    with pytest.warns(
        UserWarning, match=f"written 1 parameters of {type(optimizer).__name__} while they were its average"
    ):
        optimizer.train()
    torch.testing.assert_close(params[2].detach(), 0.9 * x + 0.1 * optimizer.state[params[2]]["z"], rtol=0, atol=1e-12)
    for i in (0, 1, 3, 4, 5):
        assert torch.equal(params[i].detach(), trained[i])
    assert not any("raw" in state for state in optimizer.state.values())


def test_a_parameter_without_a_gradient_is_its_own_average() -> None:
    first, second = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))
    optimizer = ScheduleFreeSGD([first, second])
    first.grad = torch.ones(3)
    optimizer.step()
    optimizer.eval()
    assert torch.equal(second, torch.ones(2))
    assert list(optimizer.state) == [first]


def test_a_group_that_joins_in_evaluation_mode_has_it() -> None:
    optimizer = ScheduleFreeSGD([nn.Parameter(torch.ones(3))])
    optimizer.eval()
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    assert [group["train_mode"] for group in optimizer.param_groups] == [False, False]


def test_a_failed_change_of_mode_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    params = make_params()
    optimizer = build("schedule_free_adamw", params)
    run(optimizer, params, 3)
    before = flat(params)

    def fail(*args: Any) -> None:
        params[0].data.fill_(7.0)  # a part is written
        raise MemoryError

    monkeypatch.setattr(optimizer._runner, "run", fail)
    with pytest.raises(MemoryError):
        optimizer.eval()
    assert optimizer.is_training
    assert torch.equal(flat(params), before)
    assert not any("raw" in state for state in optimizer.state.values())


class Writing(ScheduleFreeSGD, name="writing"):
    """A page whose `evaluate` writes a slot."""

    @staticmethod
    def evaluate(p: Any, s: Any, h: Any) -> Any:
        s.z = p
        return p


OPTIMIZERS.pop("writing")


def test_evaluate_may_write_no_slot() -> None:
    p = nn.Parameter(torch.ones(3))
    optimizer = Writing([p])
    p.grad = torch.ones(3)
    with pytest.raises(TypeError, match=r"Writing\.evaluate writes z, and may only read slots"):
        optimizer.step()
    assert torch.equal(p, torch.ones(3))


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda p: ScheduleFreeAdamW(p, betas=(0.0, 0.9)),
            r"betas=\(0.0, 0.9\) is out of range; allowed is \(\(0, 1\)",
        ),
        (lambda p: ScheduleFreeSGD(p, momentum=0.0), r"momentum=0.0 is out of range; allowed is \(0, 1\)"),
        (lambda p: ScheduleFreeSGD(p, state_bits=8), "state_bits=8 has nothing to keep in 8 bits"),
        (lambda p: ScheduleFreeRAdam(p, betas=(0.9, 0.5)), "forgets so fast that no step would ever be rectified"),
        (lambda p: ScheduleFreeAdamW(p, warmup_steps=-1), "warmup_steps=-1 is out of range"),
    ],
)
def test_bad_options(make: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        make([nn.Parameter(torch.ones(3))])


# ---------------------------------------------------------------- the program of its authors

AUTHORS: dict[str, tuple[str, dict[str, Any]]] = {
    "schedule_free_adamw": ("AdamWScheduleFree", {"weight_decay": 0.1, "warmup_steps": 5, "r": 1.0}),
    "schedule_free_sgd": ("SGDScheduleFree", {"lr": 0.5, "weight_decay": 0.1, "warmup_steps": 5}),
    "schedule_free_radam": ("RAdamScheduleFree", {"weight_decay": 0.1, "silent_sgd_phase": False}),
}


def official(name: str, options: dict[str, Any], params: Sequence[Tensor]) -> Any:
    module = pytest.importorskip("schedulefree")
    theirs = getattr(module, AUTHORS[name][0])(params, foreach=False, **options)
    theirs.train()
    return theirs


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moving", [False, True])
def test_agrees_with_the_program_of_its_authors(name: str, moving: bool) -> None:
    options: dict[str, Any] = {} if moving else AUTHORS[name][1]
    params, others = make_params(), make_params()
    ours, theirs = OPTIMIZERS[name](params, **options), official(name, options, others)
    for step, grads in enumerate(gradients(50)):
        if moving:
            ours.param_groups[0]["lr"] = theirs.param_groups[0]["lr"] = LRS[step % 5]
        for those, optimizer in ((params, ours), (others, theirs)):
            for p, grad in zip(those, grads, strict=True):
                p.grad = grad.clone()
            optimizer.step()
            optimizer.eval()
        torch.testing.assert_close(flat(params), flat(others), rtol=0, atol=5e-12)
        ours.train()
        theirs.train()
        torch.testing.assert_close(flat(params), flat(others), rtol=0, atol=5e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("training", [True, False])
def test_files_of_its_authors_load(name: str, training: bool) -> None:
    """Their counter and sums stand in the group; without the package, a file of the same form."""
    options = AUTHORS[name][1]
    others = make_params()
    theirs = official(name, options, others)
    for grads in gradients(7):
        for p, grad in zip(others, grads, strict=True):
            p.grad = grad.clone()
        theirs.step()
    if not training:
        theirs.eval()
    params = [nn.Parameter(p.detach().clone()) for p in others]
    ours = OPTIMIZERS[name](params)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    assert ours.is_training == training
    assert not {"k", "weight_sum", "lr_max", "scheduled_lr"} & ours.param_groups[0].keys()
    ours.train()
    theirs.train()
    for grads in gradients(5, seed=9):
        for p, q, grad in zip(params, others, grads, strict=True):
            p.grad, q.grad = grad.clone(), grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(flat(params), flat(others), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_a_momentum_that_cycles_is_said_once(name: str) -> None:
    """The average follows from the parameter by it."""
    params = make_params()
    optimizer = build(name, params)

    def run(cycles: bool) -> None:
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=20, cycle_momentum=cycles)
        for step, grads in enumerate(gradients(4)):
            apply(optimizer, params, grads, step)
            scheduler.step()

    run(cycles=False)
    with pytest.warns(UserWarning, match=f"(betas|momentum) of {type(optimizer).__name__} has changed") as said:
        run(cycles=True)
    assert len(said) == 1
    again = build(name, make_params())
    again.load_state_dict(optimizer.state_dict())  # with the momentum of now
    apply(again, again.param_groups[0]["params"], next(iter(gradients(1))), 0)
