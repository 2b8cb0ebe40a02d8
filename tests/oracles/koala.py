"""KOALA-V and KOALA-M: Davtyan et al. 2022, arXiv 2107.03331; a Kalman filter that measures the loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .driver import Gradients, History, Params, norm, snapshot, start, steps

SMALLEST_GRADIENT = 1e-9
Losses = Sequence[tuple[float, float]]


def measure(
    losses: Losses, k: int, loss_target: float, R: float, r: float | None, alpha_r: float
) -> tuple[float, float]:
    """The loss of step k and the measurement noise R, the second moment of the losses around the target."""
    L, L2 = losses[k]
    if loss_target > L:
        raise ValueError(f"loss {L} below its target {loss_target}")
    second_moment = L2 - 2 * loss_target * L + loss_target**2
    return L, alpha_r * R + (1 - alpha_r) * second_moment if r is None else r


def koala_v(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    losses: Losses,
    lr: float = 1.0,
    sigma: float = 1.0,
    q: float = 1.0,
    r: float | None = None,
    alpha_r: float = 0.9,
    R0: float = 1.0,
    weight_decay: float = 0.0,
    loss_target: float = 0.0,
    wd_in_direction: bool = True,
) -> History:
    """theta_j - eta (L_j - target) P / S_j direction; the variance P is shared by all tensors."""
    theta = start(params)
    P = sigma
    R = R0
    history: History = []
    for k, (eta, g) in enumerate(steps(gradients, lr, lrs)):
        P = P + q
        L, R = measure(losses, k, loss_target, R, r, alpha_r)
        ratios = [0.0]
        for j, g_j in enumerate(g):
            if g_j is None or norm(g_j) < SMALLEST_GRADIENT:
                continue
            h = g_j + weight_decay * theta[j]
            n = norm(h) ** 2
            S = P * n + R
            L_j = L + 0.5 * weight_decay * norm(theta[j]) ** 2
            direction = h if wd_in_direction else g_j
            theta[j] = theta[j] - eta * (L_j - loss_target) * (P / S) * direction
            ratios.append(n / S)
        P = P - P**2 * max(ratios)
        history.append(snapshot(theta))
    return history


def koala_m(
    params: Params,
    gradients: Gradients,
    *,
    lrs: Sequence[float] | None = None,
    losses: Losses,
    lr: float = 1.0,
    sw: float = 0.1,
    sc: float = 0.0,
    sv: float = 0.1,
    a: float = 0.9,
    qw: float = 0.01,
    qv: float = 0.01,
    r: float | None = None,
    alpha_r: float = 0.9,
    R0: float = 1.0,
    weight_decay: float = 0.0,
    loss_target: float = 0.0,
) -> History:
    """Predict with the velocity, then correct position and velocity; gradients are at the predicted point."""
    theta = start(params)
    velocity = [np.zeros_like(x) for x in theta]
    average = [np.zeros_like(x) for x in theta]
    N = sum(x.size for x in theta)
    P = np.array([[sw, sc], [sc, sv]])
    F = np.array([[1.0, 1.0], [0.0, a]])
    q = qw
    R = R0
    history: History = []
    for k, (eta, g) in enumerate(steps(gradients, lr, lrs)):
        # predict: every tensor, before its gradient is known
        w = np.sqrt(sum(norm(average[j] - theta[j]) ** 2 for j in range(len(theta)))) / N
        for j in range(len(theta)):
            theta[j] = theta[j] + velocity[j]
            velocity[j] = a * velocity[j]
        q = 0.9 * q + 0.1 * w
        P = F @ P @ F.T + np.array([[q, 0.0], [0.0, qv]])
        # update
        L, R = measure(losses, k, loss_target, R, r, alpha_r)
        ratios = [0.0]
        for j, g_j in enumerate(g):
            if g_j is None or norm(g_j) < SMALLEST_GRADIENT:
                continue
            h = g_j + weight_decay * theta[j]
            n = norm(h) ** 2
            S = P[0, 0] * n + R
            L_j = L + 0.5 * weight_decay * norm(theta[j]) ** 2
            theta[j] = theta[j] - eta * (L_j - loss_target) * (P[0, 0] / S) * h
            velocity[j] = velocity[j] - eta * (L_j - loss_target) * (P[1, 0] / S) * h
            average[j] = 0.9 * average[j] + 0.1 * theta[j]
            ratios.append(n / S)
        P = P - P @ np.array([[max(ratios), 0.0], [0.0, 0.0]]) @ P.T
        history.append(snapshot(theta))
    return history
