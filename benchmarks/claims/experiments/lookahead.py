"""Whether Lookahead lowers the variance of its inner optimizer, and is robust to its learning rate."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import digits
from benchmarks.claims.finding import Finding, alike, higher, lower
from benchmarks.claims.models import memory, perceptron
from benchmarks.claims.plots import COLOURS, by_rate
from benchmarks.claims.results import Measured, Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, evaluate, optimizer_of, outcome, train
from benchmarks.pictures import new_figure
from lightning_optim import SGD
from lightning_optim.core.foreign_stages import attach
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.grid import rounded
from lightning_optim.race.outcome import Outcome
from lightning_optim.stages import Lookahead

SEEDS, NET_SEEDS = 5, 12
K = 5  # steps between two syncs
RATES = (0.3, 1.0, 1.7)  # of the quadratic, whose largest curvature is 1: SGD diverges from 2 on
ENDS = (0.1, 0.3, 1.0)  # rates of SGD whose risk Lookahead is to end at
NEAR = 1.1  # times its last value: the risk has arrived
NET_FACTORS = tuple(rounded(10 ** (i / 3)) for i in range(-5, 6))  # five thirds of a decade to either side
MARGIN = 0.02  # of the formula
USABLE = 1.5  # times the lowest loss of the grid


def steady(curvature: Tensor, lr: float, alpha: float) -> Tensor:
    """The variances of the slow weights that a run arrives at, by curvature (Zhang et al. 2019, proposition 2).

    The optimum that a gradient sees has the variance 1 / curvature. An `alpha` of 1 is SGD.
    """
    r = 1 - lr * curvature
    inner = lr * lr * curvature / (1 - r * r)
    shrinks = alpha * alpha * (1 - r ** (2 * K))
    return inner * shrinks / (shrinks + 2 * alpha * (1 - alpha) * (1 - r**K))


def last_loss(curvature: Tensor, lr: float, alpha: float) -> float:
    """The expected loss that a run arrives at."""
    return float((curvature * steady(curvature, lr, alpha)).sum()) / 2


def curvatures(count: int) -> Tensor:
    """1, 1/2, 1/3, ..."""
    return 1 / torch.arange(1, count + 1, dtype=torch.float64)


def matched(curvature: Tensor, risk: float, alpha: float) -> float:
    """The learning rate at which Lookahead ends at a risk, found by halving an interval."""
    low, high = 0.0, 2.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if last_loss(curvature, middle, alpha) < risk else (low, middle)
    return rounded(low)


@dataclass(frozen=True)
class Quadratic:
    """SGD on independent copies of the noisy quadratic of the paper, with Lookahead where `alpha` is below 1."""

    start: float
    curvatures: int
    copies: int
    steps: int

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        generator = torch.Generator().manual_seed(seed)
        a = curvatures(self.curvatures)
        theta = torch.nn.Parameter(torch.full((self.copies, len(a)), self.start, dtype=torch.float64))
        alpha = candidate.spec["alpha"]
        optimizer = SGD([theta], lr=lr)
        if alpha < 1:
            attach(Lookahead(K, alpha), optimizer)
        risks, squares = [], []
        for step in range(1, self.steps + 1):
            optimum = torch.randn(theta.shape, generator=generator, dtype=torch.float64) / a.sqrt()
            theta.grad = a * (theta.detach() - optimum)
            optimizer.step()
            if step % K == 0:
                squares.append(theta.detach().square().mean(0))
                risks.append(float((a * squares[-1]).sum()) / 2)
        measured = torch.stack(squares[len(squares) // 2 :]).mean(0)
        goal = NEAR * last_loss(a, lr, alpha)
        arrived = next((i for i, risk in enumerate(risks, 1) if risk <= goal), len(risks))
        loss, share = float((a * measured).sum()) / 2, float((measured / steady(a, lr, alpha)).mean())
        return Outcome(metrics={"loss": loss, "share of the formula": share, "steps": float(K * arrived)})


@dataclass(frozen=True)
class Net:
    """Trains a perceptron on digits in small batches at a constant learning rate."""

    width: int
    steps: int
    batch: int = 16

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        images, choose, test = (split.to(DEVICE) for split in digits())
        model = perceptron(self.width).to(DEVICE)
        spec = dict(candidate.spec)
        alpha = spec.pop("alpha")
        optimizer = optimizer_of(model, spec, lr)
        if alpha < 1:
            attach(Lookahead(K, alpha), optimizer)
        late: list[float] = []

        def look(step: int) -> None:
            if (step + 1) % K == 0 and step >= self.steps * 3 // 4:
                late.append(evaluate(model, test.x, test.y)[0])

        losses = train(model, optimizer, images.batches(self.batch, seed), self.steps, after=look)
        last, _ = evaluate(model, choose.x, choose.y)
        tested, right = evaluate(model, test.x, test.y)
        told = {"loss": last, "test loss": tested, "test error": 1 - right}
        if len(losses) == self.steps:  # of a run that diverged there is no last quarter
            told["fluctuation"] = fluctuation(late)
        return replace(outcome(losses, self.steps, **told), curves={})


def fluctuation(values: list[float]) -> float:
    """The standard deviation around a straight line."""
    if len(values) < 3:
        return 1e-6
    line = statistics.linear_regression(range(len(values)), values)
    return max(1e-6, statistics.pstdev(y - line.slope * i for i, y in enumerate(values)))


def parts(size: Size) -> list[Part]:
    lengths = size.wide(50), size.wide(100), K * size.long(1200, 4)
    at_rest, from_far = Quadratic(0.0, *lengths), Quadratic(10.0, *lengths)
    a, seeds = curvatures(at_rest.curvatures), size.seeds(SEEDS)
    same_rate = [Arm("SGD", 1.0, {"alpha": 1.0}), Arm("Lookahead", 1.0, {}, {"alpha": size.some((0.2, 0.5, 0.8))})]
    same_end = [Arm(f"SGD to {lr}", lr, {"alpha": 1.0}) for lr in ENDS]
    same_end += [Arm(f"Lookahead to {lr}", matched(a, last_loss(a, lr, 1.0), 0.5), {"alpha": 0.5}) for lr in ENDS]
    net = Net(size.wide(64), K * size.long(100, 8))
    inner: dict[str, tuple[float, Mapping[str, Any]]] = {
        "SGD": (0.05, {"name": "sgd", "momentum": 0.9}),
        "AdamW": (5e-3, {"name": "adamw"}),
    }
    on_net = [Arm(name, lr, {**spec, "alpha": 1.0}) for name, (lr, spec) in inner.items()]
    on_net += [Arm(f"Lookahead of {name}", lr, {**spec, "alpha": 0.5}) for name, (lr, spec) in inner.items()]
    needed = memory(lambda: perceptron(net.width), activations=1000 * net.width)
    return [
        Part("same rate", at_rest, same_rate, factors=size.some(RATES), seeds=seeds),
        Part("same end", from_far, same_end, seeds=seeds),
        Part("net", net, on_net, factors=size.some(NET_FACTORS), seeds=size.seeds(NET_SEEDS), bytes=needed),
    ]


def over_rates(found: Measured, arm: str, metric: str, **options: Any) -> dict[int, float]:
    """The geometric mean of a metric over an arm's learning rates, by seed."""
    columns = [found.values(arm, lr, metric, **options) for lr in found.rates(arm)]
    return {seed: statistics.geometric_mean([column[seed] for column in columns]) for seed in columns[0]}


def range_of_rates(found: Measured, arm: str) -> dict[int, float]:
    """Over how many powers of ten of learning rates the test loss is at most `USABLE` times the lowest, by seed."""
    rates = found.rates(arm)
    step = math.log10(rates[-1] / rates[0]) / (len(rates) - 1)
    columns = [found.values(arm, lr, "test loss") for lr in rates]
    lowest = {seed: min(column[seed] for column in columns) for seed in columns[0]}
    return {seed: step * sum(column[seed] <= USABLE * least for column in columns) for seed, least in lowest.items()}


def judge(results: Results) -> list[Finding]:
    rate, end, net = results["same rate"], results["same end"], results["net"]
    alphas = [cell.spec["alpha"] for cell in rate.arm("Lookahead").cells()]
    alpha = 0.5 if 0.5 in alphas else alphas[0]
    shares = [over_rates(rate, "Lookahead", "share of the formula", alpha=one) for one in alphas]
    share = {seed: statistics.fmean(column[seed] for column in shares) for seed in shares[0]}
    goals = [name for name in (arm.name for arm in end.part.arms) if name.startswith("SGD")]

    def steps(of: Callable[[str], str]) -> dict[int, float]:
        columns = [end.values(of(name), metric="steps") for name in goals]
        return {seed: statistics.geometric_mean([column[seed] for column in columns]) for seed in columns[0]}

    statements = (
        "Quadratic: the variance of slow weights is that of the formula.",
        "Quadratic, same learning rate: Lookahead ends at a lower loss.",
        "Quadratic, rates at which both end at the same loss: Lookahead is there in fewer steps.",
    )
    names = ("Lookahead", "SGD")
    slow, fast = over_rates(rate, "Lookahead", "loss", alpha=alpha), over_rates(rate, "SGD", "loss")
    until, others = steps(lambda name: name.replace("SGD", "Lookahead")), steps(lambda name: name)
    found = [
        alike(statements[0], share, 1.0, MARGIN, names=("measured, as a share of the formula,", "formula")),
        lower(statements[1], slow, fast, names=names, ratio=True),
        lower(statements[2], until, others, "steps", names=names, ratio=True),
    ]
    for name in ("SGD", "AdamW"):
        names = (f"Lookahead of {name}", name)
        slow, fast = (net.values(arm, metric="fluctuation") for arm in names)
        statement = f"Digits, {name}, each at its best rate: with Lookahead the test loss fluctuates less."
        found.append(lower(statement, slow, fast, "nats", names=names, ratio=True))
        statement = f"Digits, {name}: with Lookahead more learning rates are good."
        slow, fast = (range_of_rates(net, arm) for arm in names)
        found.append(higher(statement, slow, fast, "powers of ten", names=names))
    return found


def draw(results: Results) -> Any:
    figure, (left, middle, right) = new_figure(1, 3, 11, 3.6)
    rate, net = results["same rate"], results["net"]
    rates = rate.rates("SGD")
    a = curvatures(rate.part.settings["curvatures"])
    between = [rates[0] + (rates[-1] - rates[0]) * i / 60 for i in range(61)]
    cells = [("SGD", 1.0), *(("Lookahead", cell.spec["alpha"]) for cell in rate.arm("Lookahead").cells())]
    for (arm, alpha), colour in zip(cells, COLOURS, strict=False):
        label = arm if alpha == 1 else f"Lookahead, alpha {alpha}"
        left.plot(between, [last_loss(a, lr, alpha) for lr in between], color=colour, label=label)
        left.plot(rates, [rate.mean(arm, lr, "loss", alpha=alpha) for lr in rates], "o", color=colour)
    left.set(yscale="log", xlabel="learning rate", ylabel="last loss", title="Noisy quadratic")
    left.legend(fontsize=8, title="lines: the formula", title_fontsize=8)
    for side, colour in zip(net.part.arms, COLOURS, strict=False):
        by_rate(middle, net, side.name, "test loss", color=colour)
        by_rate(right, net, side.name, "fluctuation", color=colour)
    middle.set(yscale="log", ylabel="test loss, nats", title="Digits, perceptron")
    right.set(yscale="log", ylim=(1e-3, 1), ylabel="fluctuation of test loss, nats", title="Digits, last quarter")
    middle.legend(fontsize=7, loc="upper center")
    return figure


CLAIM = Claim(
    name="lookahead",
    title="Lookahead lowers the variance of its inner optimizer, and is robust to its learning rate.",
    papers="Zhang et al. 2019, arXiv:1907.08610",
    setting="the noisy quadratic with 50 curvatures 1/i, 6000 steps; a perceptron on digits, batches of 16, 500 steps, "
    "11 learning rates; Lookahead with k = 5 and alpha = 0.5",
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims lookahead --size large`: width 512, 5000 steps",
)
