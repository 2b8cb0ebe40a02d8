"""Is training near a stationary point, or has only the distribution of its iterates stopped changing?

Zhang, Li, Sra & Jadbabaie 2022, "Neural Network Weights Do Not Converge to Stationary Points: An Invariant Measure
Perspective", arXiv:2110.06256: the loss of large models settles while the gradient does not vanish and the weights keep
moving. The tests are our own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_optim.analysis.block_means import Change, Window, changes, slope_of, trend, within_block
from lightning_optim.analysis.gradient_square import FullGradient, flat_rows, full_gradient
from lightning_optim.errors import OptionError, check, is_whole, shown

Verdict = Literal["approaching a stationary point", "invariant measure reached", "still moving", "undecided"]

SMALL = 0.05  # of the first window or gradient
LEAST = 64  # iterates
BLOCKS = 32  # in a window
SERIES = 16  # random projections
AT_REST = 1e-6  # of the first steps
SURE = 1e-3  # probability to find shorter or longer steps where there are none
SMOOTH = 0.95  # of the steps: so many are shorter than the one before only where there is no noise


@dataclass(frozen=True)
class Stationarity:
    """A verdict with its evidence.

    Attributes:
        verdict: "approaching a stationary point": steps and gradient shrink towards nothing. "invariant measure
            reached": the weights keep moving, and their distribution does not change any more. "still moving": it
            changes. "undecided": the evidence contradicts itself.
        evidence: The reason, as a sentence.
        changed: The series whose law has changed, with the test that found it.
        wandering: Number of series that may be random walks.
        slowdown: Length of a step in the last window relative to the window before.
        level: The same relative to the first window.
        displacement: Distance from the beginning of the last window to its end, in units of the parameters.
        straightness: Displacement divided by the length of the path; 1 for a straight line.
        loss: Mean loss in the last window; NaN without losses.
        loss_slope: Slope of the loss over two windows, per window.
        loss_slope_error: Its standard error.
        gradient: The full gradient at the end.
        first_gradient: The full gradient at the beginning.
    """

    verdict: Verdict
    evidence: str
    changed: tuple[Change, ...] = ()
    wandering: int = 0
    slowdown: float = math.nan
    level: float = math.nan
    displacement: float = math.nan
    straightness: float = math.nan
    loss: float = math.nan
    loss_slope: float = math.nan
    loss_slope_error: float = math.nan
    gradient: FullGradient | None = None
    first_gradient: FullGradient | None = None

    def __str__(self) -> str:
        return f"{self.verdict}: {self.evidence}"


def stationarity(
    iterates: Tensor | Sequence[Any],
    losses: Tensor | Sequence[float] | None = None,
    gradients: Tensor | Sequence[Any] | None = None,
    seed: int = 0,
) -> Stationarity:
    """Judge the end of a trajectory.

    The second half is divided into two windows. A law that has stopped changing is one whose random projections, whose
    loss and whose length of steps have no trend in mean or variance and equal distributions in the two, and whose
    projections return to their mean: a random walk has no law to settle in. The first quarter says what is small.
    Verdicts do not depend on the units of loss and parameters, nor on where their zero is.

    Args:
        iterates: The parameters after each step, (steps, parameters), or a sequence of vectors, of lists of tensors, or
            of numbers where there is one parameter. At least 64, and for an invariant measure some 100 times the steps
            over which iterates are correlated.
        losses: The loss at each of them.
        gradients: Measurements of the full gradient along the trajectory, the first at its beginning, the last at its
            end: each a (parameters,) full gradient, or the (batches, parameters) gradients of two batches or more at
            the same parameters, whose noise is then taken out. Without them, steps that shrink to nothing count as the
            approach to a stationary point.
        seed: Of the random projections.

    Raises:
        OptionError: if there are less than 64 iterates, if something has no numbers or they do not fit together, or for
            NaN or infinity.

    Example:
        >>> descent = [torch.tensor([3.0, 1.0], dtype=torch.float64)]
        >>> for _ in range(200):
        ...     descent.append(descent[-1] * torch.tensor([0.9, 0.5], dtype=torch.float64))
        >>> print(stationarity(descent).verdict)
        approaching a stationary point
        >>> print(stationarity(torch.arange(400.0)[:, None]).verdict)
        still moving
    """
    check("stationarity", "seed", seed, is_whole(seed, 0), "a whole number of at least 0")
    theta, eps = _matrix(iterates)
    values = None if losses is None else _losses(losses, theta)
    if not bool(theta.isfinite().all()) or (values is not None and not bool(values.isfinite().all())):
        raise OptionError("stationarity: an iterate or a loss is NaN or infinite. Has the run diverged?")
    ends = None if gradients is None else _ends(gradients, theta.shape[1])
    unit, of_loss = _unit(theta), 1.0 if values is None else _unit(values)
    theta, values = theta / unit if unit != 1 else theta, None if values is None else values / of_loss
    first = _window(theta, values, 0.0, 0.25, None, seed)
    found: Stationarity | None = None
    for begin in (0.5, 0.25, 0.0):  # the more the better, as long as the beginning is of the same law
        middle = (1 + begin) / 2
        direction = _mean(theta, 0.25, 0.5) - _mean(theta, 0, 0.25) if begin == 0.5 else None
        pair = [_window(theta, values, *part, direction, seed) for part in ((begin, middle), (middle, 1.0))]
        now = judge(first, pair[0], pair[1], ends, has_loss=values is not None, eps=eps)
        now = _times(_times(now, unit, "displacement"), of_loss, "loss", "loss_slope", "loss_slope_error")
        found = found or now
        if now.verdict == "invariant measure reached":
            return now
        if not too_short(found):
            break
    assert found is not None
    return found


def too_short(found: Stationarity) -> bool:
    """Whether nothing but the length of the windows speaks against an invariant measure."""
    steady = found.verdict == "still moving" and 0.9 <= found.slowdown <= 1.1
    return steady and not found.changed and found.wandering > 0


def judge(
    first: Window,
    previous: Window,
    last: Window,
    gradients: tuple[FullGradient, FullGradient] | None = None,
    has_loss: bool = False,
    eps: float = 2e-16,
    frozen: bool = False,
    penalized: bool = False,
    also: Sequence[Change] = (),
) -> Stationarity:
    """The verdict from two consecutive windows and the first one.

    Args:
        first: The window that says how long steps were at the beginning.
        previous: The window before the last.
        last: The last window.
        gradients: The full gradient at the beginning and at the end.
        has_loss: Whether the last series is the loss.
        eps: Relative precision of the parameters.
        frozen: Whether the schedule has lowered the learning rate to nothing.
        penalized: Whether a weight decay pulls too, so that the gradient need not vanish where weights come to rest.
        also: Changes that were found elsewhere.
    """
    slow, p = trend(torch.cat([previous.movement, last.movement]).clamp_min(1e-300).log())
    slowdown = math.exp(slow * len(last.movement) / 2)  # movement is squared
    level = last.step / first.step if first.step > 0 else float(last.step > 0)
    changed, wandering = changes(previous, last)
    facts = Stationarity(
        "undecided",
        "",
        changed=(*changed, *also),
        wandering=wandering,
        slowdown=slowdown,
        level=level,
        displacement=last.displacement,
        straightness=last.displacement / last.path if last.path > 0 else math.nan,
        gradient=None if gradients is None else gradients[1],
        first_gradient=None if gradients is None else gradients[0],
    )
    if has_loss:
        slope, error, _ = slope_of(torch.cat([previous.means[:, -1], last.means[:, -1]]))
        n, loss = len(last.means), float(last.means[:, -1].mean())
        facts = replace(facts, loss=loss, loss_slope=slope * n, loss_slope_error=error * n)
    at_rest = last.step <= max(AT_REST * first.step, 8 * eps * last.size)
    shrinks = slowdown < 0.9 and (p < SURE or last.shrinking >= SMOOTH)
    verdict, evidence = _decide(facts, last, at_rest, shrinks, slowdown > 1.1 and p < SURE, frozen, penalized)
    return replace(facts, verdict=verdict, evidence=evidence)


def _decide(
    facts: Stationarity, last: Window, at_rest: bool, shrinks: bool, grows: bool, frozen: bool, penalized: bool
) -> tuple[Verdict, str]:
    """The verdict and the sentence."""
    small = _is_small(facts.gradient, facts.first_gradient)
    steps = f"steps are {facts.level:.2g} of what they were at the beginning"
    if at_rest or (shrinks and (facts.level <= SMALL or small or last.shrinking >= SMOOTH)):
        if frozen or (small is False and facts.level <= SMALL and not penalized):
            return "undecided", (
                f"{steps}, and the full gradient is not: a schedule has frozen the weights, or they converge slowly"
            )
        return "approaching a stationary point", f"{steps}{_of_gradient(facts)}"
    if shrinks:
        return "still moving", f"steps are shrinking, by {facts.slowdown:.2g} from window to window"
    if grows:
        return "still moving", f"steps are growing, by {facts.slowdown:.2g} from window to window"
    if facts.changed:
        most = min(facts.changed, key=lambda change: change.p)
        return (
            "still moving",
            f"the {most.what} of series {most.series} has changed ({most.size:.2g}, p = {most.p:.1g})",
        )
    if facts.wandering:
        return "still moving", (
            f"{facts.wandering} series have not returned to their mean, as a random walk; a longer run would tell"
        )
    return "invariant measure reached", (
        f"means, variances and distributions of {last.means.shape[1]} series are the same in two windows, {steps}"
        f"{_of_gradient(facts)}"
    )


def _is_small(gradient: FullGradient | None, first: FullGradient | None) -> bool | None:
    """Whether the gradient is below a twentieth of the first, above it, or (None) unknown."""
    if gradient is None or first is None:
        return None
    bound = SMALL**2 * max(first.square, 0.0)
    if gradient.square + 2 * gradient.error <= bound:
        return True
    return False if gradient.square - 2 * gradient.error > bound else None


def _of_gradient(facts: Stationarity) -> str:
    gradient, first = facts.gradient, facts.first_gradient
    if gradient is None or first is None or not first.square > 0:
        return ""
    if not gradient.square > 2 * gradient.error:
        return ", and the full gradient is not told from zero"
    return f", and the full gradient is {math.sqrt(gradient.square / first.square):.2g} of the first"


# ---------------------------------------------------------------- windows of a trajectory


def _matrix(iterates: Any) -> tuple[Tensor, float]:
    """The iterates as a float64 matrix, and the relative precision of what was given."""
    if isinstance(iterates, Tensor) and iterates.dim() > 1 and not iterates.is_complex():
        found = iterates.detach().flatten(1)
    else:
        rows = flat_rows("stationarity", "iterates", iterates)
        found = torch.stack(rows) if rows else torch.zeros(0, 1, dtype=torch.float64, device="cpu")
    theta, eps = found.double(), torch.finfo(found.dtype).eps if found.is_floating_point() else 2e-16
    if len(theta) < LEAST or not theta.shape[1]:
        raise OptionError(
            f"stationarity: iterates={shown(tuple(theta.shape))} (steps, parameters); it needs at least {LEAST} steps "
            "and one parameter."
        )
    return theta, eps


def _losses(losses: Any, theta: Tensor) -> Tensor:
    rows = losses.detach() if isinstance(losses, Tensor) else flat_rows("stationarity", "losses", losses)
    values = (rows if isinstance(rows, Tensor) else torch.stack(rows) if rows else theta[:0, 0]).to(theta).reshape(-1)
    if len(values) != len(theta):
        raise OptionError(f"stationarity: {len(values)} losses for {len(theta)} iterates; give one for each.")
    return values


def _ends(gradients: Any, parameters: int) -> tuple[FullGradient, FullGradient]:
    """The first and the last measurement of the full gradient."""
    try:
        measured = list(gradients)
    except TypeError:
        measured = []
    if not measured:
        raise OptionError("stationarity: gradients is empty. Give one at the beginning and one at the end, or None.")
    return _measurement(measured[0], parameters), _measurement(measured[-1], parameters)


def _measurement(given: Any, parameters: int) -> FullGradient:
    """From one gradient, whole or as a list with a tensor for each parameter, or from those of several batches."""
    whole = flat_rows("stationarity", "gradients", [given])[0]
    if len(whole) == 0 or len(whole) % parameters:
        raise OptionError(
            f"stationarity: a measurement of the gradient has {len(whole)} elements, and iterates have {parameters}. "
            "Give a full gradient, or those of several batches."
        )
    return full_gradient(whole.view(-1, parameters))


def _times(found: Stationarity, unit: float, *names: str) -> Stationarity:
    """With some attributes in other units."""
    return replace(found, **{name: unit * getattr(found, name) for name in names})


def _unit(values: Tensor) -> float:
    """A power of two in which no square of values of a usual size overflows or vanishes; 1 for most runs."""
    largest = float(values.abs().max())
    return 1.0 if largest == 0 or 1e-60 < largest < 1e60 else 2.0 ** (math.frexp(largest)[1] - 1)


def _mean(theta: Tensor, begin: float, end: float) -> Tensor:
    return theta[round(begin * len(theta)) : round(end * len(theta))].mean(0)


def _window(
    theta: Tensor, losses: Tensor | None, begin: float, end: float, direction: Tensor | None, seed: int
) -> Window:
    """A range of the trajectory in blocks: coordinates or random projections, a direction, and the loss."""
    low, high = round(begin * len(theta)), round(end * len(theta))
    part = theta[low:high] - theta[0]
    series = part
    if theta.shape[1] > SERIES:
        generator = torch.Generator().manual_seed(seed)
        across = torch.randn(theta.shape[1], SERIES, generator=generator, dtype=torch.float64, device="cpu")
        series = part @ across.to(theta.device)
    if direction is not None and bool(direction.any()) and theta.shape[1] > 1:
        series = torch.cat([series, (part @ (direction / direction.norm()))[:, None]], 1)
    if losses is not None:
        series = torch.cat([series, losses[low:high, None]], 1)
    moves = theta[max(low - 1, 0) : high].diff(dim=0).norm(dim=1)
    size = max(1, len(part) // BLOCKS)
    count = len(part) // size
    blocks = series[len(series) - count * size :].view(count, size, -1)
    squares = moves[len(moves) - len(moves) // size * size :].square().view(-1, size).mean(1)
    return Window(
        means=blocks.mean(1),
        squares=blocks.square().mean(1),
        points=blocks[torch.arange(count, dtype=torch.int64, device="cpu"), within_block(count, size)],
        movement=squares,
        shrinking=float((moves[1:] < moves[:-1]).double().mean()),
        displacement=float((part[-1] - part[0]).norm()),
        path=float(moves.sum()),
        size=float(theta[high - 1].norm()),
    )
