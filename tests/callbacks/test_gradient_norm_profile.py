"""GradientNormProfile against gradients by hand: under every strategy, and without a trace in training."""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import OptionError
from lightning_optim.callbacks import GradientNormProfile, NonFiniteGuard
from lightning_optim.nn import TransformerBlock
from lightning_optim.training.without_trace import without_trace
from tests.harness.data import batches, samples
from tests.harness.modules import Made, Toy, vector
from tests.harness.ranks import run_ranks
from tests.harness.runs import Parts
from tests.harness.strategies import Kind, rank, strategy_of, world_size
from tests.harness.trainers import trainer
from tests.harness.worlds import whole

DEPTH = 3


def transformer(dropout: float = 0.0) -> nn.Sequential:
    """For the samples of plain nets: three tokens of eight numbers."""
    torch.manual_seed(0)
    blocks = [TransformerBlock(8, 2, "pre", mlp_ratio=2, dropout=dropout) for _ in range(DEPTH)]
    return nn.Sequential(nn.Linear(4, 24), nn.Unflatten(1, (3, 8)), *blocks, nn.Flatten(), nn.Linear(24, 2))


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in params if p.requires_grad], lr=0.01, momentum=0.9)


class Model(Made):
    unit = TransformerBlock

    def __init__(self, net: Callable[[], nn.Module] = transformer) -> None:
        super().__init__(sgd, net)


class Seen(Callback):
    """Norms of what the optimizer is about to see, by block, and the random state after each step."""

    def __init__(self) -> None:
        self.norms: list[list[float]] = []
        self.random: list[Tensor] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        blocks = [m for m in pl_module.modules() if isinstance(m, TransformerBlock)]
        grads = [[p.grad for p in block.parameters() if p.grad is not None] for block in blocks]
        self.norms.append([float(torch.cat([g.flatten().double() for g in own]).norm()) if own else 0 for own in grads])

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.random.append(torch.get_rng_state())


def fit(*callbacks: Callback, net: Callable[[], nn.Module] = transformer, train: Any = None, **options: Any) -> Model:
    module = Model(net)
    torch.manual_seed(1)
    trainer(*callbacks, **{"max_epochs": 2, **options}).fit(module, batches(shuffle=True) if train is None else train)
    return module


def by_hand(count: int, part: str = "") -> tuple[list[float], list[float]]:
    """At the first weights: the mean over batches of each block's gradient norm, and of |x|²/d."""
    net, norms, sizes = transformer(), torch.zeros(DEPTH).double(), torch.zeros(DEPTH).double()
    for x, y in itertools.islice(batches(), count):
        net.zero_grad()
        after = list(itertools.accumulate([x, *net], lambda value, layer: layer(value)))
        nn.functional.mse_loss(after[-1], y).backward()  # type: ignore[no-untyped-call]
        for i in range(DEPTH):
            named = [p.grad for name, p in net[2 + i].named_parameters() if part in name and p.grad is not None]
            norms[i] += torch.cat([g.flatten().double() for g in named]).norm() / count
            sizes[i] += after[3 + i].detach().double().square().mean() / count
    return norms.tolist(), sizes.tolist()


def test_the_first_look_is_the_mean_over_batches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    profile, seen = GradientNormProfile(every=3, batches=3), Seen()
    fit(profile, seen, train=batches(), logger=logger, log_every_n_steps=1)
    first, second, third = profile.profiles["net"]
    assert [first.step, second.step, third.step] == [0, 3, 6]
    assert first.names == ("net.2", "net.3", "net.4")
    norms, sizes = by_hand(3)
    assert first.norms["block"] == pytest.approx(norms, rel=1e-5)
    assert first.residual == pytest.approx(sizes, rel=1e-5)
    for part, name in (("attention_output", "attention.output.weight"), ("feed_forward_output", "d.output.weight")):
        assert first.norms[part] == pytest.approx(by_hand(3, name)[0], rel=1e-5)
    for later in (second, third):
        assert later.norms["block"] == pytest.approx(seen.norms[later.step], rel=1e-5)
        assert all(size > 0 for size in later.residual)
    printed = capsys.readouterr().out
    assert "Gradient norms of net (3 blocks) before step 1" in printed
    assert f"{first.norms['block'][1]:.4g}" in printed

    events = EventAccumulator(str(tmp_path))
    events.Reload()
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert scalars["gradient_norm_profile/net/block/2"] == [
        (p.step, pytest.approx(p.norms["block"][2], rel=1e-6)) for p in (first, second, third)
    ]
    assert scalars["gradient_norm_profile/net/residual/0"][0][1] == pytest.approx(sizes[0], rel=1e-5)
    assert scalars["gradient_norm_profile/net/slope"][1] == (
        3,
        pytest.approx(second.slope("feed_forward_output"), rel=1e-5),
    )
    assert [image.step for image in events.Images("gradient_norm_profile/net/by_depth")] == [0, 3, 6]
    assert "gradient_norm_profile/net/verdict/text_summary" in events.Tags()["tensors"]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2, "max_epochs": 4},
    "clipping": {"gradient_clip_val": 0.1},
    "bf16": {"precision": "bf16-mixed"},
    "clipped and accumulated": {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1, "max_epochs": 3},
}


@pytest.mark.parametrize("name", [*OPTIONS, "fp16"])
def test_a_run_is_the_same_bit_for_bit(name: str) -> None:
    options = OPTIONS.get(name, {})
    runs = []
    for looking in (False, True):
        profile, seen = GradientNormProfile(every=2, table=False), Seen()
        if name == "fp16":  # its first scale overflows
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, backoff_factor=2.0**-8)
            options = {"plugins": MixedPrecision("16-mixed", "cpu", scaler), "max_epochs": 3}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected call of .lr_scheduler")
            module = fit(*([profile] if looking else []), seen, net=lambda: transformer(0.2), **options)
        runs.append((vector(module), torch.stack(seen.random), torch.tensor(module.losses), seen.norms, profile))
    for alone, looked in zip(runs[0][:3], runs[1][:3], strict=True):
        assert torch.equal(alone, looked)
    *_, norms, profile = runs[1]
    own = profile.profiles["net"]
    assert own[0].step == 0
    assert all(0 < norm < 100 for norm in own[0].norms["block"])
    for later in own[1:]:  # before clipping, unscaled, of all accumulated batches
        assert later.norms["block"] == pytest.approx(norms[later.step], rel=1e-5)
    assert len(own) > 2


def on_ranks(kind: Kind) -> dict[str, Any]:
    """The profiles of a run, and whether a run without the callback is the same to the last bit."""
    found: dict[str, Any] = {"refusal": ""}
    train = DataLoader(samples(), batch_sampler=Parts(rank(), world_size()))
    options: dict[str, Any] = {"train": train, "max_epochs": 1, "accumulate_grad_batches": 2}
    profile = GradientNormProfile(every=1, batches=3, table=False)
    fit(profile, strategy=strategy_of(kind, TransformerBlock), **options)
    found["profiles"] = profile.profiles

    runs = []
    net = functools.partial(transformer, 0.2)
    clip = None if "fsdp1" in kind else 0.2
    for callbacks in ([GradientNormProfile(every=2, batches=3, table=False)], []):
        strategy = strategy_of(kind, TransformerBlock, **({"static_graph": True} if kind == "ddp" else {}))
        module = fit(*callbacks, net=net, strategy=strategy, gradient_clip_val=clip, train=train, max_epochs=1)
        runs.append((whole(module.net), module.losses, torch.get_rng_state()))
    one, other = runs
    found["same"] = one[1] == other[1] and torch.equal(one[2], other[2])
    found["same"] &= all(torch.equal(p, other[0][name]) for name, p in one[0].items())
    if "fsdp1" in kind:
        try:
            fit(profile, strategy=strategy_of(kind, TransformerBlock, use_orig_params=False), **options)
        except OptionError as error:
            found["refusal"] = str(error)
    return found


KINDS: list[Kind] = ["ddp", "fsdp1 full", "fsdp2 full"]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks(kind: Kind) -> None:
    """They see what one process sees of the whole batches, accumulated ones too."""
    one, two = run_ranks(on_ranks, kind)
    assert one["same"]
    assert two["same"]
    assert one["profiles"] == two["profiles"]
    first, second = one["profiles"]["net"]
    norms, sizes = by_hand(3)
    assert first.norms["block"] == pytest.approx(norms, rel=1e-4)
    assert first.norms["attention_output"] == pytest.approx(by_hand(3, "attention.output.weight")[0], rel=1e-4)
    assert first.residual == pytest.approx(sizes, rel=1e-4)
    seen = Seen()
    fit(seen, train=batches(), max_epochs=1, accumulate_grad_batches=2)
    assert second.norms["block"] == pytest.approx(seen.norms[1], rel=1e-4)
    assert ("Set use_orig_params=True" in one["refusal"]) == ("fsdp1" in kind)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    def run(epochs: int, resume: Path | None = None) -> GradientNormProfile:
        profile = GradientNormProfile(every=4, table=False)
        fitting = trainer(profile, max_epochs=epochs)
        fitting.fit(Model(), batches(), ckpt_path=resume)
        fitting.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return profile

    run(1)  # which is saved just before a look
    resumed, straight = run(3, tmp_path / "1.ckpt"), run(3)
    assert [p.step for p in straight.profiles["net"]] == [0, 4, 8]
    assert resumed.profiles == straight.profiles


class Late(Model):
    """Whose loss says nothing of the weights, or is None, before training."""

    def __init__(self, first: str) -> None:
        super().__init__()
        self.first, self.begun = first, False

    def on_train_start(self) -> None:  # after that of callbacks
        self.begun = True

    def training_step(self, batch: Sequence[Tensor], index: int) -> Any:
        loss = super().training_step(batch, index)
        return loss if self.begun else None if self.first == "none" else 0 * loss


@pytest.mark.parametrize("first", ["none", "zero"])
def test_a_first_look_that_sees_nothing_is_made_up_for(first: str) -> None:
    profile = GradientNormProfile(every=None, table=False)
    with pytest.warns(UserWarning, match="It looks again in the next steps"):
        trainer(profile, max_epochs=1).fit(Late(first), batches())
    [seen] = profile.profiles["net"]
    assert seen.step == 0
    assert seen.norms["block"] == pytest.approx(by_hand(1)[0], rel=1e-5)


class Samples(Callback):
    """Other passes in the middle of a look: one without gradients, and one of another callback that looks."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        with torch.no_grad():
            pl_module(50 * batch[0])
        with without_trace(trainer, pl_module):
            pl_module(50 * batch[0])


class Validated(Model):
    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self(50 * batch[0])


def test_residuals_are_those_of_training_alone() -> None:
    profile = GradientNormProfile(batches=0, table=False)
    options: dict[str, Any] = {"accumulate_grad_batches": 4, "max_epochs": 1, "val_check_interval": 1}
    trainer(profile, Samples(), **options).fit(Validated(), batches(), batches())
    assert profile.profiles["net"][0].residual == pytest.approx(by_hand(4)[1], rel=1e-5)


class Adversaries(Toy):
    """Two networks and two optimizers by hand; the second steps twice in a batch."""

    def __init__(self) -> None:
        super().__init__(sgd, transformer)
        self.automatic_optimization = False
        self.other = transformer()

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        every: Any = self.optimizers()
        for optimizer, net, steps in zip(every, (self.net, self.other), (1, 2), strict=True):
            for _ in range(steps):
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make(list(net.parameters())) for net in (self.net, self.other)]


def test_several_optimizers_by_hand() -> None:
    profile, weights = GradientNormProfile(every=6, table=False), []
    for callbacks in ([], [profile]):
        module = Adversaries()
        trainer(*callbacks, max_epochs=3).fit(module, batches(), batches(batch_size=16))
        weights.append(vector(module))
    assert torch.equal(*weights)
    assert [[p.step for p in own] for own in profile.profiles.values()] == [[0, 6, 12, 18, 24, 30]] * 2
    assert profile.profiles["net"][0].norms["block"] == pytest.approx(by_hand(1)[0], rel=1e-5)


def compiled() -> Any:
    return torch.compile(transformer(), backend="eager")


def test_a_compiled_network() -> None:
    """Residual norms are seen before training only, and nothing is compiled again for them."""
    profile = GradientNormProfile(every=2, table=False)
    module, alone = fit(profile, net=compiled), fit(net=compiled)
    assert torch.equal(vector(module), vector(alone))
    first, *later = profile.profiles["net"]
    assert first.pattern() == "pre" or first.pattern() == "neither"
    assert [p.pattern() for p in later] == ["unknown"] * 3
    assert all(norm > 0 for p in later for norm in p.norms["block"])


def frozen() -> nn.Module:
    net = transformer()
    for i in range(DEPTH):
        net[2 + i].requires_grad_(False)
    return net


def exploding() -> nn.Module:
    net = transformer()
    with torch.no_grad():
        next(net[-1].parameters()).mul_(1e38)
    return net


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), "has found no blocks"),
        (frozen, "all parameters of the blocks are frozen"),
        (exploding, "gradients before step 1 are zero or not finite"),
    ],
)
def test_what_cannot_be_shown_is_said_once_and_training_goes_on(net: Callable[[], nn.Module], words: str) -> None:
    profile = GradientNormProfile(every=1, table=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        module = fit(profile, NonFiniteGuard(patience=None), net=net)
    said = [str(w.message) for w in caught if "GradientNormProfile" in str(w.message)]
    assert len(said) == 1
    assert words in said[0]
    assert len(module.losses) == 8
    assert profile.profiles == {}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"blocks": "net.layers"}, "blocks='net.layers' matches no module with parameters"),
        ({"blocks": ""}, "blocks='' must be a name or pattern"),
        ({"blocks": []}, "must be a name or pattern"),
        ({"every": 0}, "every=0 must be an integer of at least 1, or None"),
        ({"batches": -1}, "batches=-1 must be an integer of at least 0"),
    ],
)
def test_refusals(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"GradientNormProfile: .*{words.removeprefix('GradientNormProfile')}"):
        fit(GradientNormProfile(**options))


def test_batches_that_come_once() -> None:
    once = itertools.chain(list(batches()))
    with pytest.raises(OptionError, match=r"is an iterator, which gives each batch once.*Or set batches: 0"):
        fit(GradientNormProfile(), train=once, max_steps=2)
    profile = GradientNormProfile(batches=0, table=False)
    fit(profile, train=itertools.chain(list(batches())), max_steps=2)
    assert profile.profiles["net"][0].norms["block"] == pytest.approx(by_hand(1)[0], rel=1e-5)
