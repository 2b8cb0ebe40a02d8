"""GradInit against worked numbers, real steps of optimizers, and the run without it."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimizerStrategy, create_optimizer, list_optimizers
from lightning_optim.callbacks import GradInit, IterateAveraging
from lightning_optim.errors import OptionError
from lightning_optim.training.dry_run import joined
from lightning_optim.training.grad_init import ScaleSearch
from lightning_optim.training.trial_step import DIRECTIONS, along, norm_of, taken_by
from tests.harness.data import batches, samples, seeded_samples
from tests.harness.modules import Configured, Made, Make, Toy, vector
from tests.harness.nets import plain_net, seeded_net
from tests.harness.problems import moving
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import Run, trainer

# ---------------------------------------------------------------- the worked numbers


def fill(shape: Sequence[int], a: float, b: float, s: float) -> Tensor:
    """Element i is s * sin(a i + b)."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (s * torch.sin(a * i + b)).view(*shape)


def tiny() -> dict[str, Tensor]:
    return {
        "W1": fill((4, 3), 1.1, 0.3, 0.9),
        "b1": torch.zeros(4, dtype=torch.float64),
        "W2": fill((3, 4), 0.7, 1.7, 1.3),
        "b2": fill((3,), 2.3, 0.4, 0.2),
    }


def half(k: int) -> tuple[Tensor, Tensor]:
    return fill((2, 3), 1.3 + 0.17 * k, 0.5 + 0.31 * k, 1.5), torch.tensor([k % 3, (2 * k + 1) % 3])


def tiny_loss(theta: dict[str, Tensor], parts: Sequence[Any]) -> Tensor:
    x, y = joined(parts)
    hidden = torch.tanh(x @ theta["W1"].T + theta["b1"])
    return nn.functional.cross_entropy(hidden @ theta["W2"].T + theta["b2"], y)


def tiny_search(direction: str, eta: float, gamma: float, second_order: bool = False) -> ScaleSearch:
    return ScaleSearch(
        tiny(),
        tiny_loss,
        along(direction, eta),
        eta=eta,
        gamma=gamma,
        norm=DIRECTIONS[direction].norm,
        lr=0.05,
        clip=1.0,
        least={"W1": 0.01, "b1": 0.0, "W2": 0.01, "b2": 0.0},
        second_order=second_order,
    )


# Branch, loss, norm, loss after the trial step, and the scales of W1, W2 and b2, of the authors' program in float64.
Worked = list[tuple[str, float, float, float | None, tuple[float, float, float]]]
SGD: Worked = [
    ("objective", 0.956907653838, 0.805552873897, 0.928391217920, (1.049999999184, 1.049999999490, 0.950000000695)),
    ("objective", 1.161684552096, 0.848706866279, 1.477794389341, (1.035773024628, 1.046890915553, 0.899932115554)),
    ("constraint", 0.991822607322, 0.908651040923, None, (1.067339638473, 1.043186852108, 0.916151666378)),
    ("constraint", 1.199866119984, 1.938083484569, None, (1.073229524300, 1.010975376202, 0.923673932773)),
    ("objective", 1.158796361243, 0.832954085153, 1.108248387989, (1.085501620087, 0.990757155169, 0.909698402238)),
]
ADAM: Worked = [
    ("objective", 0.956907653838, 3.755996225178, 0.897285846435, (1.049999999500, 1.049999999500, 0.950000000500)),
    ("objective", 1.161684552146, 3.867360333631, 1.538452461736, (1.047368420579, 1.047368420579, 0.900000001000)),
    ("objective", 0.992148536618, 3.842095719065, 1.195966737632, (1.027257719673, 1.027257719673, 0.850000001500)),
    ("constraint", 1.103593323786, 8.142070756499, None, (0.997419171201, 0.977257720173, 0.880428461914)),
    ("constraint", 1.075295855221, 6.604940245029, None, (1.011982349212, 0.927257720673, 0.888825280033)),
]
PRINTED = 6e-13  # half a unit of the last printed digit, and rounding in float64


@pytest.mark.parametrize(
    ("direction", "eta", "gamma", "worked"), [("normalized_sgd", 0.1, 0.9, SGD), ("adam", 0.01, 4.0, ADAM)]
)
def test_the_worked_numbers(direction: str, eta: float, gamma: float, worked: Worked) -> None:
    search = tiny_search(direction, eta, gamma)
    halves = (half(k) for k in itertools.count())
    before = {name: p.clone() for name, p in tiny().items()}
    for branch, loss, norm, after, scales in worked:
        found = search.iterate(halves)
        assert found.branch == branch
        assert found.loss == pytest.approx(loss, abs=PRINTED)
        assert found.norm == pytest.approx(norm, abs=PRINTED)
        assert found.loss_after == (None if after is None else pytest.approx(after, abs=PRINTED))
        assert [search.scales[name] for name in ("W1", "W2", "b2")] == pytest.approx(scales, abs=PRINTED)
    assert "b1" not in search.scales  # of zeros
    assert all(torch.equal(search.first[name], p) for name, p in before.items())


@pytest.mark.parametrize(
    ("direction", "second_order", "expected"),
    [
        ("normalized_sgd", False, (0.966, 0.219, 0.567)),
        ("normalized_sgd", True, (1.041, 0.133, 0.280)),
    ],
)
def test_the_derivative_through_the_step(direction: str, second_order: bool, expected: Sequence[float]) -> None:
    search = tiny_search(direction, 0.1, 0.6, second_order)
    halves = (half(k) for k in itertools.count())
    for _ in range(20):
        search.iterate(halves)
    assert [round(search.scales[name], 3) for name in ("W1", "W2", "b2")] == list(expected)


def test_the_sign_has_no_derivative() -> None:
    scales = []
    for second_order in (False, True):
        search = tiny_search("adam", 0.01, 4.0, second_order)
        halves = (half(k) for k in itertools.count())
        for _ in range(20):
            search.iterate(halves)
        scales.append(search.scales)
    assert scales[0] == scales[1]


def tiny_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    for p, value in zip(net.parameters(), tiny().values(), strict=True):
        p.data.copy_(value)
    return net


class Tiny(Made):
    """The same net as a module, which returns a mapping."""

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], index: int) -> Any:
        return {"loss": super().training_step(batch, index)}


def still(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.0)


@pytest.mark.parametrize("cut", [True, False])
def test_the_callback_gets_the_worked_numbers(cut: bool) -> None:
    """The halves of the loader's batches are the half-batches; uncut, each batch is one."""
    if cut:
        data: Any = [[torch.cat(part) for part in zip(half(2 * k), half(2 * k + 1), strict=True)] for k in range(9)]
    else:
        data = [[*(part[:1] for part in half(0))]]
    module, callback = Tiny(still, tiny_net), GradInit(0.9, 5 if cut else 2, "normalized_sgd", lr=0.05, table=False)
    trainer(callback, max_steps=1).fit(module, DataLoader(data, batch_size=None))
    assert callback.alphas is not None
    names = ("net.0.weight", "net.2.weight", "net.2.bias")
    assert set(callback.alphas) == set(names)
    if cut:
        assert [callback.alphas[name] for name in names] == pytest.approx(SGD[-1][-1], abs=PRINTED)
        assert [found.loss for found in callback.history] == pytest.approx([row[1] for row in SGD], abs=PRINTED)
    for p, name, value in zip(module.parameters(), dict(module.named_parameters()), tiny().values(), strict=True):
        assert torch.equal(p, value * callback.alphas.get(name, 1.0))


# ---------------------------------------------------------------- whose step


def layers() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {
        n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in (("w", (6, 4)), ("b", (4,)), ("x", (3, 4)))
    }


TORCHS = [
    "SGD",
    "ASGD",
    "RAdam",
    "Adam",
    "AdamW",
    "NAdam",
    "Adamax",
    "Adagrad",
    "RMSprop",
    "Rprop",
    "Adadelta",
    "Adafactor",
]


def optimizer_named(name: str, params: list[nn.Parameter]) -> torch.optim.Optimizer:
    if name in TORCHS:
        made: torch.optim.Optimizer = getattr(torch.optim, name)(params, lr=0.02)
    else:
        made = OptimizerStrategy.parse({"name": name, **moving(name)}).create(params)
    return made


@pytest.mark.parametrize("name", [*list_optimizers(), *TORCHS])
@pytest.mark.filterwarnings("ignore:create_optimizer makes")
def test_the_trial_step_is_the_first_step(name: str) -> None:
    """By the optimizer's own code: a fresh one takes it on tensors with the same gradients."""
    params = layers()
    optimizer = optimizer_named(name, list(params.values()))
    rates = [0.5 * group["lr"] for group in optimizer.param_groups]
    theta = {n: p.detach() * 1.5 for n, p in params.items()}
    grads: dict[str, Tensor | None] = {n: torch.sin(3 * p) for n, p in theta.items()}
    grads["x"] = None
    moved = taken_by(optimizer, params, rates)(theta, grads, torch.tensor(2.5))
    others = [nn.Parameter(p.clone()) for p in theta.values()]
    for p, grad in zip(others, grads.values(), strict=True):
        p.grad = grad
    fresh = optimizer_named(name, others)
    for group in fresh.param_groups:
        group["lr"] *= 0.5
    fresh.step(lambda: 2.5)
    for p, mine in zip(others, moved.values(), strict=True):
        assert torch.equal(p, mine)
    assert torch.equal(moved["w"], theta["w"]) == (name in STILL)
    assert torch.equal(moved["x"], theta["x"])
    assert not any(float(state["step"]) for state in optimizer.state.values())  # Adagrad has one from the start
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(params.values(), layers().values(), strict=True))


STILL = ("adopt", "soap")  # whose first step only looks at the gradient
ALONG = "sgd sgdw lars pnm radam ranger moment_estimation_sgd scalar_rmsprop koala_v koala_m "
ALONG += "acprop adabelief padam gadamx schedule_free_sgd schedule_free_radam muon"


@pytest.mark.parametrize("name", [*list_optimizers(), *TORCHS])
@pytest.mark.filterwarnings("ignore:create_optimizer makes")
def test_the_norm_is_told_by_the_first_step(name: str) -> None:
    """RAdam, ACProp and AdaBelief begin without their second moment; Padam's exponent is nearer to SGD's.

    So is the nearest orthogonal matrix to a gradient nearer to it than its signs are.
    """
    params = layers()
    step = taken_by(optimizer_named(name, list(params.values())), params, [])
    if name in STILL:
        with pytest.raises(OptionError, match=r"that of .* moves nothing"):
            norm_of(step, params, name)
        return
    expected = 2 if name in (*ALONG.split(), "SGD", "ASGD", "RAdam") else 1
    assert norm_of(step, params, name) == expected


def test_the_norm_follows_the_options() -> None:
    params = layers()
    for rectify, norm in ((True, 2), (False, 1)):
        optimizer = create_optimizer({"name": "adabelief", "rectify": rectify}, params.values())
        assert norm_of(taken_by(optimizer, params, []), params, "adabelief") == norm


class Shuffled(torch.optim.SGD):
    """Walks neither along the gradient nor along its sign."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.view(-1)[0] -= p.grad.sum()


def shuffled(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return Shuffled(params, lr=0.1)


def test_an_unknown_step_wants_a_word() -> None:
    with pytest.raises(OptionError, match=r"first step of Shuffled is along.*norm=2 as for SGD, or norm=1"):
        Run(shuffled, GradInit(), max_steps=1)
    Run(shuffled, GradInit(norm=2, iterations=1, table=False), max_steps=1)


def lbfgs(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.LBFGS(params)


def test_an_optimizer_that_cannot_try_is_refused_in_words() -> None:
    with pytest.raises(OptionError, match=r"cannot let LBFGS take a trial step.*follow='sgd'"):
        Run(lbfgs, GradInit(), max_steps=1)


# ---------------------------------------------------------------- without a trace


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adan(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return create_optimizer({"name": "adan", "lr": 0.02}, params)


def scheduled(params: list[nn.Parameter]) -> Any:
    optimizer = torch.optim.AdamW(params, lr=0.02)
    return [optimizer], [torch.optim.lr_scheduler.LinearLR(optimizer, 1e-3, total_iters=5)]


def busy_net() -> nn.Sequential:
    """Dropout and batch normalisation, and a layer that stays frozen."""
    net = nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2)
    )
    net[4].requires_grad_(False)
    return net


class Witness(Callback):
    """What a run finds when it begins; can put the first weights back."""

    def __init__(self, first: list[Tensor] | None = None) -> None:
        self.first = first

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.first is not None:
            with torch.no_grad():
                for p, value in zip(pl_module.parameters(), self.first, strict=True):
                    p.copy_(value)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.streams = (torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate())
        self.buffers = [b.tolist() for b in pl_module.buffers()]
        self.gradients = [p.grad for p in pl_module.parameters()]
        self.modes = [part.training for part in pl_module.modules()]


class Noisy(Toy):
    """Draws from every stream in each step, logs, and asks the Trainer how long it will run."""

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        scale = 1 + 0.01 * (torch.rand(()).item() + float(np.random.rand()) + random.random())
        loss = super().training_step([batch[0] * scale, batch[1]], index)
        self.log("loss", loss)
        self.log_dict({"also": loss})
        return loss

    def train_dataloader(self) -> DataLoader[Any]:
        torch.rand(3)
        return batches(shuffle=True)

    def configure_optimizers(self) -> Any:
        assert self.trainer.estimated_stepping_batches == 3 * math.ceil(4 / self.trainer.accumulate_grad_batches)
        return super().configure_optimizers()


class Own(DataLoader[Any]):
    """A loader with its own generator."""

    def __init__(self) -> None:
        super().__init__(samples(), 8, shuffle=True, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("make", [sgd, adan, scheduled])
@pytest.mark.parametrize(
    ("loader", "options"),
    [
        (None, {}),
        (Own, {}),
        (None, {"accumulate_grad_batches": 3}),
        (None, {"precision": "bf16-mixed"}),
        (Own, {"precision": "bf16-mixed", "accumulate_grad_batches": 3, "gradient_clip_val": 0.5}),
    ],
)
def test_the_run_is_the_run_without_it(make: Any, loader: Any, options: dict[str, Any]) -> None:
    def run(*callbacks: Callback) -> tuple[Noisy, Witness]:
        seed_everything(0, verbose=False)
        module = Noisy(make, busy_net)
        witness = callbacks[-1]
        assert isinstance(witness, Witness)
        trainer(*callbacks, **options).fit(module, loader() if loader else None, batches())
        return module, witness

    alone, witness = run(Witness())
    seed_everything(0, verbose=False)
    first = [p.detach().clone() for p in Noisy(make, busy_net).parameters()]
    none, same = run(GradInit(1.0, iterations=0, table=False), Witness())
    some = GradInit(1.0, iterations=4, lr=0.1, table=False)
    divided, other = run(some, Witness(first))
    assert some.alphas is not None
    assert min(abs(scale - 1) for scale in some.alphas.values()) > 0.01
    for module, found in ((none, same), (divided, other)):
        assert module.losses == alone.losses
        assert torch.equal(vector(module), vector(alone))
        assert found.streams == witness.streams
        assert found.buffers == witness.buffers
        assert found.modes == witness.modes
        assert found.gradients == [None] * len(first)


def test_scales_are_multiplied_in_and_frozen_layers_stay() -> None:
    seed_everything(0, verbose=False)
    module = Toy(adan, busy_net)
    first = {name: p.detach().clone() for name, p in module.named_parameters()}
    callback, witness = GradInit(4.0, 3, table=False), Weights()
    Run(adan, callback, witness, module=module, max_steps=1)
    assert callback.alphas is not None
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert set(callback.alphas) == trained - {"net.1.bias"}  # which starts at zero
    for name, value in witness.weights.items():
        assert torch.equal(value, first[name] * callback.alphas.get(name, 1.0))


class Weights(Callback):
    """The weights that training begins with."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights = {name: p.detach().clone() for name, p in pl_module.named_parameters()}


def test_it_repairs_a_bad_start() -> None:
    """Weights eight times too large: the gradient comes under its bound, and the first steps go better."""

    def net() -> nn.Sequential:
        found = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 2))
        with torch.no_grad():
            for p in found.parameters():
                p.mul_(8)
        return found

    def plain(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(params, lr=0.05)

    callback = GradInit(1.0, 150, lr=0.02, table=False)
    started, alone = Run(plain, callback, net=net).module.losses, Run(plain, net=net).module.losses
    assert callback.history[0].norm > 100
    assert min(found.norm for found in callback.history[-10:]) < 1.1
    assert started[1] < started[0]
    assert max(started) < 0.02 * alone[0]
    assert not alone[-1] < alone[0]


def test_the_rate_is_the_one_without_warm_up() -> None:
    callbacks = [GradInit(10.0, 3, table=False), GradInit(10.0, 3, eta=0.02, table=False), GradInit(10.0, 3, eta=0.3)]
    for callback in callbacks:
        Run(scheduled, callback, max_steps=1)
    alphas = [list((callback.alphas or {}).values()) for callback in callbacks]
    assert alphas[0] == pytest.approx(alphas[1], abs=1e-9)
    assert callbacks[0].history[0].loss_after != callbacks[2].history[0].loss_after


# ---------------------------------------------------------------- what it looks at


def padded(rows: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Sequences of another length in each batch."""
    x = torch.stack([x for x, _ in rows])
    return [x.repeat(1, 1 + int(x.sum().abs() * 10) % 3), torch.stack([y for _, y in rows])]


class Pooled(Toy):
    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        x, y = batch
        return nn.functional.mse_loss(self(x.view(len(x), -1, 4).mean(1)), y)


def test_batches_of_several_shapes() -> None:
    data = batches(collate_fn=padded)
    assert len({x.shape[1] for x, _ in data}) > 1
    callback = GradInit(10.0, 6, table=False)
    Run(adan, callback, module=Pooled(adan), train=data, max_steps=1)
    assert len(callback.history) == 6


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside, self.out = nn.Linear(4, 12), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inside(x).view(len(x), 1, 3, 4).unbind(2)
        found: Tensor = self.out(nn.functional.scaled_dot_product_attention(q, k, v)[:, 0])
        return found


@pytest.mark.parametrize("net", [Attention, lambda: nn.Sequential(nn.Linear(4, 6), Recurrent())])
def test_the_bound_works_where_fused_kernels_have_no_second_derivative(net: Any) -> None:
    callback = GradInit(1e-3, 3, table=False)
    Run(adan, callback, net=net, max_steps=1)
    assert {found.branch for found in callback.history} == {"constraint"}
    assert min((callback.alphas or {}).values()) < 1


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x.view(len(x), 2, 3))[0][:, -1]  # type: ignore[no-any-return]


def test_half_precision_is_searched_in_full() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).to(torch.bfloat16)

    callback = GradInit(10.0, 3, table=False)
    run = Run(adan, callback, net=net, precision="bf16-true", max_steps=1)
    assert {p.dtype for p in run.module.parameters()} == {torch.bfloat16}
    full = GradInit(10.0, 3, table=False)

    def widened() -> nn.Module:
        return net().float()

    Run(adan, full, net=widened, max_steps=1)
    assert callback.alphas == full.alphas


@pytest.mark.parametrize("is_double", [False, True])
def test_double_precision_is_searched_in_double(is_double: bool) -> None:
    """Also where the module is in it already, before Lightning converts it, and the data are not."""
    callback, single = GradInit(10.0, 3, table=False), GradInit(10.0, 3, table=False)
    Run(
        adan, callback, net=lambda: plain_net().double() if is_double else plain_net(), precision="64-true", max_steps=1
    )
    Run(adan, single, max_steps=1)
    assert callback.alphas is not None
    assert single.alphas is not None
    assert callback.alphas == pytest.approx(single.alphas, abs=1e-4)
    assert callback.history[-1].loss != single.history[-1].loss


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_accumulation_and_autocast_do_not_change_the_search(options: dict[str, Any]) -> None:
    plain, other = GradInit(4.0, 4, table=False), GradInit(4.0, 4, table=False)
    Run(adan, plain)
    Run(adan, other, **options)
    assert other.history == plain.history
    assert other.alphas == plain.alphas


class Sometimes(Toy):
    """Batches whose targets are zero have no loss."""

    def training_step(self, batch: Sequence[Tensor], index: int) -> Any:
        return super().training_step(batch, index) if bool(batch[1].any()) else None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_batches_without_a_loss_are_passed_over() -> None:
    """The search is that on a loader without them, where each iteration takes the two halves of one batch."""
    inputs, targets = samples().tensors
    spoiled = TensorDataset(torch.cat([inputs, inputs]), torch.cat([targets, 0 * targets]))
    order = [*range(32, 40), *range(8), *range(40, 56), *range(8, 32)]
    callbacks = [GradInit(1e-3, 4, table=False) for _ in range(2)]
    for callback, loader in zip(callbacks, (DataLoader(spoiled, 8, sampler=order), batches()), strict=True):
        torch.manual_seed(0)
        Run(sgd, callback, module=Sometimes(sgd), train=loader)
    assert len(callbacks[0].history) == 4
    assert callbacks[0].history == callbacks[1].history
    assert callbacks[0].alphas == callbacks[1].alphas


# ---------------------------------------------------------------- when


def checkpoints(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)


def test_a_resumed_run_is_left_alone(tmp_path: Path) -> None:
    whole = GradInit(4.0, 2, table=False)
    straight = Run(adan, whole, checkpoints(tmp_path))
    again = GradInit(4.0, 2, table=False)
    rest = Run(adan, again, checkpoints(tmp_path / "again"), ckpt_path=tmp_path / "step=4.ckpt")
    assert again.history == []
    assert again.alphas == whole.alphas
    assert rest.module.losses == straight.module.losses[4:]
    assert torch.equal(vector(rest.module), vector(straight.module))
    saved = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]["GradInit"]
    assert json.loads(json.dumps(saved)) == {"alphas": whole.alphas}


def test_a_resumed_run_is_told_without_a_look_into_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight = Run(adan, GradInit(4.0, 2, table=False), checkpoints(tmp_path))
    monkeypatch.setattr("lightning_optim.callbacks.grad_init.inspect.currentframe", lambda: None)
    for callback in (GradInit(4.0, 2, table=False), GradInit(4.0, 2)):
        rest = Run(adan, callback, checkpoints(tmp_path / "again"), ckpt_path=tmp_path / "step=4.ckpt")
        assert callback.history == []
        assert rest.module.losses == straight.module.losses[4:]


def test_a_checkpoint_without_it_is_left_alone_too(tmp_path: Path) -> None:
    straight = Run(adan, checkpoints(tmp_path))
    late = GradInit(4.0, 2, table=False)
    rest = Run(adan, late, checkpoints(tmp_path / "again"), ckpt_path=tmp_path / "step=4.ckpt")
    assert late.alphas is None
    assert rest.module.losses == straight.module.losses[4:]


def test_a_second_fit_goes_on() -> None:
    callback = GradInit(4.0, 2, table=False)
    run = Run(adan, callback, max_epochs=1)
    history = list(callback.history)
    weights, witness = vector(run.module), Weights()
    trainer(callback, witness, max_epochs=1).fit(run.module, batches(), batches())
    assert callback.history == history
    assert torch.equal(torch.cat([p.reshape(-1) for p in witness.weights.values()]), weights)


def test_fast_dev_run_takes_one_iteration() -> None:
    callback = GradInit(4.0, table=False)
    Run(adan, callback, fast_dev_run=True)
    assert len(callback.history) == 1


@pytest.mark.parametrize("first", [True, False])
def test_an_average_begins_at_the_scaled_weights(first: bool) -> None:
    scaling, averaging = GradInit(4.0, 2, table=False), IterateAveraging("ema", decay=0.5)
    both = [scaling, averaging] if first else [averaging, scaling]
    run = Run(sgd, *both)
    alone = Run(sgd, GradInit(4.0, 2, table=False))
    assert all(torch.equal(x, y) for x, y in zip(run.walk.weights, alone.walk.weights, strict=True))
    average = run.walk.weights[0]
    for weights in run.walk.weights[1:]:
        average = 0.5 * average + 0.5 * weights
    assert torch.allclose(vector(run.module), average, atol=1e-6)


# ---------------------------------------------------------------- what one sees


def test_the_table_and_the_board(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    callback, logger = GradInit(4.0, 5), TensorBoardLogger(tmp_path, name="", version="")
    Run(adan, callback, logger=logger, log_every_n_steps=1, max_steps=1, enable_progress_bar=True)
    assert callback.alphas is not None
    printed = capsys.readouterr().out
    assert "GradInit: 5 iterations" in printed
    assert "100%" in printed
    for name, scale in callback.alphas.items():
        assert re.search(rf"{re.escape(name)} .*{scale:.4f}", printed)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [e.value for e in events.Scalars("grad_init/search/loss")] == pytest.approx(
        [h.loss for h in callback.history]
    )
    assert events.Scalars("grad_init/largest_scale")[0].value == pytest.approx(max(callback.alphas.values()))
    histogram = events.Histograms("grad_init/scales")[0].histogram_value
    assert histogram.num == len(callback.alphas)
    assert histogram.sum == pytest.approx(sum(callback.alphas.values()))
    text = events.Tensors("grad_init/scales/text_summary")[0].tensor_proto.string_val[0].decode()
    assert all(f"| `{name}` | {scale:.4f} |" in text for name, scale in callback.alphas.items())


def test_both_are_silent_where_asked(capsys: pytest.CaptureFixture[str]) -> None:
    Run(adan, GradInit(4.0, 1, table=False), max_steps=1)
    assert capsys.readouterr().out == ""


# ---------------------------------------------------------------- refusals


class Manual(Toy):
    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False


class Silent(Toy):
    def training_step(self, batch: Sequence[Tensor], index: int) -> Any:
        return None


class Two(Toy):
    def configure_optimizers(self) -> Any:
        return [sgd(list(self.net.parameters())), sgd([nn.Parameter(torch.ones(1))])]


def lazy() -> nn.Module:
    return nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 2))


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(4, 2)


def frozen() -> nn.Module:
    return nn.Linear(4, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (lambda: Manual(sgd), "under manual optimization"),
        (lambda: Silent(sgd), "training_step must return the loss.*returned NoneType"),
        (lambda: Two(sgd), r"follows one optimizer; configure_optimizers returned 2.*follow='sgd'"),
        (lambda: Toy(sgd, lazy), r"lazy or on the meta device.*call it once"),
        (lambda: Toy(sgd, frozen), r"found no parameter to scale in Toy before SingleDeviceStrategy"),
        (lambda: Toy(adan), r"needs gamma, the bound.*gamma=.inf"),
    ],
)
def test_what_cannot_be_is_refused_in_words(module: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Run(sgd, GradInit(), module=module())


def test_values_are_wanted() -> None:
    """Lightning's own clean-up fails on such a module, and the sentence stands above that."""
    with pytest.raises(NotImplementedError) as failure:
        Run(sgd, GradInit(), module=Toy(sgd, on_meta))
    assert re.search(r"lazy or on the meta device.*empty_init=False", str(failure.value.__context__))


def test_an_iterator_keeps_its_batches() -> None:
    def rows() -> Iterator[Any]:
        yield from batches()

    with pytest.raises(OptionError, match="is an iterator, which gives each batch once"):
        trainer(GradInit()).fit(Toy(sgd), rows(), batches())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gamma": 0.0}, "gamma=0.0 must be a number above 0"),
        ({"iterations": -1}, "iterations=-1 must be an integer of at least 0"),
        ({"follow": "adan"}, "follow='adan' must be 'optimizer', 'sgd', 'normalized_sgd' or 'adam'"),
        ({"norm": 3}, "norm=3 must be 1, 2 or null"),
        ({"second_order": True}, "second_order=True needs a step that can be differentiated"),
    ],
)
def test_options_are_checked(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        GradInit(**options)


def test_a_loss_that_is_not_finite_stops_it() -> None:
    def net() -> nn.Module:
        found = nn.Linear(4, 2)
        found.weight.data[0, 0] = float("inf")
        return found

    with pytest.raises(FloatingPointError, match=r"GradInit stopped: the loss is (nan|inf)"):
        Run(sgd, GradInit(table=False), net=net)


# ---------------------------------------------------------------- several ranks


def sharded(kind: Kind, name: str, folder: str, resume: bool) -> dict[str, Any]:
    module = Configured(OptimizerStrategy(name, lr=0.01), seeded_net)
    callback = GradInit(20.0, 4, lr=0.05)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
    path = Path(folder) / "step=8.ckpt" if resume else None
    with redirect_stdout(StringIO()) as printed:
        fit = trainer(callback, saving, strategy=strategy_of(kind), max_epochs=2)
        fit.fit(module, DataLoader(seeded_samples(64), batch_size=8), ckpt_path=path)
    return {
        "alphas": callback.alphas,
        "losses": module.losses,
        "iterations": len(callback.history),
        "printed": printed.getvalue(),
    }


@pytest.mark.parametrize("name", ["adan", "koala_v"])
def test_every_strategy_gets_the_same_scales(name: str, tmp_path: Path) -> None:
    kinds: list[Kind] = ["ddp", "fsdp1 full", "fsdp2 full"]
    if name == "koala_v":  # reads the loss, of which means are taken over ranks
        kinds = ["ddp"]
    alone = run_ranks(sharded, "ddp", name, str(tmp_path / "alone"), False, world_size=1)[0]
    for kind in kinds:
        first, second = run_ranks(sharded, kind, name, str(tmp_path / kind), False)
        assert first["alphas"] == second["alphas"] == alone["alphas"]
        assert min(abs(scale - 1) for scale in alone["alphas"].values()) > 0.005
        assert first["losses"] == pytest.approx(alone["losses"], abs=2e-5)
        assert (first["iterations"], second["iterations"]) == (4, 0)
        assert "GradInit: 4 iterations" in first["printed"]
        assert "GradInit" not in second["printed"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp1 full", "fsdp2 full", "fsdp2 sharded"])
def test_every_strategy_resumes_without_it(kind: Kind, tmp_path: Path) -> None:
    straight = run_ranks(sharded, kind, "adan", str(tmp_path), False)
    rest = run_ranks(sharded, kind, "adan", str(tmp_path), True)
    for one, other in zip(straight, rest, strict=True):
        assert other["iterations"] == 0
        assert other["alphas"] == one["alphas"]
        assert other["losses"] == one["losses"][8:]


def failing() -> None:
    trainer(GradInit(1.0), strategy="ddp", devices=2).fit(Silent(sgd), batches(), batches())


def test_what_fails_on_rank_0_is_heard_by_all() -> None:
    with pytest.raises(RankFailure) as failure:
        run_ranks(failing, timeout=30.0)
    assert "training_step must return the loss" in failure.value.causes[0]
    assert "GradInit failed on rank 0: training_step must return" in failure.value.causes[1]


# ---------------------------------------------------------------- from a config


def test_it_is_set_from_yaml(tmp_path: Path) -> None:
    from lightning_optim.cli import main

    config = f"""
seed_everything: 0
model:
  class_path: tests.harness.modules.Configured
  init_args: {{optimizer: {{name: adan, lr: 0.01}}}}
data: tests.harness.data.Data
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  default_root_dir: {tmp_path}
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning_optim.callbacks.GradInit
      init_args: {{gamma: .inf, iterations: 2, norm: 1, eta: 0.002}}
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{dirpath: {tmp_path}, filename: end}}
"""
    path = tmp_path / "fit.yaml"
    path.write_text(config)
    main(["fit", "--config", str(path)])
    saved = torch.load(tmp_path / "end.ckpt", weights_only=True)["callbacks"]["GradInit"]
    assert len(saved["alphas"]) > 0
