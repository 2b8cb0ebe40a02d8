"""Recomputed statistics are those of the batches that training saw, and recomputing them leaves no trace."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from torchmetrics import MeanMetric

from lightning_optim import OptionError
from lightning_optim.callbacks import IterateAveraging
from tests.harness.trainers import trainer

ROUNDING = 1e-12
X = torch.randn(24, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 1
BATCHES = list(torch.split(X, 4))  # six of them


class Net(LightningModule):
    """Finds its inputs in any batch, and notes them."""

    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.BatchNorm1d(3)) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.inward, self.norm, self.drop, self.out = nn.Linear(4, 3), norm(), nn.Dropout(0.5), nn.Linear(3, 1)
        self.double()
        self.seen: list[Tensor] = []  # in this epoch

    def find(self, batch: Any) -> Tensor:
        return inputs_of(batch)

    def body(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.out(self.norm(self.inward(self.drop(inputs))))
        return outputs

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.seen.append(self.find(batch).clone())
        return (self.body(self.seen[-1]) - 1).square().mean()

    def on_train_epoch_start(self) -> None:
        self.seen = []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05)


@dataclasses.dataclass
class Record:
    """A batch of a class of its own."""

    x: Tensor

    def to(self, device: torch.device) -> Record:
        return Record(self.x.to(device))


def inputs_of(batch: Any) -> Tensor:
    """The sum of all tensors in a batch."""
    if isinstance(batch, Tensor):
        return batch
    if isinstance(batch, Record):
        return batch.x
    if batch is None or isinstance(batch, str | int):
        return torch.zeros(())
    return sum((inputs_of(part) for part in (batch.values() if isinstance(batch, dict) else batch)), torch.zeros(()))


KINDS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "list": lambda x: [x, 2 * x],
    "tuple with words": lambda x: (x, "words", 3),
    "dict": lambda x: {"input_ids": x, "text": ["a"] * len(x)},
    "nested": lambda x: {"left": [x, {"right": (x, 5)}]},
    "object": Record,
}


class Stream(IterableDataset[Any]):
    def __init__(self, batches: Iterable[Any], endless: bool = False) -> None:
        self.batches, self.endless = batches, endless

    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(self.batches) if self.endless else iter(self.batches)


class Bare:
    """Neither a DataLoader, nor with a length."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def whole(batches: list[Any]) -> DataLoader[Any]:
    return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def two(mode: Any) -> Callable[[list[Any]], Any]:
    return lambda batches: CombinedLoader({"a": whole(batches), "b": whole(batches[:4])}, mode)


LOADERS: dict[str, tuple[Callable[[list[Any]], Any], dict[str, Any]]] = {
    "DataLoader": (whole, {}),
    "iterable": (Bare, {}),
    "stream": (lambda batches: DataLoader(Stream(batches), batch_size=None), {}),
    "endless stream": (lambda b: DataLoader(Stream(b, True), batch_size=None), {"limit_train_batches": 5}),
    "limit": (whole, {"limit_train_batches": 3}),
    "fraction": (whole, {"limit_train_batches": 0.5}),
    "overfit": (whole, {"overfit_batches": 2}),
    "fast_dev_run": (whole, {"fast_dev_run": 2}),
    "max_steps in the first epoch": (whole, {"max_steps": 4, "max_epochs": -1}),
    "endless with max_steps": (lambda b: DataLoader(Stream(b, True), batch_size=None), {"max_steps": 5}),
    "accumulation": (whole, {"accumulate_grad_batches": 4}),
    "min_size": (two("min_size"), {}),
    "max_size_cycle": (two("max_size_cycle"), {"limit_train_batches": 5}),
    "max_size": (two("max_size"), {"limit_train_batches": 4}),
    "two in a list": (lambda batches: [whole(batches), whole(batches[2:])], {}),
}


def check(net: Net, mean: Tensor | None = None) -> None:
    """The statistics are the mean over what training saw in its last epoch."""
    with torch.no_grad():
        entering = [net.inward(x) for x in net.seen]
    norm: Any = net.norm
    assert norm.running_mean is not None
    assert (norm.running_mean - torch.stack([x.mean(0) for x in entering]).mean(0)).abs().max() <= ROUNDING
    assert (norm.running_var - torch.stack([x.var(0) for x in entering]).mean(0)).abs().max() <= ROUNDING
    assert norm.num_batches_tracked == len(entering)


def fit(net: Net, loader: Any, *callbacks: Callback, **options: Any) -> Any:
    seed_everything(0, verbose=False)
    options = {"max_epochs": 2, "precision": "64-true", **options}
    run = trainer(*callbacks, IterateAveraging("ema", decay=0.5), **options)
    loader = whole(loader) if isinstance(loader, list) else loader  # a list is one of several loaders
    data: dict[str, Any] = (
        {"datamodule": loader} if isinstance(loader, LightningDataModule) else {"train_dataloaders": loader}
    )
    run.fit(net, **data)
    return run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loader", LOADERS)
def test_statistics_are_those_of_the_batches_of_training(kind: str, loader: str) -> None:
    make, options = LOADERS[loader]
    net = Net()
    fit(net, make([KINDS[kind](x) for x in BATCHES]), **options)
    assert len(net.seen) > 1
    check(net)


# ---------------------------------------------------------------- hooks


def change(batch: Any, replace: bool, by: float) -> Any:
    """Add to the tensors of a list or dict, in place or in new ones."""
    keys = batch if isinstance(batch, dict) else range(len(batch))
    for key in keys:
        if isinstance(batch[key], Tensor):
            batch[key] = batch[key] + by if replace else batch[key].add_(by)
    return type(batch)(batch) if replace else batch


class Hooks:
    """Changes the batch in one of the hooks before the step, and counts."""

    def __init__(self, hook: str, replace: bool) -> None:
        super().__init__()
        self.hook, self.replace = hook, replace
        self.calls: list[str] = []

    def turn(self, hook: str, batch: Any) -> Any:
        self.calls.append(hook)
        return change(batch, self.replace, 10.0) if hook == self.hook else batch

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return self.turn("before", batch)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return self.turn("transfer", batch)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        trainer: Any = self.trainer  # type: ignore[attr-defined]
        return self.turn("after", batch) if trainer.training else batch


class Hooked(Hooks, Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.turn("start", batch)


class Prepared(Hooks, LightningDataModule):
    make: Callable[[Tensor], Any]

    def train_dataloader(self) -> Any:
        return Fresh(self.make)


class Fresh:
    """Makes each batch anew, so that what is changed in place is seen once."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        self.make = make

    def __iter__(self) -> Iterator[Any]:
        return (self.make(x.clone()) for x in BATCHES)


@pytest.mark.parametrize("make", [lambda x: [x, 3], lambda x: {"x": x, "n": 3}])
@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("hook", ["before", "transfer", "after", "start"])
def test_each_hook_prepares_a_batch_once(hook: str, replace: bool, make: Callable[[Tensor], Any]) -> None:
    net = Hooked(hook, replace)
    fit(net, Fresh(make), enable_progress_bar=False)
    check(net)
    assert net.seen[0].mean() > 8
    assert {hook: net.calls.count(hook) for hook in net.calls} == dict.fromkeys(
        ("before", "transfer", "after", "start"), 2 * 6
    )  # the calls of the extra pass were forgotten with all that it left in the module
    if hook != "start":
        data: Any = Prepared(hook, replace)
        data.make, net = make, Net()  # type: ignore[assignment]
        fit(net, data)
        check(net)
        assert net.seen[0].mean() > 8


class Mixes(Callback):
    """Changes the batch, in place or by other tensors in it."""

    def __init__(self, replace: bool) -> None:
        self.replace = replace

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        batch["x"] = batch["x"].flip(0) * 3 + 10 if self.replace else batch["x"].mul_(3).add_(10)


class Looks(Callback):
    """Changes nothing, and is not called more often than there are batches."""

    calls = 0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.calls += 1


@pytest.mark.parametrize("replace", [False, True])
def test_callbacks_that_change_a_batch_change_it_here_too(replace: bool) -> None:
    net, looks = Net(), Looks()
    run = fit(net, Fresh(lambda x: {"x": x, "n": 3}), Mixes(replace), looks)
    check(net)
    assert net.seen[0].mean() > 8
    assert looks.calls == 2 * 6
    assert all("on_train_batch_start" not in vars(callback) for callback in run.callbacks)


class Skips(Net):
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx == 3 else None


def test_an_epoch_that_the_module_ends_ends_here_too() -> None:
    net = Skips()
    fit(net, BATCHES)
    assert len(net.seen) == 3
    check(net)


# ---------------------------------------------------------------- which layers


class AlwaysFrozen(nn.BatchNorm1d):
    """Uses its statistics in every mode."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias)


class Constant(nn.Module):
    """Like torchvision's FrozenBatchNorm2d: statistics in buffers, and no layer of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.ones(3))
        self.register_buffer("running_var", torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var  # type: ignore[operator]


class KeepsMode(nn.BatchNorm1d):
    def train(self, mode: bool = True) -> KeepsMode:
        return super().train(False)


class Frozen(Net):
    """The module's own train() keeps a part in evaluation mode."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__(norm)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self.norm.eval()
        return self


class FrozenPart(Net):
    """A whole part is in evaluation mode from the second epoch on."""

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self.norm.eval()


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize(
    ("module", "norm"),
    [
        (Frozen, lambda: nn.BatchNorm1d(3)),
        (Frozen, lambda: nn.BatchNorm1d(3, affine=False)),
        (Frozen, lambda: nn.SyncBatchNorm(3)),
        (FrozenPart, lambda: nn.Sequential(nn.BatchNorm1d(3))),
        (Net, lambda: KeepsMode(3).eval()),
        (Net, lambda: AlwaysFrozen(3)),
        (Net, lambda: nn.BatchNorm1d(3, momentum=0.0)),
        (Net, Constant),
        (Net, lambda: nn.ModuleDict({"unused": nn.BatchNorm1d(3)})),
    ],
)
def test_statistics_that_training_does_not_move_stay(module: type[Net], norm: Callable[[], nn.Module]) -> None:
    net = module(norm)
    if isinstance(net.norm, nn.ModuleDict):
        vars(net)["body"] = lambda x: net.out(net.inward(x))
    for buffer in net.norm.buffers():
        buffer.copy_(torch.full_like(buffer, 3))
    before = [buffer.clone() for buffer in net.norm.buffers()]
    fit(net, BATCHES)
    for one, other in zip(net.norm.buffers(), before, strict=True):
        assert torch.equal(one[:3] if one.dim() else one, other) or one.dtype == torch.int64


@pytest.mark.parametrize(
    "norm",
    [
        lambda: nn.BatchNorm1d(3, momentum=None),
        lambda: nn.BatchNorm1d(3).requires_grad_(False),  # weights frozen, statistics not
        lambda: nn.BatchNorm1d(3, affine=False),
    ],
)
def test_statistics_that_training_moves_are_recomputed(norm: Callable[[], nn.Module]) -> None:
    net = Net(norm)
    before: Any = net.norm.momentum
    fit(net, BATCHES)
    check(net)
    assert net.norm.momentum == before


def test_a_layer_without_statistics_needs_none() -> None:
    net = Net(lambda: nn.BatchNorm1d(3, track_running_stats=False))
    fit(net, BATCHES)
    assert not list(net.norm.buffers())


class Images(Net):
    def body(self, inputs: Tensor) -> Tensor:
        return self.norm(self.inward(inputs)[:, :, None].expand(-1, -1, 5) * torch.arange(5.0)).mean((1, 2))  # type: ignore[no-any-return]


def test_instance_normalizations_are_recomputed_too() -> None:
    net = Images(lambda: nn.InstanceNorm1d(3, track_running_stats=True))
    fit(net, BATCHES)
    with torch.no_grad():
        values = [net.inward(x)[:, :, None] * torch.arange(5.0) for x in net.seen]
    norm: Any = net.norm
    assert (norm.running_mean - torch.cat(values).mean((0, 2))).abs().max() <= ROUNDING
    assert (norm.running_var - torch.cat(values).var(2).mean(0)).abs().max() <= ROUNDING


class Twice(Net):
    """Calls the layer with different numbers of samples."""

    def body(self, inputs: Tensor) -> Tensor:
        return (super().body(inputs).mean() + super().body(3 * inputs[:2]).mean()) / 2


def test_every_call_counts_by_its_samples() -> None:
    net = Twice()
    fit(net, BATCHES)
    with torch.no_grad():
        whole = torch.cat([net.inward(part) for x in net.seen for part in (x, 3 * x[:2])])
    norm: Any = net.norm
    assert (norm.running_mean - whole.mean(0)).abs().max() <= ROUNDING


# ---------------------------------------------------------------- no trace


class Busy(Net):
    """Does in its step what modules do there."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.losses: list[Tensor] = []
        self.table: dict[str, Any] = {"last": torch.zeros(1), "all": [torch.zeros(1)]}
        self.ordered = OrderedDict[Any, int]()
        self.pair, self.array, self.bytes = (torch.zeros(1), [0]), np.zeros(1), bytearray(1)
        self.normals, self.draws = torch.Generator().manual_seed(1), np.random.default_rng(1)
        self.follower = nn.Linear(4, 3).double().requires_grad_(False)
        self.older, self.plain = np.random.RandomState(1), random.Random(1)
        self.metric, self.spectral = MeanMetric(), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)).double()

    @torch.no_grad()
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.follower.weight.lerp_(self.inward.weight, 0.5)
        self.out.weight.div_(self.out.weight.norm())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx) + self.spectral(self.inward(batch)).square().mean()
        loss = loss + torch.rand(()) + random.random()
        drawn = self.draws.normal() + self.older.normal() + self.plain.random()
        loss = loss * (torch.rand((), generator=self.normals) + drawn)
        self.count += 1
        self.trainer.should_stop = self.count >= 15  # more than there are in training
        self.ordered[self.count] = batch_idx
        self.ordered.move_to_end(self.count, last=False)
        parts: list[Any] = [*self.pair, self.array, self.bytes]
        for held in parts:
            held[0] += 1
        self.losses.append(loss.detach())
        self.table["last"].add_(1)
        self.table["all"].append(loss.detach())
        self.metric(loss)
        self.log("loss", loss, on_step=True, on_epoch=True)
        self.log("metric", self.metric, on_step=False, on_epoch=True)
        self.new = self.count
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """For its hooks."""


class ByHand(Busy):
    """Under manual optimization: with a scheduler, a closure, a penalty on a gradient, and clipping."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        both: Any = self.optimizers()
        first, second = both
        scheduler: Any = self.lr_schedulers()
        first.zero_grad()
        inputs = batch.clone().requires_grad_()
        (slope,) = torch.autograd.grad(self.body(inputs).sum(), inputs, create_graph=True)
        self.manual_backward(slope.square().mean() + super().training_step(batch, batch_idx))
        self.clip_gradients(first, 0.1, "norm")
        first.step()
        scheduler.step()

        def closure() -> Tensor:
            second.zero_grad()
            loss = self.body(batch).square().mean()
            torch.autograd.backward(loss)
            return loss

        second.step(closure)

    def configure_optimizers(self) -> Any:
        first = torch.optim.Adam(self.inward.parameters(), lr=0.05)
        second = torch.optim.SGD([*self.norm.parameters(), *self.out.parameters()], lr=0.05)
        return [first, second], [torch.optim.lr_scheduler.ExponentialLR(first, 0.9)]


class Watch(Callback):
    """What training does, step by step."""

    def __init__(self) -> None:
        self.rows: list[Any] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        weights = torch.cat([v.reshape(-1).double() for v in pl_module.state_dict().values()]).tolist()
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        grads = [None if p.grad is None else p.grad.tolist() for p in pl_module.parameters()]
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        noted = [pl_module.count, len(pl_module.losses), float(pl_module.table["last"]), len(pl_module.table["all"])]
        held = [*itertools.islice(pl_module.ordered.items(), 99), repr(pl_module.pair), *pl_module.array]
        noted += [*held, *pl_module.bytes]
        self.rows.append(
            (weights, rates, grads, logged, noted, trainer.global_step, [m.training for m in pl_module.modules()])
        )


@pytest.mark.parametrize("module", [Busy, ByHand])
def test_the_extra_pass_leaves_no_trace(module: type[Busy]) -> None:
    rows = []
    for callbacks in ((), (IterateAveraging("ema", decay=0.5),)):
        seed_everything(0, verbose=False)
        watch = Watch()
        run = trainer(watch, *callbacks, max_epochs=2, precision="64-true", val_check_interval=2)
        net = module()
        run.fit(net, whole(BATCHES), whole(BATCHES))
        rows.append(watch.rows)
    assert len(rows[0]) == 12
    for plain, averaged in zip(*rows, strict=True):
        assert plain == averaged


# ---------------------------------------------------------------- refused when the fit starts


class Fetches(Net):
    def training_step(self, dataloader_iter: Any) -> Any:  # type: ignore[override]
        return (self.body(next(dataloader_iter)[0]) - 1).square().mean()


@pytest.mark.parametrize(
    ("module", "loader", "options", "words"),
    [
        (Net, lambda: iter(BATCHES), {}, "is an iterator, which gives each batch once"),
        (Net, lambda: Bare(BATCHES), {"max_steps": 50, "max_epochs": -1}, "an epoch may have no end"),
        (Fetches, lambda: whole(BATCHES), {}, "takes dataloader_iter"),
    ],
)
@pytest.mark.filterwarnings("ignore:this hook may not receive|.*dataloader_iter")
def test_batches_that_cannot_be_had_again_are_refused_at_the_start(
    module: type[Net], loader: Callable[[], Any], options: dict[str, Any], words: str
) -> None:
    net = module()
    with pytest.raises(OptionError, match=f"IterateAveraging: .*{words}.*batch_norm='keep'"):
        fit(net, loader(), **options)
    assert net.seen == []


def test_a_limit_makes_an_endless_epoch_welcome() -> None:
    net = Net()
    averaging = IterateAveraging("ema", batch_norm_batches=4)
    trainer(averaging, max_steps=9, max_epochs=-1, precision="64-true").fit(net, Stream(BATCHES, endless=True))
    net.seen = net.seen[:4]
    check(net)
