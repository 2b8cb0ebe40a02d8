"""GradientNoiseScale against gradients by hand, under every strategy; and a run with it is the run without it."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import AdamW
from lightning_optim.analysis.noise_scale import from_two_sizes
from lightning_optim.callbacks import GradientNoise, GradientNoiseScale
from tests.harness.data import batches
from tests.harness.modules import Pair, Plain, Toy
from tests.harness.nets import plain_net
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, rank, strategy_of, world_size
from tests.harness.trainers import trainer
from tests.harness.worlds import whole

STEPS, ACCUMULATE, SIZE = 3, 2, 4


class Linear(Plain):
    """The gradient for a sample does not depend on the weights: it is the sample, times constants."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(lambda: nn.ModuleDict({"a": nn.Linear(4, 6), "b": nn.Linear(4, 2)}))
        self.head = nn.Parameter(torch.ones(3))
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def loss(self, batch: Any) -> Tensor:
        outputs: Tensor = self(batch[0])
        return outputs.mean()

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = self.net["a"](inputs).mean(1) + 2 * self.net["b"](inputs).sum(1)  # type: ignore[index]
        found: Tensor = outputs + (inputs[:, :3] * self.head).sum(1) + self.frozen(inputs).sum(1)
        return found

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.01, momentum=0.9)


def gradient(x: Tensor) -> Tensor:
    """By hand, for the mean over the samples of x."""
    mean = x.double().mean(0)
    return torch.cat([mean.repeat(6) / 6, torch.full((6,), 1 / 6), 2 * mean.repeat(2), torch.full((2,), 2.0), mean[:3]])


def data() -> Tensor:
    return torch.randn(STEPS * ACCUMULATE * 2 * SIZE, 4, generator=torch.Generator().manual_seed(5)) + 0.5


def by_hand(parts: int) -> list[tuple[float, float]]:
    """tr(Sigma) and |G|^2 of each step, from all batches of it over all ranks."""
    found = []
    for step in data()[: STEPS * parts * SIZE].view(STEPS, parts, SIZE, 4):
        small = torch.stack([gradient(part).square().sum() for part in step]).mean()
        large = gradient(step.flatten(0, 1)).square().sum()
        found.append(from_two_sizes(float(small), float(large), SIZE, parts * SIZE))
    return found


class Seen(Callback):
    """What was measured, step by step, from the sums of a running mean without forgetting."""

    def __init__(self, of: GradientNoiseScale) -> None:
        self.of, self.found = of, list[tuple[float, float]]()
        self.last = (0.0, 0.0)

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        running = self.of.running[0]
        if running.count > len(self.found):
            now = (running.value.trace, running.value.signal)
            share = (1 - running.decay) / (1 - running.decay**running.count)
            trace, signal = ((x - (1 - share) * y) / share for x, y in zip(now, self.last, strict=True))
            self.found.append((trace, signal))
            self.last = now


def fit(kind: Kind, accumulate: int, look: bool, **options: Any) -> tuple[dict[str, Tensor], list[tuple[float, float]]]:
    module, callback = Linear(), GradientNoiseScale(every=1, decay=0.5)
    seen = Seen(callback)
    parts = data()[: STEPS * accumulate * world_size() * SIZE].view(STEPS, accumulate, world_size(), SIZE, 4)
    mine = DataLoader(TensorDataset(parts[:, :, rank()].reshape(-1, 4)), batch_size=SIZE)
    fitting = trainer(
        *([callback, seen] if look else []),
        strategy=strategy_of(kind),
        accumulate_grad_batches=accumulate,
        max_epochs=1,
        **options,
    )
    fitting.fit(module, mine)
    model: Any = fitting.strategy.model if kind.startswith("fsdp1") else module
    return {name: p.clone() for name, p in whole(model).items()}, seen.found


def both(kind: Kind, accumulate: int, **options: Any) -> list[tuple[float, float]]:
    """The measurements, after a look at the weights with and without the callback."""
    with_it, found = fit(kind, accumulate, True, **options)
    without, _ = fit(kind, accumulate, False, **options)
    assert with_it.keys() == without.keys()
    assert all(torch.equal(p, without[name]) for name, p in with_it.items())
    return found


def on_ranks(kind: Kind) -> list[list[tuple[float, float]]]:
    return [both(kind, 1), both(kind, 2), both(kind, 1, precision="bf16-mixed") if kind == "ddp" else []]


@pytest.mark.parametrize("kind", ["ddp", "fsdp1 full", "fsdp2 full"])
def test_ranks_and_accumulated_batches_are_parts(kind: Kind) -> None:
    for once, twice, rounded in run_ranks(on_ranks, kind):
        for found, parts in ((once, 2), (twice, 4)):
            for one, exact in zip(found, by_hand(parts), strict=True):
                assert one == pytest.approx(exact, rel=1e-4)
        for one, exact in zip(rounded, by_hand(2) if rounded else [], strict=True):
            assert one == pytest.approx(exact, rel=0.1)  # bfloat16 has 8 bits


def test_one_process() -> None:
    """From accumulated batches, and from the halves of one batch."""
    for one, exact in zip(both("single", 2), by_hand(2), strict=True):
        assert one == pytest.approx(exact, rel=1e-4)
    for one, step in zip(both("single", 1), data()[: STEPS * SIZE].view(STEPS, SIZE, 4), strict=True):
        small = sum(float(gradient(half).square().sum()) for half in step.chunk(2)) / 2
        exact = from_two_sizes(small, float(gradient(step).square().sum()), SIZE / 2, SIZE)
        assert one == pytest.approx(exact, rel=1e-4)


def random_net() -> nn.Sequential:
    """Its losses depend on random bits, on batch statistics and on the order of the samples."""
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.3), nn.Linear(6, 2))


def traces(*callbacks: Callback, **options: Any) -> tuple[Any, ...]:
    torch.manual_seed(3)
    module = Toy(lambda p: AdamW(p, lr=0.01), random_net)
    fitting = trainer(*callbacks, max_epochs=2, gradient_clip_val=0.1, **options)
    fitting.fit(module, batches(shuffle=True), batches(batch_size=16))
    state = [value for slots in fitting.optimizers[0].state.values() for value in slots.values()]
    return module.losses, [*module.state_dict().values(), *state, torch.get_rng_state()]


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_run_with_it_is_the_run_without_it(accumulate: int, precision: str) -> None:
    """Bit for bit: dropout, batch statistics, shuffled samples, clipping, and the halves of batches."""
    callback = GradientNoiseScale(every=2)
    options: dict[str, Any] = {"accumulate_grad_batches": accumulate, "precision": precision}
    losses, state = traces(callback, **options)
    other_losses, other_state = traces(**options)
    assert losses == other_losses
    assert all(torch.equal(a, b) for a, b in zip(state, other_state, strict=True) if isinstance(a, Tensor))
    assert callback.running[0].count == (4 if accumulate == 1 else 2)


class Manual(Toy):
    """Accumulates by hand; the second half of the network has an optimizer of its own, which steps rarely."""

    def __init__(self, every: int) -> None:
        super().__init__(lambda p: torch.optim.SGD(p, lr=0.01))
        self.automatic_optimization, self.step_every = False, every

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        loss = self.loss(batch)
        self.losses.append(loss.item())
        self.manual_backward(loss / self.step_every)
        if (index + 1) % self.step_every == 0:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        first, _, last = self.net.children()
        return [self.make(list(first.parameters())), self.make(list(last.parameters()))]


def test_manual_optimization_and_several_optimizers() -> None:
    """Each optimizer has the numbers of its parameters; together those of automatic optimization."""
    callback, automatic = GradientNoiseScale(every=1), GradientNoiseScale(every=1)
    for one, module in ((callback, Manual(2)), (automatic, Toy(lambda p: torch.optim.SGD(p, lr=0.01)))):
        torch.manual_seed(0)
        module.net = plain_net()
        trainer(one, max_epochs=2, accumulate_grad_batches=1 if one is callback else 2).fit(
            module, batches(), batches()
        )
    assert [running.count for running in callback.running] == [4, 4]
    for name in ("trace", "signal"):
        parts = sum(getattr(running.value, name) for running in callback.running)
        assert parts == pytest.approx(getattr(automatic.running[0].value, name), rel=1e-5)


class Twice(Toy):
    def training_step(self, batch: Any, index: int) -> Tensor:
        self.loss(batch).backward()  # type: ignore[no-untyped-call]
        return super().training_step(batch, index)


class Reusing(Manual):
    """Keeps the gradients of the step before."""

    def training_step(self, batch: Any, index: int) -> None:  # type: ignore[override]
        self.manual_backward(self.loss(batch))
        if index % 2:
            for optimizer in self.optimizers():  # type: ignore[union-attr]
                optimizer.step()


def sgd(p: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr=0.01)


@pytest.mark.parametrize(
    ("module", "loader", "others", "accumulate", "words"),
    [
        (Toy(sgd), batches(batch_size=1), [], 1, "cannot be split"),
        (Manual(1), batches(), [], 1, "shows one batch size only"),
        (Pair(sgd), batches(), [], 1, "shows one batch size only"),
        (Reusing(2), batches(), [], 1, "gradients were there before"),
        (Twice(sgd), batches(), [], 2, "got two gradients"),
        (Toy(sgd), batches(), [GradientNoise(1.0)], 2, "not the mean of those of its parts"),
    ],
)
def test_where_nothing_can_be_measured_it_says_why_once_and_training_goes_on(
    module: Toy, loader: Any, others: list[Callback], accumulate: int, words: str
) -> None:
    callback = GradientNoiseScale(every=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clip = {"gradient_clip_val": 100.0} if others else {}  # noise before clipping is added by a hook
        run = trainer(*others, callback, max_epochs=1, accumulate_grad_batches=accumulate, **clip)
        run.fit(module, loader, batches())
    assert sum(running.count for running in callback.running) <= (2 if isinstance(module, Reusing) else 1)
    assert [words in str(w.message) for w in caught if "GradientNoiseScale" in str(w.message)] == [True]


def test_a_resumed_run_goes_on_with_its_averages(tmp_path: Any) -> None:
    straight, first, second = (GradientNoiseScale(every=3) for _ in range(3))
    module = Toy(sgd)
    state = {name: value.clone() for name, value in module.state_dict().items()}
    trainer(straight, max_epochs=4, accumulate_grad_batches=2).fit(module, batches(), batches())
    module.load_state_dict(state)
    half = trainer(first, max_epochs=2, accumulate_grad_batches=2)
    half.fit(module, batches(), batches())
    half.save_checkpoint(tmp_path / "half.ckpt")
    last = trainer(second, max_epochs=4, accumulate_grad_batches=2)
    last.fit(Toy(sgd), batches(), batches(), ckpt_path=tmp_path / "half.ckpt")
    assert second.running[0].state() == straight.running[0].state()
    assert second.running[0].count == 3
