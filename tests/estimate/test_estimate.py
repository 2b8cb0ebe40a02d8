"""What an estimate counts beside the state: activations, averages, buffers of communication, and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptionError, estimate_memory
from lightning_optim.callbacks import Communication, GradientNoise, IterateAveraging, LookaheadSync
from tests.harness.data import batches
from tests.harness.memory import by_walk
from tests.harness.modules import Configured, Pair, Plain
from tests.harness.trainers import Run, trainer


class Deep(LightningModule):
    """Attention and a wide layer, so that activations are most of the memory."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(64, 4, 256, dropout, batch_first=True)
        self.out = nn.Linear(64, 500)

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self.out(self.block(batch[0])).flatten(0, 1), batch[1].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def sequences(batch_size: int, batches: int = 3) -> DataLoader[Any]:
    size = batches * batch_size
    inputs = torch.randn(size, 32, 64, dtype=torch.float32, device="cpu")
    return DataLoader(TensorDataset(inputs, torch.zeros(size, 32, dtype=torch.int64, device="cpu")), batch_size)


class Profiled(Callback):
    """The most that torch's profiler saw allocated at a time in the second batch."""

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
            self.profile.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.profile.stop()
            result: Any = self.profile.profiler
            changes = [event for event in result.kineto_results.events() if event.name() == "[memory]"]
            now = self.most = 0
            for event in sorted(changes, key=lambda event: event.start_ns()):
                now += event.nbytes()
                self.most = max(self.most, now)


@pytest.mark.parametrize(("precision", "batch_size"), [("32-true", None), ("bf16-mixed", None), ("32-true", 16)])
def test_activations_are_those_that_a_profiler_measures(precision: Any, batch_size: int | None) -> None:
    profiled = Profiled()
    trainer(profiled, max_epochs=1, precision=precision).fit(Deep(), sequences(batch_size or 8))
    estimate = estimate_memory(
        Deep, "adamw", precision=precision, activations=True, data=sequences(8), batch_size=batch_size
    )
    activations = estimate.of().activations
    assert activations is not None
    assert abs(activations - profiled.most) < 0.1 * profiled.most
    assert (
        estimate.of().total()
        == sum(estimate.of().of(kind) for kind in ("parameter", "gradient", "state")) + activations
    )


@pytest.mark.parametrize("optimizer", ["adan", "torch.optim.AdamW"])
def test_what_callbacks_add_is_counted(optimizer: str) -> None:
    def callbacks() -> list[Callback]:
        averaging = IterateAveraging("mean", every=1, start=0, window=2)
        return [averaging, LookaheadSync(momentum="pullback"), GradientNoise(kind="moments")]

    run = trainer(*callbacks(), max_epochs=1)
    module = Configured(optimizer)
    run.fit(module, batches())
    one = estimate_memory(Configured, optimizer, callbacks=callbacks()).of()
    assert one.of("state") + one.of("stage") == by_walk(run.optimizers[0])
    assert {entry.slot for entry, _ in one.slots() if entry.kind == "stage"} >= {
        "average",
        "block",
        "slow",
        "grad_mean",
    }
    assert estimate_memory(Configured, "gadam").of().of("stage") == one.of("parameter")
    swa = estimate_memory(Configured, optimizer, callbacks=[StochasticWeightAveraging(0.1)]).of()
    assert swa.of("stage") == swa.of("parameter")


def test_a_module_with_two_optimizers_of_its_own() -> None:
    from tests.harness.memory import ours

    run = Run(ours("adamw"), module=Pair(ours("adamw")))
    one = estimate_memory(lambda: Pair(ours("adamw"))).of()
    assert one.of("state") == sum(map(by_walk, run.trainer.optimizers))
    assert (one.name, one.bits, one.of("parameter")) == ("AdamW, AdamW", None, 4 * (44 + 10))


class ByHand(Deep):
    """As `Deep`, with two optimizers, each of which takes a step by hand."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0)
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.0) for part in (self.block, self.out)]

    def training_step(self, batch: list[Tensor], index: int) -> None:  # type: ignore[override]
        optimizers: Any = self.optimizers()
        for optimizer in optimizers:
            optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        for optimizer in optimizers:
            optimizer.step()


def test_activations_of_several_steps_in_a_batch() -> None:
    by_hand = estimate_memory(ByHand, activations=True, data=sequences(8)).of().activations
    automatic = estimate_memory(lambda: Deep(0.0), activations=True, data=sequences(8)).of().activations
    assert automatic is not None
    assert by_hand == pytest.approx(automatic, rel=0.02)


def test_a_module_that_is_there_is_not_changed() -> None:
    module = Plain()
    before = list(module.parameters())
    estimate = estimate_memory(module, "adam", strategy="model_parallel", devices=2)
    assert [p is q and not p.is_meta for p, q in zip(before, module.parameters(), strict=True)] == [True] * 4
    assert json.loads(json.dumps(estimate.as_dict()))["optimizers"][0]["all_ranks"]["parameter_bytes"] == 4 * 44
    assert not torch.distributed.is_initialized()


def test_a_spec_that_freezes_leaves_the_next_one_alone() -> None:
    frozen, whole = estimate_memory(linear, [{"name": "adam", "freeze": ["0.*"]}, "adan"], bits=[32]).optimizers
    assert (frozen.of("gradient"), whole.of("gradient")) == (4 * 20_200, 4 * 30_300)


def linear() -> nn.Module:
    return nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 100), nn.Linear(100, 100))


def test_a_state_that_grows_is_told() -> None:
    spec = {"name": "torch.optim.LBFGS", "history_size": 7}
    estimate = estimate_memory(Configured(spec), [spec, "torch.optim.SGD"])
    assert "LBFGS is not known before its first step, and not counted. LBFGS grows to 16 times" in " ".join(
        estimate.notes
    )


def test_buffers_of_communication() -> None:
    size, unit = 4 * 3 * 10_100, 4 * 10_100
    where: dict[str, Any] = {"devices": 2, "bits": [32]}

    def sent(strategy: Any, **more: Any) -> int:
        return estimate_memory(linear, "adam", strategy=strategy, **{**where, **more}).of().of("communication")

    assert sent("ddp") == size
    assert sent(DDPStrategy(gradient_as_bucket_view=True)) == 0
    assert sent("ddp", callbacks=[Communication("bf16")]) == size + size // 2
    assert sent("single_device", devices=1) == 0
    one_by_one = FSDPStrategy(auto_wrap_policy={nn.Linear})
    assert sent(one_by_one) == 2 * unit + 2 * unit  # two layers at a time, and a gradient with its copy
    assert sent(FSDPStrategy(auto_wrap_policy={nn.Linear}, sharding_strategy="SHARD_GRAD_OP")) == size + 2 * unit
    assert sent("fsdp") == 3 * size  # all in one unit
    assert sent("model_parallel") == 2 * unit + 2 * unit
    with pytest.raises(OptionError, match="Communication 'bf16' is for DDP, and this is FSDP1"):
        sent("fsdp", callbacks=[Communication("bf16")])


def test_the_largest_model_that_fits() -> None:
    one = estimate_memory(linear, "adamw", bits=[32], fits="1GB").of()
    assert one.fits(16 * 30_300 + 24)
    assert not one.fits(16 * 30_300 + 23)
    assert one.largest_model(2 * one.total()) == 2 * 30_300


class Valued(Plain):
    """Needs a value in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.rates = [x.item() for x in torch.linspace(0, 1, 3)]


class Lazy(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("module", "options", "sentence"),
    [
        (Valued, {}, r"Valued cannot be built on the meta device.*\(test_estimate.py, line \d+\).*--build cpu"),
        (Lazy, {}, "Lazy has lazy modules, whose sizes are unknown before a batch: net.weight, net.bias"),
        (Plain, {"optimizer": None}, "Plain configures no optimizer"),
        (Plain, {"optimizer": "adamm"}, "Did you mean adam"),
        (Plain, {"strategy": "fsdb"}, "there is no strategy 'fsdb'. Did you mean fsdp"),
        (Plain, {"strategy": "deepspeed"}, "is not counted"),
        (Plain, {"devices": 0}, "devices=0: a training needs at least one device"),
        (Plain, {"fits": "24 apples"}, "fits='24 apples' must be a size of memory"),
        (Plain, {"strategy": "fsdp", "devices": 2, "optimizer": "soap"}, "SOAP keeps matrices of other shapes"),
        (Plain, {"strategy": ModelParallelStrategy(2, 2), "devices": 2}, "must be the number of ranks, which is 2"),
        (Plain, {"activations": True}, "Plain has no train_dataloader"),
    ],
)
def test_what_cannot_be_counted_gets_a_sentence(module: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(OptionError, match=sentence) as caught:
        estimate_memory(module, **{"optimizer": "adamw", **options})
    assert "\n" not in str(caught.value)


def test_a_module_that_needs_values_is_built_on_the_cpu_on_demand() -> None:
    one = estimate_memory(Valued, "adamw", build="cpu").of()
    assert one.of("parameter") == 4 * 44
