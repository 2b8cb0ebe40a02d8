"""Gradients in fewer bytes and rarer averaging: the arithmetic by hand, resumes bit for bit, refusals elsewhere."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.communication import count
from lightning_optim import OptimizerStrategy, create_optimizer
from lightning_optim.callbacks import Communication
from lightning_optim.distributed.powersgd import PowerSGD
from lightning_optim.errors import OptionError
from tests.harness.modules import Configured, Made, vector
from tests.harness.nets import seeded_net
from tests.harness.ranks import RankFailure, run_ranks
from tests.harness.strategies import rank, strategy_of
from tests.harness.trainers import Walk, trainer

ROOT = Path(__file__).parent.parent.parent
BATCH = 4
STEPS = 10
EPOCH = 5  # steps; a checkpoint there resumes exactly


def data(of_rank: int) -> tuple[Tensor, Tensor]:
    """The samples of one rank; every rank has its own."""
    x = torch.randn(EPOCH * BATCH, 8, generator=torch.Generator().manual_seed(10 + of_rank))
    return x, x @ torch.randn(8, 2, generator=torch.Generator().manual_seed(3))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    hidden = nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 24)
    return nn.Sequential(*hidden, nn.Tanh(), nn.Linear(24, 2))


def torchs(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=0.01)


def train(
    optimizer: Any,
    communication: dict[str, Any] | None,
    folder: Path | None = None,
    resume: Path | None = None,
    steps: int = STEPS,
    strategy: str | Strategy = "small buckets",
) -> list[Tensor]:
    """The weights of this rank after each step. Buckets of one kilobyte, so that there are several and they change."""
    module = Made(torchs, net) if optimizer == "torch" else Configured(optimizer, net)
    walk = Walk()
    callbacks: list[Callback] = [] if communication is None else [Communication(**communication)]
    if folder is not None:
        callbacks.append(ModelCheckpoint(folder, "{step}", every_n_train_steps=EPOCH, save_top_k=-1))
    strategy = DDPStrategy(bucket_cap_mb=1e-3) if strategy == "small buckets" else strategy
    fitting = trainer(*callbacks, walk, strategy=strategy, max_steps=steps, max_epochs=-1)
    fitting.fit(module, DataLoader(TensorDataset(*data(rank())), batch_size=BATCH), ckpt_path=resume)
    return walk.weights


# ---------------------------------------------------------------------- against the arithmetic by hand


def gradients(module: nn.Module, of_rank: int, step: int) -> list[Tensor]:
    """The gradients of one rank's batch."""
    x, y = (part[step % EPOCH * BATCH :][:BATCH] for part in data(of_rank))
    return list(torch.autograd.grad(nn.functional.mse_loss(module(x), y), list(module.parameters())))


@pytest.mark.parametrize(("kind", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_rounds_what_travels(kind: str, dtype: torch.dtype) -> None:
    """Each gradient is rounded, halved (exactly) and added in 16 bits."""
    module, lr = net(), 0.5
    parts = [[(g.to(dtype) / 2) for g in gradients(module, of_rank, 0)] for of_rank in (0, 1)]
    expected = [
        torch.sub(p.detach(), (a + b).float(), alpha=lr) for p, a, b in zip(module.parameters(), *parts, strict=True)
    ]
    walks = run_ranks(train, {"name": "sgdw", "lr": lr, "momentum": 0.0}, {"kind": kind}, steps=1)
    torch.testing.assert_close(walks[0][0], torch.cat([p.reshape(-1) for p in expected]), rtol=0, atol=1e-7)
    assert torch.equal(walks[0][0], walks[1][0])


@pytest.mark.parametrize("strategy", ["small buckets", "ddp"])
def test_powersgd_is_the_paper(strategy: str) -> None:
    """Algorithms 1 and 2 of arXiv:1905.13727 in numpy, for two workers: error feedback, one iteration, warm start."""
    lr, start, module = 0.1, 3, net()
    params = list(module.parameters())
    factor = {
        i: torch.randn(p.shape[1], generator=torch.Generator().manual_seed(i)).double().numpy()[:, None]
        for i, p in enumerate(params)
        if p.dim() == 2 and sum(p.shape) * 2 < p.numel()
    }
    assert sorted(factor) == [0, 2, 4]  # the last matrix is too small to be worth it
    errors: list[list[Any]] = [[0.0] * len(params) for _ in range(2)]
    for step in range(STEPS):
        grads = [[g.double().numpy() for g in gradients(module, worker, step)] for worker in (0, 1)]
        with torch.no_grad():
            for i, p in enumerate(params):
                sent = [grads[worker][i] + errors[worker][i] for worker in (0, 1)]
                update = (sent[0] + sent[1]) / 2
                if i in factor and step >= start:
                    q = factor[i] / np.linalg.norm(factor[i])
                    direction = (sent[0] + sent[1]) @ q
                    direction /= np.linalg.norm(direction)
                    factor[i] = (sent[0] + sent[1]).T @ direction / 2
                    update = direction @ factor[i].T
                    for worker in (0, 1):
                        errors[worker][i] = sent[worker] - update
                p.sub_(torch.from_numpy(update).float(), alpha=lr)
    options = {"kind": "powersgd", "start": start}
    walks = run_ranks(train, {"name": "sgdw", "lr": lr, "momentum": 0.0}, options, strategy=strategy)
    plain = run_ranks(train, {"name": "sgdw", "lr": lr, "momentum": 0.0}, None, strategy=strategy)
    # float32 on both sides, ten steps: 1e-5 is a hundred roundings, and the difference to plain DDP is far larger.
    torch.testing.assert_close(walks[0][-1], vector(module), rtol=0, atol=1e-5)
    torch.testing.assert_close(walks[0][start - 1], plain[0][start - 1], rtol=0, atol=1e-6)
    assert (walks[0][-1] - plain[0][-1]).abs().max() > 1e-3
    assert torch.equal(walks[0][-1], walks[1][-1])


EIGHT_BITS = pytest.param({"name": "adamw", "lr": 0.01, "state_bits": 8}, marks=pytest.mark.full)


@pytest.mark.parametrize("optimizer", ["adan", EIGHT_BITS, "torch"])
def test_post_local_sgd_is_local_steps_and_a_mean(optimizer: Any) -> None:
    """Two optimizers side by side in one process: mean gradients first, then own gradients and a mean of weights."""
    start, period = 3, 3
    nets = [net(), net()]
    made = [
        torch.optim.AdamW(one.parameters(), lr=0.01) if optimizer == "torch" else create_optimizer(optimizer, one)
        for one in nets
    ]
    walk: list[list[Tensor]] = [[], []]
    for step in range(STEPS):
        grads = [gradients(one, worker, step) for worker, one in enumerate(nets)]
        if step < start:
            mean = [(a + b) / 2 for a, b in zip(*grads, strict=True)]
            grads = [mean, mean]
        for one, its in zip(nets, grads, strict=True):
            for p, g in zip(one.parameters(), its, strict=True):
                p.grad = g.clone()
        for its_own in made:
            its_own.step()
        if step >= start and (step - start) % period == 0:
            with torch.no_grad():
                for a, b in zip(*(one.parameters() for one in nets), strict=True):
                    a.copy_((a + b) / 2)
                    b.copy_(a)
        for worker, one in enumerate(nets):
            walk[worker].append(vector(one))
    found = run_ranks(train, optimizer, {"kind": "post_local_sgd", "start": start, "period": period})
    for worker in (0, 1):
        torch.testing.assert_close(torch.stack(found[worker]), torch.stack(walk[worker]), rtol=1e-4, atol=2e-6)
    same = [torch.equal(a, b) for a, b in zip(*found, strict=True)]
    assert same == [step < start or (step - start) % period == 0 for step in range(STEPS)]


# ---------------------------------------------------------------------- checkpoints

RESUMED = [
    ("adan", {"kind": "powersgd", "start": 3, "rank": 2}),
    pytest.param("adan", {"kind": "bf16"}, marks=pytest.mark.full),
    pytest.param("adan", {"kind": "post_local_sgd", "start": 2, "period": 2}, marks=pytest.mark.full),
    ({"name": "adamw", "state_bits": 8}, {"kind": "post_local_sgd", "start": 2, "period": 4}),
    ("torch", {"kind": "post_local_sgd", "start": 2, "period": 4}),
]


@pytest.mark.parametrize(("optimizer", "communication"), RESUMED)
def test_a_resumed_run_is_the_uninterrupted_one(optimizer: Any, communication: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit on each rank; with a period of 4 the checkpoint lies between two averagings."""
    whole = run_ranks(train, optimizer, communication, tmp_path / "whole")
    resumed = run_ranks(train, optimizer, communication, tmp_path / "resumed", tmp_path / "whole" / "step=5.ckpt")
    for before, after in zip(whole, resumed, strict=True):
        assert torch.equal(torch.stack(before[EPOCH:]), torch.stack(after))
    held = torch.load(tmp_path / "whole" / "step=5.ckpt", weights_only=True)["callbacks"]["Communication"]
    assert held["kind"] == communication["kind"]
    if communication["kind"] == "powersgd":
        assert len(held["exchange"]["errors"]) == 2
        assert not torch.equal(*held["exchange"]["errors"])


def errors_after_loading(checkpoint: Path) -> Tensor:
    torch.distributed.init_process_group("gloo")
    exchange = PowerSGD(2, 3, list(net().parameters()))
    exchange.load(torch.load(checkpoint, weights_only=True)["callbacks"]["Communication"]["exchange"])
    state = exchange.state()
    return torch.stack(state["errors"]) if rank() == 0 else torch.empty(0)


def test_errors_move_to_another_number_of_ranks(tmp_path: Path) -> None:
    """What they add to the mean gradient stays; one process alone keeps them for later."""
    powersgd = {"kind": "powersgd", "start": 3, "rank": 2}
    run_ranks(train, "adan", powersgd, tmp_path / "two", steps=5)
    checkpoint = tmp_path / "two" / "step=5.ckpt"
    held = torch.load(checkpoint, weights_only=True)["callbacks"]["Communication"]["exchange"]
    mine = run_ranks(errors_after_loading, checkpoint, world_size=3)[0]
    mean = torch.stack(held["errors"]).mean(0)
    assert mean.abs().max() > 1e-3
    assert torch.equal(mine, mean.expand(3, -1))
    run_ranks(train, "adan", powersgd, tmp_path / "one", checkpoint, world_size=1)
    kept = torch.load(tmp_path / "one" / "step=10.ckpt", weights_only=True)["callbacks"]["Communication"]["exchange"]
    assert all(torch.equal(a, b) for a, b in zip(held["errors"], kept["errors"], strict=True))


# ---------------------------------------------------------------------- bytes


def matrices_and_rest(width: int) -> tuple[list[tuple[int, int]], int]:
    """The shapes of the benchmark's matrices, by hand, and how many other parameters there are."""
    layer = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    biases = 3 * width + width + 4 * width + width + 4 * width  # of the four, and two norms
    return [(1000, width), *layer, *layer, (1000, width)], 2 * biases + 1000


def test_bytes_of_a_step_by_hand() -> None:
    width, rank = 16, 4
    matrices, rest = matrices_and_rest(width)
    parameters = sum(n * m for n, m in matrices) + rest
    worth = [(n + m) * rank * 2 < n * m for n, m in matrices]
    assert 0 < sum(worth) < len(worth)
    thin = sum((n + m) * rank if is_worth else n * m for (n, m), is_worth in zip(matrices, worth, strict=True))
    expected = [
        ({"kind": "fp32"}, 4 * parameters),
        ({"kind": "bf16"}, 2 * parameters),
        ({"kind": "powersgd", "rank": rank}, 4 * (thin + rest)),
        ({"kind": "post_local_sgd", "period": 2}, 4 * parameters / 2),
    ]
    for setting, size in expected:
        for found in run_ranks(count, setting, width):
            assert (found["bytes"], found["parameters"]) == (size, parameters)


def test_the_page_holds_the_counts() -> None:
    steps = json.loads((ROOT / "benchmarks" / "results" / "communication.json").read_text())["steps"]
    text = (ROOT / "docs" / "communication.md").read_text()
    for row in steps:
        options = "".join(f", {name}={row[name]}" for name in ("rank", "period") if name in row)
        share = row["bytes"] / steps[0]["bytes"]
        assert f"| `{row['kind']}`{options} | {row['messages']:g} | {row['bytes']:,.0f} | {share:.3f} |" in text


# ---------------------------------------------------------------------- words and refusals


@pytest.mark.parametrize("page", ["communication", "faults"])
def test_examples_of_the_page_run(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(block, {})
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        config = yaml.safe_load(block)
        if "model" in config:
            assert OptimizerStrategy.parse(config["model"]["optimizer"]).communication is not None
        for callback in config.get("trainer", {}).get("callbacks", []):
            module, _, name = callback["class_path"].rpartition(".")
            getattr(importlib.import_module(module), name)(**callback.get("init_args", {}))


def test_a_word_of_the_optimizer_brings_it() -> None:
    spec = {"name": "adan", "communication": {"kind": "powersgd", "start": 3, "rank": 2}}
    by_word = run_ranks(train, spec, None)
    assert torch.equal(by_word[0][-1], run_ranks(train, "adan", {"kind": "powersgd", "start": 3, "rank": 2})[0][-1])
    assert OptimizerStrategy.parse(spec).as_config() == spec
    (companion,) = OptimizerStrategy("adan", communication="bf16").callbacks()
    assert isinstance(companion, Communication)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("bf61", "'bf61' is not one of bf16, fp16, powersgd, post_local_sgd. Did you mean bf16"),
        ({"kind": "bf16", "rank": 2}, "'bf16' has no option 'rank': it has none"),
        ({"kind": "powersgd", "period": 2}, "'powersgd' has no option 'period': its options are rank, start"),
        ({"kind": "powersgd", "rank": 0}, "rank=0 must be an integer of at least 1"),
        ({"kind": "powersgd", "start": 1}, "start=1 must be an integer of at least 2"),
        ({"kind": "post_local_sgd", "period": 1}, "period=1 must be an integer of at least 2"),
        ({"rank": 2}, "must be one of bf16, fp16, powersgd, post_local_sgd, or a mapping with kind"),
    ],
)
def test_a_wrong_word_gets_a_clear_sentence(spec: Any, says: str) -> None:
    with pytest.raises(OptionError) as caught:
        OptimizerStrategy("adan", communication=spec)
    assert says in str(caught.value)


def test_one_process_sends_nothing() -> None:
    alone = train("adan", {"kind": "powersgd", "start": 2}, strategy="auto")
    assert torch.equal(alone[-1], train("adan", None, strategy="auto")[-1])


def on_sharded(kind: Any) -> None:
    module = Made(torchs, seeded_net)
    module.configure_callbacks = lambda: [Communication("bf16")]  # type: ignore[method-assign]
    fitting = trainer(strategy=strategy_of(kind), max_steps=1)
    fitting.fit(module, DataLoader(TensorDataset(*data(rank())), batch_size=BATCH))


@pytest.mark.parametrize("kind", ["fsdp1 full", "fsdp2 full"])
def test_sharded_strategies_are_refused_with_advice(kind: str) -> None:
    with pytest.raises(RankFailure, match=r"Communication 'bf16' is for DDP, and the strategy is .*reduce_dtype"):
        run_ranks(on_sharded, kind)


def with_hook() -> None:
    train("adan", {"kind": "bf16"}, strategy=DDPStrategy(ddp_comm_hook=lambda state, bucket: None))


def with_all_ranks_local() -> None:
    train("adan", {"kind": "post_local_sgd", "local_ranks": 2})


def test_contradictions_are_refused() -> None:
    with pytest.raises(RankFailure, match="has a ddp_comm_hook already"):
        run_ranks(with_hook)
    with pytest.raises(RankFailure, match="local_ranks=2 must divide the number of ranks, 2, and be less"):
        run_ranks(with_all_ranks_local)
