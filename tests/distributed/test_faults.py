"""Ranks that die, files that are torn, gradients that are not finite: what is left, and that all ranks agree on it."""

from __future__ import annotations

import os
import re
import resource
import signal
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from lightning_optim import create_optimizer
from lightning_optim.callbacks import CheckpointIntegrity, Communication, IterateAveraging, NonFiniteGuard
from lightning_optim.callbacks.non_finite_guard import all_finite
from lightning_optim.checkpoints.integrity import damage
from lightning_optim.errors import OptionError
from tests.harness.data import seeded_samples
from tests.harness.modules import Made
from tests.harness.nets import seeded_net
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.strategies import Kind, rank, strategy_of
from tests.harness.trainers import trainer

EPOCH = 4  # steps, of 8 samples on each rank

pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`:UserWarning")


def make(optimizer: Any, module: nn.Module) -> torch.optim.Optimizer:
    if optimizer == "torch":
        return torch.optim.AdamW(module.parameters(), lr=1e-2)
    made: torch.optim.Optimizer = create_optimizer(optimizer, list(module.parameters()))
    return made


def seeded(net: Callable[[], nn.Module] = seeded_net) -> Made:
    return Made(lambda params: torch.optim.AdamW(params, lr=1e-2), net)


def fit(
    kind: Kind | None,
    *callbacks: Callback,
    optimizer: Any = "adan",
    folder: Path | None = None,
    resume: Path | None = None,
    module: Made | None = None,
    **options: Any,
) -> Made:
    """Two epochs, with a checkpoint after each; the module, with the losses of this rank."""
    module = module or seeded()
    module.configure_optimizers = lambda: make(optimizer, module)  # type: ignore[method-assign]
    saves = [] if folder is None else [ModelCheckpoint(folder, "last", enable_version_counter=False)]
    timeout: dict[str, Any] = {"timeout": timedelta(seconds=6)} if kind == "ddp" else {}
    strategy = strategy_of(kind or "single", **timeout)
    fitting = trainer(*callbacks, *saves, strategy=strategy, **{"max_epochs": 2, **options})
    fitting.fit(module, DataLoader(seeded_samples(EPOCH * 8, seed=rank()), batch_size=8), ckpt_path=resume)
    return module


def losses(kind: Kind | None, folder: Path, resume: Path | None = None, epochs: int = 2) -> list[float]:
    return fit(kind, CheckpointIntegrity(), folder=folder, resume=resume, max_epochs=epochs).losses


# ---------------------------------------------------------------------- a rank dies


class Dies(Callback):
    """Rank 1 gets a signal between the backward pass and the step of its sixth batch."""

    def __init__(self, with_signal: signal.Signals) -> None:
        self.signal = with_signal

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if rank() == 1 and trainer.global_step == EPOCH + 1:
            os.kill(os.getpid(), self.signal)


def die_in_a_step(kind: Kind, folder: Path, with_signal: signal.Signals) -> None:
    fit(kind, CheckpointIntegrity(), Dies(with_signal), folder=folder)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp1 full", marks=pytest.mark.full), "fsdp2 sharded"])
def test_a_rank_killed_in_a_step_ends_the_run_and_not_the_checkpoint(kind: Kind, tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RankFailure, match="rank 1: killed by SIGKILL") as caught:
        run_ranks(die_in_a_step, kind, tmp_path, signal.SIGKILL)
    assert time.monotonic() - start < 40  # on a busy machine; a peer that is gone is noticed at once
    assert "still running" not in caught.value.consequences[0]
    whole = run_ranks(losses, kind, tmp_path / "whole")
    resumed = run_ranks(losses, kind, tmp_path / "resumed", tmp_path / "last.ckpt")
    assert resumed == [mine[EPOCH:] for mine in whole]


def test_a_rank_that_stands_still_is_noticed_after_the_timeout(tmp_path: Path) -> None:
    """Of the process group, which is the strategy's: six seconds here."""
    with pytest.raises(RankFailure) as caught:
        run_ranks(die_in_a_step, "ddp", tmp_path, signal.SIGSTOP)
    assert re.search(r"rank 0.*(Timed out waiting 6000ms|[Tt]imeout caused)", str(caught.value))
    assert damage(tmp_path / "last.ckpt") == ""


# ---------------------------------------------------------------------- a save is interrupted


class DiesWhileSaving(Callback):
    """The second save of one rank ends in the middle of a write: files may grow to so many bytes, then SIGKILL."""

    def __init__(self, victim: int, size: int, while_moving: bool) -> None:
        self.victim, self.size, self.while_moving = victim, size, while_moving
        self.saves = 0

    def state_dict(self) -> dict[str, Any]:
        self.saves += 1
        if self.saves == 2 and rank() == self.victim:
            if self.while_moving:
                rename = os.rename

                def rename_and_starve(*args: Any, **kwargs: Any) -> None:
                    self._starve()
                    rename(*args, **kwargs)

                os.rename = rename_and_starve
            else:
                self._starve()
        return {}

    def _starve(self) -> None:
        for said in (1, 2):  # what is printed may go to a file as well
            os.dup2(os.open(os.devnull, os.O_WRONLY), said)
        signal.signal(signal.SIGXFSZ, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def die_in_a_save(kind: Kind, folder: Path, victim: int, while_moving: bool, guard: list[Callback], disk: str) -> None:
    tempfile.tempdir = disk
    fit(kind, *guard, DiesWhileSaving(victim, 3000, while_moving), folder=folder)


@pytest.fixture
def elsewhere(tmp_path: Path) -> str:
    """Where temporary files are on another disk than checkpoints, as on a cluster."""
    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs a second file system")
    return str(other)


CASES = [
    ("ddp", 0, True),
    pytest.param("fsdp1 sharded", 1, False, marks=pytest.mark.full),
    ("fsdp2 sharded", 1, False),
]


@pytest.mark.parametrize(("kind", "victim", "while_moving"), CASES)
def test_a_save_is_whole_or_not_there(
    kind: Kind, victim: int, while_moving: bool, tmp_path: Path, elsewhere: str
) -> None:
    """The checkpoint of the first epoch is being replaced by that of the second, under the same name."""
    with pytest.raises(RankFailure, match=f"rank {victim}: killed by SIGKILL") as caught:
        run_ranks(die_in_a_save, kind, tmp_path, victim, while_moving, [CheckpointIntegrity()], elsewhere)
    assert "still running" not in str(caught.value)
    torn = tmp_path / ".partial" / "last.ckpt"
    assert damage(torn)
    assert damage(tmp_path / "last.ckpt") == ""
    whole = run_ranks(losses, kind, tmp_path / "whole")
    resumed = run_ranks(losses, kind, tmp_path, tmp_path / "last.ckpt")
    assert resumed == [mine[EPOCH:] for mine in whole]
    assert not torn.exists()  # the next save cleared it away


@pytest.mark.parametrize(("kind", "victim", "while_moving"), CASES)
def test_without_the_callback_the_newest_is_torn(
    kind: Kind, victim: int, while_moving: bool, tmp_path: Path, elsewhere: str
) -> None:
    """Why there is one. Should this fail one day, Lightning has become atomic and the callback can go."""
    with pytest.raises(RankFailure, match="killed by SIGKILL"):
        run_ranks(die_in_a_save, kind, tmp_path, victim, while_moving, [], elsewhere)
    assert damage(tmp_path / "last.ckpt")


def die_between_renames(folder: Path) -> None:
    rename = Path.rename

    def rename_once(self: Path, target: Path) -> Path:
        found = rename(self, target)
        if self == folder / "last.ckpt":
            os.kill(os.getpid(), signal.SIGKILL)
        return found

    class SecondSave(Callback):
        saves = 0

        def state_dict(self) -> dict[str, Any]:
            self.saves += 1
            if self.saves == 2 and rank() == 0:
                Path.rename = rename_once  # type: ignore[assignment, method-assign]
            return {}

    fit("fsdp2 sharded", CheckpointIntegrity(), SecondSave(), folder=folder)


def test_a_folder_that_was_being_exchanged_is_recovered(tmp_path: Path) -> None:
    """Between the two renames both folders are whole; the new one is taken."""
    with pytest.raises(RankFailure, match="rank 0: killed by SIGKILL"):
        run_ranks(die_between_renames, tmp_path)
    assert not (tmp_path / "last.ckpt").exists()
    whole = run_ranks(losses, "fsdp2 sharded", tmp_path / "whole", epochs=3)
    resumed = run_ranks(losses, "fsdp2 sharded", tmp_path, tmp_path / "last.ckpt", epochs=3)
    assert resumed == [mine[2 * EPOCH :] for mine in whole]


def test_what_writes_later_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot know when AsyncCheckpointIO has written"):
        fit(None, CheckpointIntegrity(), folder=tmp_path, plugins=[AsyncCheckpointIO()])


# ---------------------------------------------------------------------- a checkpoint is damaged


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def flip(path: Path) -> None:
    """One bit of one number of a tensor."""
    data = bytearray(path.read_bytes())
    data[data.index(torch.arange(16.0).numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)


def marked() -> Made:
    """With a buffer whose bytes are found in a file."""
    module = seeded()
    module.register_buffer("mark", torch.arange(16.0))
    return module


def weights(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize(("harm", "says"), [(cut, "is truncated"), (flip, "was changed after it was written")])
def test_a_damaged_file_is_refused_before_anything_is_loaded(
    harm: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    fit(None, folder=tmp_path, module=marked())
    checkpoint = tmp_path / "last.ckpt"
    assert damage(checkpoint) == ""
    harm(checkpoint)
    fresh = marked()
    before = weights(fresh)
    with pytest.raises(OptionError, match=f"The checkpoint is damaged: .*{says}.*Nothing was loaded"):
        fit(None, CheckpointIntegrity(), resume=checkpoint, module=fresh, max_epochs=3)
    assert torch.equal(weights(fresh), before)
    assert not fresh.losses


def test_torch_alone_loads_a_flipped_bit(tmp_path: Path) -> None:
    """Why a file is read twice."""
    fit(None, folder=tmp_path, module=marked())
    flip(tmp_path / "last.ckpt")
    assert not torch.equal(torch.load(tmp_path / "last.ckpt")["state_dict"]["mark"], torch.arange(16.0))


def save_marked(kind: Kind, folder: Path) -> None:
    fit(kind, CheckpointIntegrity(), folder=folder, module=marked(), max_epochs=1)


def refusals(kind: Kind, folder: Path) -> tuple[str, bool]:
    """What a rank says to a damaged checkpoint, and whether its weights are as they were."""
    seen: list[Tensor] = []

    class Before(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(local_weights(pl_module))

    module = marked()
    try:
        fit(kind, CheckpointIntegrity(), Before(), resume=folder, module=module, max_epochs=3)
    except OptionError as error:
        return str(error), torch.equal(seen[0], local_weights(module))
    return "", False


def local_weights(module: nn.Module) -> Tensor:
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in module.parameters()]
    return torch.cat([part.detach().reshape(-1) for part in parts]).clone()


@pytest.mark.parametrize("kind", [pytest.param("fsdp1 sharded", marks=pytest.mark.full), "fsdp2 sharded"])
def test_a_damaged_folder_is_refused_by_every_rank(kind: Kind, tmp_path: Path) -> None:
    run_ranks(save_marked, kind, tmp_path)
    checkpoint = tmp_path / "last.ckpt"
    part = next(
        part for part in checkpoint.glob("*.distcp") if torch.arange(16.0).numpy().tobytes() in part.read_bytes()
    )
    intact = part.read_bytes()
    for harm, says in (
        (cut, "missing or truncated"),
        (flip, "was changed after it was written"),
        (Path.unlink, "missing or truncated"),
        (lambda _: (checkpoint / "meta.pt").unlink(), "its save was never finished"),
    ):
        part.write_bytes(intact)
        harm(part)
        told = run_ranks(refusals, kind, checkpoint)
        assert says in told[0][0]
        assert all("Nothing was loaded" in said and unchanged for said, unchanged in told)


def test_a_load_that_fails_half_way_is_undone(tmp_path: Path) -> None:
    """Lightning loads the weights first. An edited optimizer state is found only when they are in."""
    fit(None, folder=tmp_path)
    held = torch.load(tmp_path / "last.ckpt")
    held["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(3, 3)
    torch.save(held, tmp_path / "edited.ckpt")
    fresh = seeded()
    before = weights(fresh)
    with pytest.raises(ValueError, match="exp_avg"):
        fit(None, CheckpointIntegrity(), resume=tmp_path / "edited.ckpt", module=fresh, max_epochs=3)
    assert torch.equal(weights(fresh), before)


# ---------------------------------------------------------------------- a gradient is not finite


class Spoils(Callback):
    """One gradient of one rank becomes NaN at some steps: all of it before it is reduced, or an element of its part."""

    def __init__(self, at: tuple[int, ...], reduced: bool, victim: int = 1) -> None:
        self.at, self.reduced, self.victim = at, reduced, victim

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if not self.reduced and trainer.global_step in self.at and rank() == self.victim:
            loss.register_hook(lambda grad: grad * torch.nan)  # type: ignore[no-untyped-call]

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.reduced and trainer.global_step in self.at and rank() == self.victim:
            grads: list[Any] = [p.grad for p in pl_module.parameters() if p.grad is not None]
            parts = [grad.to_local() if hasattr(grad, "to_local") else grad for grad in grads]
            next(part for part in parts if part.numel()).view(-1)[-1] = torch.nan


def guarded(
    kind: Kind | None, optimizer: Any, spoils: Spoils, guard: NonFiniteGuard, *others: Callback, **options: Any
) -> dict[str, Any]:
    """Weights of this rank, counters of its state, and what the guard counted."""
    module = fit(kind, spoils, guard, *others, optimizer=optimizer, **options)
    (made,) = module.trainer.optimizers
    steps = {int(state["step"]) for state in made.state.values() if "step" in state}
    return {
        "weights": local_weights(module),
        "state": [made.state[p] for p in module.parameters()] if kind is None else [],
        "steps": steps,
        "skipped": guard.skipped,
        "losses": module.losses,
    }


EIGHT_BITS = {"name": "adamw", "lr": 0.01, "state_bits": 8}
SPOILT: list[tuple[Kind, bool, Any]] = [
    ("ddp", False, EIGHT_BITS),
    ("fsdp1 full", True, "lamb"),
    ("fsdp1 full", False, "torch"),
    ("fsdp2 full", True, "koala_v"),
]
OTHERS = [
    pytest.param(kind, reduced, optimizer, marks=pytest.mark.full)
    for kind, reduced, _ in SPOILT
    for optimizer in ("torch", EIGHT_BITS, "lamb", "koala_v")
    if (kind, reduced, optimizer) not in SPOILT
]


@pytest.mark.parametrize(("kind", "reduced", "optimizer"), [*SPOILT, *OTHERS])
def test_all_ranks_skip_the_same_steps(kind: Kind, reduced: bool, optimizer: Any) -> None:
    """NaN on rank 1 alone, also in a shard that rank 0 does not see. Of a bias of one element a rank holds nothing."""
    found = run_ranks(guarded, kind, optimizer, Spoils((1, 4, 5), reduced), NonFiniteGuard())
    for one in found:
        assert one["skipped"] == 3
        assert one["steps"] == {2 * EPOCH - 3}
        assert one["weights"].isfinite().all()
        assert len(one["losses"]) == 2 * EPOCH
    if kind == "ddp":
        assert torch.equal(found[0]["weights"], found[1]["weights"])


def thin_net() -> nn.Sequential:
    """Its last layer has one element: under FSDP1 one of two ranks holds nothing of a whole unit."""
    return seeded_net().append(nn.Linear(1, 1, bias=False))


def thin(optimizer: Any) -> dict[str, Any]:
    return guarded("fsdp1 full", optimizer, Spoils((1, 4), True), NonFiniteGuard(), module=seeded(thin_net))


@pytest.mark.parametrize("optimizer", ["lamb", "torch"])
def test_ranks_that_hold_nothing_of_a_unit_skip_as_well(optimizer: Any) -> None:
    """FSDP1 keeps a gradient for such a rank, which must go too, or it alone would take part in the step's sums."""
    found = run_ranks(thin, optimizer)
    assert [one["skipped"] for one in found] == [2, 2]
    assert sum(one["weights"].numel() for one in found) == sum(p.numel() for p in thin_net().parameters())
    assert all(one["steps"] == {2 * EPOCH - 2} for one in found)


def without(optimizer: Any, skip: tuple[int, ...]) -> Tensor:
    """The weights after a training that never saw some of the batches, by hand."""
    module = seeded()
    made = make(optimizer, module)
    x = torch.randn(EPOCH * 8, 8, generator=torch.Generator().manual_seed(0))
    for step in (step for step in range(2 * EPOCH) if step not in skip):
        batch = x[step % EPOCH * 8 :][:8]

        def closure(batch: Tensor = batch) -> float:
            made.zero_grad()
            loss = nn.functional.mse_loss(module(batch), batch[:, :1] * 2)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.item()

        made.step(closure)
    return weights(module)


@pytest.mark.filterwarnings("ignore:NonFiniteGuard skips step")
@pytest.mark.parametrize("optimizer", ["torch", "adan", "adapnm", "adafactor", "koala_m"])
def test_a_skipped_step_leaves_no_trace(optimizer: Any) -> None:
    """The run ends where one ends that never saw those batches: no moment, counter, parity or prediction moved."""
    average = IterateAveraging("ema", decay=0.5)
    spoilt = guarded(None, optimizer, Spoils((0, 3, 4), True, victim=0), NonFiniteGuard(), average)
    assert spoilt["skipped"] == 3
    assert average.state_dict()["counts"] == [2 * EPOCH - 3]
    raw = torch.cat([state["average"].reshape(-1) for state in spoilt["state"]])  # the model has the average now
    assert torch.equal(raw, without(optimizer, (0, 3, 4)))


@pytest.mark.parametrize("kind", ["ddp", "fsdp2 full"])
def test_raise_names_the_gradient_on_every_rank(kind: Kind) -> None:
    with pytest.raises(RankFailure) as caught:
        run_ranks(guarded, kind, "adan", Spoils((2,), kind != "ddp"), NonFiniteGuard("raise"))
    said = str(caught.value)
    assert "rank 1: FloatingPointError: NonFiniteGuard: step 2: the gradient of net.0.weight is not finite" in said
    other = "another rank has a gradient" if kind != "ddp" else "the gradient of net.0.weight"
    assert f"rank 0: FloatingPointError: NonFiniteGuard: step 2: {other}" in said


@pytest.mark.filterwarnings("ignore:NonFiniteGuard skips step")
def test_patience_counts_skips_in_a_row_and_is_saved(tmp_path: Path) -> None:
    """Two, a good one, then three: with a checkpoint after the first epoch of four."""
    spoils = Spoils((0, 1, 3, 4, 5), True, victim=0)
    with pytest.raises(FloatingPointError, match="3 steps in a row were skipped, the last at step 5: the gradient of"):
        guarded(None, "adan", spoils, NonFiniteGuard(patience=3), folder=tmp_path)
    assert torch.load(tmp_path / "last.ckpt")["callbacks"]["NonFiniteGuard"] == {"skipped": 3, "in_a_row": 1}
    with pytest.raises(FloatingPointError, match="3 steps in a row were skipped, the last at step 5"):
        guarded(None, "adan", spoils, NonFiniteGuard(patience=3), resume=tmp_path / "last.ckpt")


def test_each_skip_is_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    with pytest.warns(UserWarning, match=r"NonFiniteGuard skips step 6: the gradient of net\.0\.weight is not finite"):
        guarded(None, "adan", Spoils((6,), True, 0), NonFiniteGuard(), logger=logger, log_every_n_steps=1)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("non_finite_guard/skipped_steps")] == [(6, 1.0)]


@pytest.mark.filterwarnings("ignore:NonFiniteGuard skips step")
def test_beside_a_gradient_scaler() -> None:
    """Its first scale overflows float16; it goes on halving it, and the guard counts what it skipped."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    found = guarded(None, "adan", Spoils((), True), NonFiniteGuard(patience=None), plugins=plugins, max_epochs=10)
    assert found["skipped"] > 3
    assert scaler.get_scale() == 2.0 ** (40 - found["skipped"])
    assert found["steps"] == {10 * EPOCH - found["skipped"]}
    with pytest.raises(OptionError, match="would end the training at the first overflow"):
        guarded(None, "adan", Spoils((), True), NonFiniteGuard("raise"), plugins=plugins)


def test_powersgd_recovers_from_a_bad_gradient() -> None:
    """Its error feedback remembers what it was given, NaN for ever, unless it begins anew."""
    communication = Communication("powersgd", start=2)
    found = run_ranks(guarded, "ddp", "adan", Spoils((4,), False), NonFiniteGuard(), communication)
    assert [one["skipped"] for one in found] == [1, 1]
    assert torch.equal(found[0]["weights"], found[1]["weights"])
    assert found[0]["weights"].isfinite().all()


@pytest.mark.parametrize(("options", "says"), [({"action": "ignore"}, "'skip' or 'raise'"), ({"patience": 0}, "at le")])
def test_wrong_options_get_a_clear_sentence(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        NonFiniteGuard(**options)


def test_large_numbers_are_finite() -> None:
    """1e30 has a square that float32 does not hold, in whatever company."""
    p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    p.grad, q.grad = torch.tensor([1e30, 0.0, -3e38]), torch.tensor([6e4, 6e4], dtype=torch.float16)
    assert all_finite([p, q])
    for bad in (torch.nan, torch.inf, -torch.inf):
        p.grad[1] = bad
        assert not all_finite([p, q])
