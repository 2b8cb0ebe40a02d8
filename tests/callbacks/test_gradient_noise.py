"""Noise on gradients: its numbers against an oracle in plain integers, and who sees which of them when."""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_optim import LAMB, SGDW, Adafactor, AdamW, Adan, ConfiguredOptimizer, Lion, OptionError, RMSprop, engines
from lightning_optim.callbacks import GradientNoise, IterateAveraging, LookaheadSync
from lightning_optim.core.foreign_stages import attach, on_gradients
from lightning_optim.distributed.global_index import GlobalIndex, global_indices
from lightning_optim.distributed.philox import normals, philox
from lightning_optim.stages import Noise
from lightning_optim.training import second_moment
from tests.harness.cpu_fsdp import CPUFSDP
from tests.harness.data import batches
from tests.harness.modules import Made, Make, Pair, Toy, slot, vector
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import Run, trainer

ROUNDING = 1e-12  # of a dozen steps in float64


# ---------------------------------------------------------------- an oracle that shares no code


def words(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, from its definition."""
    c, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(p1 >> 32) ^ c[1] ^ k[0], p1 % 2**32, (p0 >> 32) ^ c[3] ^ k[1], p0 % 2**32]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def z(seed: int, tensor: int, t: int, i: int) -> float:
    """The normal number of one element, in float64."""
    j = i // 2
    w = words((j % 2**32, j >> 32, tensor, t), (seed % 2**32, seed >> 32))
    u1, u2 = (((w[n] >> 6) * 2**27 + (w[n + 1] >> 5) + 0.5) * 2.0**-53 for n in (0, 2))
    return math.sqrt(-2 * math.log(u1)) * (math.sin if i % 2 else math.cos)(2 * math.pi * u2)


def field(seed: int, name: str, t: int, shape: torch.Size) -> Tensor:
    word = zlib.crc32(name.encode())
    return torch.tensor([z(seed, word, t, i) for i in range(shape.numel())], dtype=torch.float64).view(shape)


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((2**32 - 1,) * 4, (2**32 - 1,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_words(
    counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]
) -> None:
    found = philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in found) == expected
    assert tuple(words(counter, key)) == expected


def test_normal_numbers_are_those_of_the_oracle_wherever_they_are() -> None:
    seed, t = 0xFEDCBA9876543210, 2**31 + 5
    site = GlobalIndex(0xC0FFEE11, 2**40 + 3, 5, 17)  # runs of 5, 17 apart, past what 32 bits count
    places = [2**40 + 3 + 17 * (i // 5) + i % 5 for i in range(23)]
    found = normals(seed, t, [(site, 0, 23)], "cpu", torch.float64)
    expected = torch.tensor([z(seed, 0xC0FFEE11, t, i) for i in places], dtype=torch.float64)
    assert (found - expected).abs().max() <= 1e-13  # of the functions of two libraries
    pieces = [normals(seed, t, [(site, i, i + 1)], "cpu", torch.float64) for i in range(23)]
    assert torch.equal(torch.cat(pieces), found)


def test_the_distribution_is_normal() -> None:
    x = normals(3, 0, [(GlobalIndex(1), 0, 400_000)], "cpu", torch.float64)
    count = len(x)
    assert abs(float(x.mean())) < 4 / count**0.5
    assert abs(float(x.var()) - 1) < 4 * (2 / count) ** 0.5
    assert abs(float((x**4).mean()) - 3) < 4 * (96 / count) ** 0.5
    for other in ((4, 0, 1), (3, 1, 1), (3, 0, 2)):  # another seed, step and tensor
        y = normals(*other[:2], [(GlobalIndex(other[2]), 0, count)], "cpu", torch.float64)
        assert abs(float((x * y).mean())) < 4 / count**0.5
    assert abs(float((x[:-1] * x[1:]).mean())) < 4 / count**0.5


# ---------------------------------------------------------------- the arithmetic


def noisy(stage: Noise, optimizer: Any, grads: Sequence[Any]) -> Tensor:
    """The gradient of the last of some steps, as SGD with lr=1 shows it."""
    p: Tensor = optimizer.param_groups[0]["params"][0]
    optimizer.append(stage)
    weights = [p.detach().clone()]
    for grad in grads:
        p.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        weights.append(p.detach().clone())
    return weights[-2] - weights[-1]


GRADS = [(0.3, -0.2, 0.05), (0.1, 0.4, -0.05), (-0.2, 0.1, 0.0)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"eta": 0.3}, (0.799528666058, 0.147871013424, -0.809707844161)),
        ({"eta": 0.5, "gamma": 0.0, "kind": "moments"}, (0.158900956085, 0.120425916797, -0.057581905596)),
        ({"eta": 0.3, "start": 3}, GRADS[2]),
    ],
)
@pytest.mark.parametrize("engine", ["reference", "blocked"])
def test_worked_examples(engine: str, options: dict[str, Any], expected: Sequence[float]) -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    stage = Noise({p: GlobalIndex(7)}, seed=1234, **options)
    found = noisy(stage, SGDW([p], lr=1.0, momentum=0.0, engine=engine), GRADS)
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-11


@pytest.mark.parametrize("name", [name for name in engines.ENGINES if name != "reference"])
@pytest.mark.parametrize("kind", ["isotropic", "second_moment", "moments"])
def test_every_engine_draws_the_same(name: str, kind: Any, request: pytest.FixtureRequest) -> None:
    """Bit for bit in float32, for small and large tensors, whole and in runs, with state in 8 bits."""
    shapes = ((), (7,), (5000,), (33, 4), (0,), (4, 5, 6))

    request.getfixturevalue("exact_roots" if name == "compiled" else "torch_functions")

    def run(engine: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
        sites: dict[Tensor, GlobalIndex] = {
            p: GlobalIndex(i, 3) if i < 5 else GlobalIndex(i, 17, 6, 40) for i, p in enumerate(params)
        }
        optimizer = AdamW(params, lr=0.01, state_bits=8, engine=engine)
        optimizer.append(Noise(sites, kind, 0.3, seed=5))
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
        return torch.cat([p.detach().reshape(-1) for p in params])

    try:
        found = run(name)
    except OptionError as refused:
        pytest.skip(str(refused))
    assert torch.equal(found, run("reference"))


def test_a_complex_gradient_has_noise_in_both_parts() -> None:
    p = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    (module := nn.Module()).register_parameter("w", p)
    optimizer = SGDW([p], lr=1.0, momentum=0.0)

    optimizer.append(Noise(global_indices(module.named_parameters(), optimizer), eta=1.0, seed=9))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    expected = -field(9, "w", 0, torch.Size([3, 2]))
    assert (torch.view_as_real(p.detach()) - expected).abs().max() <= 1e-13


# ---------------------------------------------------------------- in the Trainer


def sgdw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return SGDW(params, lr=0.05, momentum=0.9)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return AdamW(params, lr=0.02)


def torch_sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def torch_adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.02)


def plain_loop(
    make: Make,
    sigma: Callable[[int], float],
    seed: int,
    before: Callable[[list[Tensor]], None] = lambda grads: None,
    after: Callable[[list[Tensor]], None] = lambda grads: None,
) -> list[Tensor]:
    """The weights after each step, in float64: the gradients, `before`, the oracle's noise, `after`, the step."""
    seed_everything(0, verbose=False)
    module = Toy(make).double()
    optimizer = make(list(module.parameters()))
    walk: list[Tensor] = []
    for t, batch in enumerate(list(batches()) * 3):
        optimizer.zero_grad()
        torch.autograd.backward(module.loss([part.double() for part in batch]))
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        before(grads)
        for name, p in module.named_parameters():
            assert p.grad is not None
            p.grad += sigma(t) * field(seed, name, t, p.shape)
        after(grads)
        optimizer.step()
        walk.append(vector(module))
    return walk


def clip(limit: float) -> Callable[[list[Tensor]], None]:
    def clipped(grads: list[Tensor]) -> None:
        norm = torch.cat([grad.reshape(-1) for grad in grads]).norm()
        for grad in grads:
            grad *= min(1.0, limit / float(norm + 1e-6))

    return clipped


def annealed(t: int) -> float:
    return math.sqrt(0.3 / (1 + t) ** 0.55)


@pytest.mark.parametrize("make", [sgdw, adamw, torch_sgd, torch_adamw])
def test_it_is_the_plain_loop(make: Make) -> None:
    run = Run(make, GradientNoise(0.3, seed=11), precision="64-true")
    for mine, theirs in zip(run.walk.weights, plain_loop(make, annealed, 11), strict=True):
        assert (mine - theirs).abs().max() <= ROUNDING


@pytest.mark.parametrize("make", [sgdw, torch_sgd])
@pytest.mark.parametrize("clipping", ["before", "after"])
def test_noise_comes_before_or_after_clipping(clipping: Any, make: Make) -> None:
    run = Run(make, GradientNoise(0.3, seed=11, clipping=clipping), precision="64-true", gradient_clip_val=0.5)
    clipped = {"after" if clipping == "before" else "before": clip(0.5)}
    for mine, theirs in zip(run.walk.weights, plain_loop(make, annealed, 11, **clipped), strict=True):
        assert (mine - theirs).abs().max() <= ROUNDING


class Clipping(Toy):
    def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
        self.clip_gradients(optimizer, 0.5, "norm")


def test_a_module_that_clips_itself_counts_as_clipping() -> None:
    run = Run(sgdw, GradientNoise(0.3, seed=11), module=seeded(Clipping, sgdw), precision="64-true")
    expected = plain_loop(sgdw, annealed, 11, after=clip(0.5))
    assert (run.walk.weights[-1] - expected[-1]).abs().max() <= ROUNDING


class Configured(ConfiguredOptimizer, Toy):
    """Its clipping is the mixin's, which does what the Trainer says."""

    def configure_optimizers(self) -> Any:
        return Toy.configure_optimizers(self)

    def configure_callbacks(self) -> list[Any]:
        return []


@pytest.mark.parametrize("clip_val", [None, 0.5])
def test_the_mixin_alone_does_not_count_as_clipping(clip_val: float | None) -> None:
    """Noise then comes in the pass of the update, not in one of its own; the numbers are the same."""
    in_pass: list[bool] = []

    class Look(GradientNoise):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            in_pass.extend(stage.in_pass for stage in self._stages)

    noise = Look(0.3, seed=11)
    run = Run(sgdw, noise, module=seeded(Configured, sgdw), precision="64-true", gradient_clip_val=clip_val)
    assert in_pass == [clip_val is None]
    expected = plain_loop(sgdw, annealed, 11, after=clip(clip_val or 1e9))
    assert (run.walk.weights[-1] - expected[-1]).abs().max() <= ROUNDING


def seeded(kind: type[Toy], *args: Any) -> Toy:
    seed_everything(0, verbose=False)
    return kind(*args)


@pytest.mark.parametrize("make", [adamw, torch_adamw, lambda params: RMSprop(params, lr=0.01)])
@pytest.mark.parametrize("clipped", [False, True])
def test_second_moments_of_the_optimizer_give_the_shape(make: Make, clipped: bool) -> None:
    """Without momentum and decay of weights a step tells the gradient; here a gradient of zeros, but for the first."""
    module = nn.Linear(3, 2).double()
    optimizer = make(list(module.parameters()))
    decay = 0.999 if "betas" in optimizer.defaults else 0.99
    key = "exp_avg_sq" if "betas" in optimizer.defaults else "square_avg"

    callback = GradientNoise(0.5, 0.0, kind="second_moment", seed=2)

    sites = global_indices(module.named_parameters(), optimizer)
    moment = second_moment.mean_square(optimizer)
    assert moment is not None
    stage = Noise(sites, callback.kind, 0.5, 0.0, 2, in_pass=not clipped, second_moment=moment)
    attach(stage, optimizer)
    by_hand = on_gradients(stage, optimizer) if clipped else None
    v = [torch.zeros_like(p) for p in module.parameters()]
    for t in range(4):
        for i, (name, p) in enumerate(module.named_parameters()):
            g = torch.full_like(p, 0.1 * (t + 1))
            root = (v[i] / (1 - decay**t)).sqrt() if t else torch.zeros_like(p)
            noisy = g + math.sqrt(0.5) * root * field(2, name, t, p.shape)
            v[i] = decay * v[i] + (1 - decay) * noisy**2
            p.grad = g
        if by_hand is not None:
            by_hand.run()
        optimizer.step()
        for i, p in enumerate(module.parameters()):
            assert (optimizer.state[p][key] - v[i]).abs().max() <= 1e-14


def test_steps_are_counted_not_batches() -> None:
    noise = GradientNoise(0.3)
    run = Run(sgdw, noise, accumulate_grad_batches=3)
    assert noise.state_dict()["steps"] == [len(run.walk.weights)] == [6]


@pytest.mark.parametrize("make", [sgdw, torch_sgd])
@pytest.mark.parametrize("clip_val", [None, 1e6])
def test_a_step_that_the_scaler_skips_is_none(make: Make, clip_val: float | None) -> None:
    class Overflow(Toy):
        def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
            loss = super().training_step(batch, index)
            return loss * torch.inf if len(self.losses) == 3 else loss

    noise = GradientNoise(0.3)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    Run(make, noise, module=seeded(Overflow, make), plugins=plugins, gradient_clip_val=clip_val)
    assert noise.state_dict()["steps"] == [11]


def test_a_fused_step_under_a_scaler_is_refused() -> None:
    scaler = torch.amp.GradScaler("cpu")

    def fused(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(params, fused=True)

    with pytest.raises(OptionError, match=r"AdamW with fused=True.*Set fused=False"):
        Run(fused, GradientNoise(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)])


class ByHand(Toy):
    def __init__(self, make: Make) -> None:
        super().__init__(make)
        self.automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        self.clip_gradients(optimizer, 0.5, "norm")
        optimizer.step()


@pytest.mark.parametrize("make", [sgdw, torch_sgd])
def test_under_manual_optimization_noise_comes_with_the_step(make: Make) -> None:
    run = Run(make, GradientNoise(0.3, seed=11), module=seeded(ByHand, make), precision="64-true")
    expected = plain_loop(make, annealed, 11, before=clip(0.5))
    assert (run.walk.weights[-1] - expected[-1]).abs().max() <= ROUNDING


class Two(ByHand):
    """An optimizer for each layer, the second of which steps every other time."""

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        first, second = cast("Any", self.optimizers())
        self.manual_backward(self.loss(batch))
        for optimizer in (first, second) if index % 2 else (first,):
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        net: Any = self.net
        return [sgdw(list(net[0].parameters())), torch_sgd(list(net[2].parameters()))]


def test_two_optimizers_count_for_themselves() -> None:
    noise = GradientNoise(0.3)
    Run(sgdw, noise, module=Two(sgdw), fast_dev_run=4)
    assert noise.state_dict()["steps"] == [3, 1]  # four steps of either are the limit


def test_two_optimizers_are_both_logged(tmp_path: Path) -> None:
    """In turns: the step of the Trainer, which counts both, is even for the first and odd for the second."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    Run(sgdw, GradientNoise(0.3), module=Pair(sgdw, second=1), logger=logger, log_every_n_steps=4)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    for i in (0, 1):
        sigma = [event.value for event in events.Scalars(f"gradient_noise/{i}/sigma")]
        assert sigma == pytest.approx([annealed(t) for t in (0, 4, 8)])


@pytest.mark.parametrize("precision", ["32-true", "bf16-true", "bf16-mixed"])
@pytest.mark.parametrize("make", [adamw, torch_adamw, lambda params: AdamW(params, lr=0.02, state_bits=16)])
@pytest.mark.parametrize("kind", ["isotropic", "moments"])
def test_a_resumed_run_is_the_same_run(kind: Any, make: Make, precision: Any, tmp_path: Path) -> None:
    def saving(folder: Path) -> ModelCheckpoint:
        return ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)

    clip_val = 0.5 if kind == "moments" else None  # both ways of adding noise
    options: dict[str, Any] = {"precision": precision, "gradient_clip_val": clip_val}
    whole = Run(make, GradientNoise(0.1, kind=kind), saving(tmp_path), **options)
    os.environ.pop("PL_GLOBAL_SEED", None)  # the seed comes from the checkpoint
    path = tmp_path / "step=4.ckpt"
    rest = Run(make, GradientNoise(0.1, kind=kind), saving(tmp_path / "again"), ckpt_path=path, **options)
    assert [w.tolist() for w in rest.walk.weights] == [w.tolist() for w in whole.walk.weights[4:]]
    if kind == "moments":
        ends = [slot(run.trainer.optimizers[0], "grad_square") for run in (whole, rest)]
        assert ends[0].dtype == torch.float32
        assert torch.equal(*ends)


def test_the_seed_is_that_of_the_run_and_no_other_number_changes() -> None:
    def net() -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 2))

    def weights(*callbacks: GradientNoise) -> Tensor:
        return vector(Run(sgdw, *callbacks, net=net).module)

    assert torch.equal(weights(GradientNoise(0.0)), weights())  # with the masks of a run without noise
    assert torch.equal(weights(GradientNoise(0.1)), weights(GradientNoise(0.1, seed=0)))
    assert not torch.equal(weights(GradientNoise(0.1)), weights(GradientNoise(0.1, seed=1)))


@pytest.mark.parametrize("make", [sgdw, torch_sgd])
def test_it_goes_with_lookahead_and_averaging_in_any_order(make: Make) -> None:
    ends = []
    for order in itertools.permutations((0, 1, 2)):
        callbacks = [GradientNoise(0.1, seed=3), LookaheadSync(3), IterateAveraging(start=1, every=1)]
        ends.append(vector(Run(make, *(callbacks[i] for i in order)).module))
    assert all(torch.equal(end, ends[0]) for end in ends)
    assert not torch.equal(ends[0], vector(Run(make, LookaheadSync(3), IterateAveraging(start=1, every=1)).module))


def test_the_callback_leaves_the_optimizer_as_it_was() -> None:
    for make in (sgdw, torch_sgd):
        run = Run(make, GradientNoise(1.0), max_epochs=1)
        optimizer = run.trainer.optimizers[0]
        for p in run.module.parameters():
            p.grad = torch.zeros_like(p)
            optimizer.state[p]["momentum_buffer"].zero_()
        before = vector(run.module)
        optimizer.step()
        assert torch.equal(vector(run.module), before)


def test_what_a_person_would_look_at(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = TensorBoardLogger(tmp_path)
    Run(sgdw, GradientNoise(0.3), logger=logger, log_every_n_steps=4)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    sigma = {event.step: event.value for event in events.Scalars("gradient_noise/sigma")}
    assert sigma == pytest.approx({t: annealed(t) for t in (0, 4, 8)})
    seed_everything(0, verbose=False)
    module = Toy(sgdw)
    torch.autograd.backward(module.loss(next(iter(batches()))))
    norm = torch.cat([p.grad.reshape(-1) for p in module.parameters() if p.grad is not None]).norm()
    count = sum(p.numel() for p in module.parameters())
    ratio = events.Scalars("gradient_noise/ratio")[0]
    assert ratio.value == pytest.approx(annealed(0) * count**0.5 / float(norm), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"eta": -1.0}, "eta=-1.0 must be a finite number of at least 0"),
        ({"gamma": math.nan}, "gamma=nan must be a finite number of at least 0"),
        ({"kind": "white"}, "kind='white' must be 'isotropic', 'second_moment' or 'moments'"),
        ({"clipping": "during"}, "clipping='during' must be 'before' or 'after'"),
        ({"start": -1}, "start=-1 must be an integer of at least 0"),
        ({"decay": 1.0}, r"decay=1.0 must be in \(0, 1\)"),
        ({"seed": 2**64}, "must be an integer of 64 bits"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=f"GradientNoise: .*{words}"):
        GradientNoise(**options)


@pytest.mark.parametrize(
    ("make", "options", "words"),
    [
        (lambda p: Lion(p), {"kind": "second_moment"}, "Lion has none here. Use kind='moments'"),
        (lambda p: Adafactor(p), {"kind": "second_moment"}, "Adafactor has none here"),
        (lambda p: RMSprop(p, tf_style=True), {"kind": "second_moment"}, "RMSprop has none here"),
        (torch_sgd, {"kind": "second_moment"}, "SGD has none here"),
        (lambda p: torch.optim.Adamax(p), {"kind": "second_moment"}, "Adamax has none here"),
        (lambda p: LAMB(p, max_grad_norm=1.0), {"clipping": "after"}, "clipping='after' is not possible.*LAMB"),
        (lambda p: Adan(p, max_grad_norm=1.0), {"clipping": "after"}, "clipping='after' is not possible.*Adan"),
    ],
)
def test_what_cannot_be_kept_is_refused(make: Make, options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        Run(make, GradientNoise(**options))


def test_it_is_set_from_yaml(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        """
trainer:
  callbacks:
    - class_path: lightning_optim.callbacks.GradientNoise
      init_args: {eta: 0.3, gamma: 0.55, kind: moments, clipping: after, start: 2, decay: 0.9, seed: 4}
"""
    )
    cli = LightningCLI(LightningModule, run=False, args=["--config", str(config)], seed_everything_default=False)
    noise = next(callback for callback in cli.trainer.callbacks if isinstance(callback, GradientNoise))  # type: ignore[attr-defined]
    assert (noise.eta, noise.kind, noise.clipping, noise.start, noise.seed) == (0.3, "moments", "after", 2, 4)


# ---------------------------------------------------------------- ranks and strategies


def zero_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    for p in net.parameters():
        nn.init.zeros_(p)
    return net


class Silent(Made):
    """A module whose gradients are zero, so that the weights are the sum of the noise."""

    def __init__(self, make: Make) -> None:
        super().__init__(make, zero_net)

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        loss: Tensor = 0.0 * self(batch[0]).sum()
        return loss


class SilentClipping(Silent):
    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """There is one, so the noise comes before it, by a hook."""


def ours(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return SGDW(params, lr=1.0, momentum=0.0)


def theirs(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=1.0)


def walked(kind: Kind, make: Make, by_hand: bool) -> Tensor:
    module = (SilentClipping if by_hand else Silent)(make)
    fitting = trainer(GradientNoise(0.3, seed=2**40 + 6), strategy=strategy_of(kind), max_epochs=1)
    fitting.fit(module, batches())
    model: Any = fitting.strategy.model
    if kind == "fsdp1 full":
        with FullyShardedDataParallel.summon_full_params(model):
            return vector(module)
    params: list[Any] = [p.detach() for p in module.parameters()]
    return torch.cat([(p.full_tensor() if kind == "fsdp2 full" else p).reshape(-1) for p in params])


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [("ddp", 2), ("fsdp1 full", 1), ("fsdp1 full", 2), ("fsdp1 full", 4), ("fsdp2 full", 2), ("fsdp2 full", 4)],
)
@pytest.mark.parametrize(("make", "by_hand"), [(ours, False), (ours, True), (theirs, False)])
@pytest.mark.full
def test_every_strategy_sees_the_same_noise_in_every_way(kind: Kind, ranks: int, make: Make, by_hand: bool) -> None:
    same_noise(kind, ranks, make, by_hand)


@pytest.mark.parametrize(
    ("kind", "ranks", "make", "by_hand"),
    [
        ("ddp", 2, ours, False),
        ("fsdp1 full", 2, theirs, False),
        ("fsdp1 full", 4, ours, False),
        ("fsdp2 full", 2, ours, True),
    ],
)
def test_every_strategy_sees_the_same_noise(kind: Kind, ranks: int, make: Make, by_hand: bool) -> None:
    same_noise(kind, ranks, make, by_hand)


def same_noise(kind: Kind, ranks: int, make: Make, by_hand: bool) -> None:
    alone = walked("single", make, by_hand)
    assert float(alone.std()) == pytest.approx(sum(annealed(t) ** 2 for t in range(4)) ** 0.5, rel=0.4)
    for weights in run_ranks(walked, kind, make, by_hand, world_size=ranks):
        assert torch.equal(weights, alone)


def flat_parameters(_: int) -> str:
    strategy = CPUFSDP(auto_wrap_policy={nn.Linear}, use_orig_params=False)

    class Flat(Silent):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return self.make(list(self.trainer.model.parameters()))  # type: ignore[union-attr]

    try:
        trainer(GradientNoise(), strategy=strategy).fit(Flat(ours), batches())
    except OptionError as refused:
        return str(refused)
    return ""


def test_flat_parameters_are_refused() -> None:
    assert all("use_orig_params=True" in words for words in run_ranks(flat_parameters, 0))
