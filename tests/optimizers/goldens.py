"""Printed reference values of the optimizers: parameters after each step, to ten significant digits.

They were computed by independent programs in double precision; `test_oracles.py` holds the oracles to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = tuple[Any, ...]
"""One nested tuple of numbers per tensor."""

VECTOR: Tensors = ((1.0, -2.0),)
VECTOR_GRADIENTS: tuple[Tensors, ...] = (((0.1, -0.2),), ((-0.3, 0.4),), ((0.05, 0.6),))
FIVE_GRADIENTS: tuple[Tensors, ...] = (*VECTOR_GRADIENTS, ((0.01, 0.0),), ((0.02, -0.01),))
"""Small last gradients, so that a running maximum of the second moment binds."""
MATRIX: Tensors = (((1.0, -2.0, 0.5), (0.25, 3.0, -1.5)),)
MATRIX_GRADIENTS: tuple[Tensors, ...] = (
    (((0.1, -0.2, 0.3), (0.4, -0.5, 0.6)),),
    (((-0.3, 0.4, 0.1), (0.2, 0.1, -0.7)),),
    (((0.05, 0.6, -0.2), (0.3, 0.2, 0.1)),),
)
TINY_MATRIX_GRADIENTS: tuple[Tensors, ...] = (
    (((1e-10, -2e-10, 3e-10), (4e-10, -5e-10, 6e-10)),),
    (((-3e-10, 4e-10, 1e-10), (2e-10, 1e-10, -7e-10)),),
    (((5e-11, 6e-10, -2e-10), (3e-10, 2e-10, 1e-10)),),
)
LOSSES = ((1.5, 2.5), (1.2, 1.6), (0.9, 1.0))
"""Mean loss and mean squared loss per sample, for the KOALA methods."""


@dataclass(frozen=True)
class Golden:
    """One optimizer run: `expected[k][j]` is tensor j after step k; the gradients repeat cyclically."""

    name: str
    optimizer: str
    expected: tuple[Tensors, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Tensors = VECTOR
    gradients: tuple[Tensors, ...] = VECTOR_GRADIENTS
    lrs: tuple[float, ...] | None = None
    losses: tuple[tuple[float, float], ...] | None = None
    same_as: str = ""
    """The golden whose numbers these must be, where that is what they say."""

    def initial(self) -> list[NDArray[np.float64]]:
        """The initial parameters as arrays."""
        return [np.array(p, dtype=np.float64) for p in self.params]

    def gradient_steps(self) -> list[list[NDArray[np.float64]]]:
        """The gradients of every step as arrays."""
        cycle = len(self.gradients)
        return [[np.array(g, dtype=np.float64) for g in self.gradients[k % cycle]] for k in range(len(self.expected))]


GOLDENS: tuple[Golden, ...] = (
    Golden(
        name="adam",
        optimizer="adam",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08},
        expected=(
            ((0.90000001, -1.900000005),),
            ((0.9494189911, -1.936610357),),
            ((0.977168809, -2.004746271),),
        ),
    ),
    Golden(
        name="adam_l2",
        optimizer="adam",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.1},
        expected=(
            ((0.900000005, -1.900000002),),
            ((0.907699803, -1.875283169),),
            ((0.8851408152, -1.904272161),),
        ),
    ),
    Golden(
        name="adam_eps0.01",
        optimizer="adam",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 0.01, "weight_decay": 0.0},
        expected=(
            ((0.9090909091, -1.904761905),),
            ((0.9563948204, -1.940250188),),
            ((0.9827203705, -2.00684517),),
        ),
    ),
    Golden(
        name="amsgrad",
        optimizer="adam",
        options={"lr": 0.1, "betas": (0.9, 0.5), "eps": 1e-08, "amsgrad": True},
        gradients=FIVE_GRADIENTS,
        expected=(
            ((0.90000001, -1.900000005),),
            ((0.9439187127, -1.933425546),),
            ((0.9659329028, -1.991494815),),
            ((0.9808019097, -2.034124055),),
            ((0.9900201674, -2.066369369),),
        ),
    ),
    Golden(
        name="amsgrad_beta2_0.9_5steps",
        optimizer="adam",
        options={"lr": 0.1, "betas": (0.9, 0.9), "eps": 1e-08, "amsgrad": True},
        gradients=FIVE_GRADIENTS,
        expected=(
            ((0.90000001, -1.900000005),),
            ((0.9484200203, -1.936051048),),
            ((0.975255696, -2.002238224),),
            ((0.9949818134, -2.055117429),),
            ((1.008109991, -2.098055237),),
        ),
    ),
    Golden(
        name="adamw",
        optimizer="adamw",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.01},
        expected=(
            ((0.89900001, -1.898000005),),
            ((0.9475199911, -1.932712357),),
            ((0.974322289, -1.998915559),),
        ),
    ),
    Golden(
        name="adamax",
        optimizer="adamax",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08},
        expected=(
            ((0.90000001, -1.900000005),),
            ((0.936842114, -1.928947373),),
            ((0.9539563987, -1.978024863),),
        ),
    ),
    Golden(
        name="sgd",
        optimizer="sgd",
        options={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
        expected=(((0.989, -1.978),), ((1.008111, -1.996222),), ((1.019302789, -2.070625578),)),
    ),
    Golden(
        name="sgd_nesterov",
        optimizer="sgd",
        options={"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        expected=(((0.9791, -1.9582),), ((1.02532971, -2.01265942),), ((1.029369513, -2.137611225),)),
    ),
    Golden(
        name="sgd_dampening",
        optimizer="sgd",
        options={"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
        expected=(((0.99, -1.98),), ((1.002, -1.99),), ((1.0093, -2.041),)),
    ),
    Golden(
        name="sgd_without_momentum",
        optimizer="sgd",
        options={"lr": 0.1, "weight_decay": 0.01},
        expected=(((0.989, -1.978),), ((1.018011, -2.016022),), ((1.011992989, -2.074005978),)),
    ),
    Golden(
        name="adagrad",
        optimizer="adagrad",
        options={"lr": 0.1, "weight_decay": 0.01},
        expected=(((0.9000000001, -1.9),), ((0.993540123, -1.986599632),), ((0.974622158, -2.066278412),)),
    ),
    Golden(
        name="adagrad_lr_decay",
        optimizer="adagrad",
        options={"lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 0.1},
        expected=(((0.9698488656, -1.946547752),), ((1.014570225, -1.995234201),), ((1.00901467, -2.032161648),)),
    ),
    Golden(
        name="nadam",
        optimizer="nadam",
        options={"lr": 0.1, "weight_decay": 0.01},
        expected=(((0.8943548318, -1.894354827),), ((0.9898821461, -1.981712079),), ((0.9729729722, -2.073496277),)),
    ),
    Golden(
        name="nadam_decoupled",
        optimizer="nadam",
        options={"lr": 0.1, "weight_decay": 0.01, "momentum_decay": 0.1, "decoupled_weight_decay": True},
        expected=(((0.893293764, -1.892293759),), ((0.9892970792, -1.980807976),), ((0.9756532765, -2.071030242),)),
    ),
    Golden(
        name="sgdw",
        optimizer="sgdw",
        options={"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.01},
        expected=(((0.989, -1.978),), ((1.009011, -1.998022),), ((1.021901989, -2.075823978),)),
    ),
    Golden(
        name="sgdw_nesterov",
        optimizer="sgdw",
        options={"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
        expected=(((0.98, -1.96),), ((1.02792, -2.01784),), ((1.03440208, -2.14764216),)),
    ),
    Golden(
        name="sgdw_lr_schedule_torchstyle",
        optimizer="sgdw",
        options={"momentum": 0.9, "weight_decay": 0.01},
        lrs=(0.1, 0.05, 0.02),
        expected=(((0.989, -1.978),), ((0.9990055, -1.988011),), ((1.001585699, -2.003573398),)),
    ),
    Golden(
        name="radam",
        optimizer="radam",
        options={
            "lr": 0.1,
            "betas": (0.8, 0.95),
            "eps": 0.01,
            "weight_decay": 0.0,
            "threshold": 5.0,
            "fallback": "momentum",
        },
        expected=(
            ((0.99, -1.98),),
            ((1.002222222, -1.993333333),),
            ((1.007386157, -2.02579235),),
            ((1.007413257, -2.040480697),),
            ((1.016356617, -2.062698688),),
            ((1.020976459, -2.075630438),),
            ((1.022590936, -2.086108519),),
            ((1.03317187, -2.101848886),),
        ),
    ),
    Golden(
        name="radam_8steps",
        optimizer="radam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "threshold": 5.0,
            "fallback": "momentum",
        },
        expected=(
            ((0.99, -1.98),),
            ((1.001052632, -1.991578947),),
            ((1.006181783, -2.021025442),),
            ((1.006911646, -2.036093776),),
            ((1.01478911, -2.05725028),),
            ((1.01550564, -2.059009624),),
            ((1.015922154, -2.06061543),),
            ((1.01733154, -2.062855045),),
        ),
    ),
    Golden(
        name="radam_8steps_threshold4",
        optimizer="radam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "threshold": 4.0,
            "fallback": "momentum",
        },
        expected=(
            ((0.99, -1.98),),
            ((1.001052632, -1.991578947),),
            ((1.006181783, -2.021025442),),
            ((1.006911646, -2.036093776),),
            ((1.007589143, -2.037033115),),
            ((1.008305674, -2.03879246),),
            ((1.008722188, -2.040398265),),
            ((1.010131573, -2.04263788),),
        ),
    ),
    Golden(
        name="radam_8steps_skip",
        optimizer="radam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "threshold": 5.0,
            "fallback": "skip",
        },
        expected=(
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((1.000716531, -2.001759345),),
            ((1.001133045, -2.00336515),),
            ((1.00254243, -2.005604765),),
        ),
    ),
    Golden(
        name="radam_8steps_decoupled_wd",
        optimizer="radam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.01,
            "decoupled_weight_decay": True,
            "threshold": 5.0,
            "fallback": "momentum",
        },
        expected=(
            ((0.989, -1.978),),
            ((0.9990636316, -1.987600947),),
            ((1.003193719, -2.015059841),),
            ((1.002920389, -2.028113115),),
            ((1.009794932, -2.047241506),),
            ((1.009501668, -2.046953609),),
            ((1.00890868, -2.046512461),),
            ((1.009309157, -2.046705564),),
        ),
    ),
    Golden(
        name="radam_8steps_skip_decoupled_wd",
        optimizer="radam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.01,
            "threshold": 5.0,
            "fallback": "skip",
            "decoupled_weight_decay": True,
        },
        expected=(
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((1.0, -2.0),),
            ((0.9997165307, -1.999759345),),
            ((0.999133328, -1.999365391),),
            ((0.9995435802, -1.999605641),),
        ),
    ),
    Golden(
        name="adan",
        optimizer="adan",
        options={
            "lr": 0.1,
            "betas": (0.98, 0.92, 0.99),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "no_prox": False,
        },
        expected=(
            ((0.90000001, -1.900000005),),
            ((0.9613436575, -1.956644504),),
            ((0.9739774075, -2.028895741),),
        ),
    ),
    Golden(
        name="adan_wd_prox",
        optimizer="adan",
        options={
            "lr": 0.1,
            "betas": (0.98, 0.92, 0.99),
            "eps": 1e-08,
            "weight_decay": 0.02,
            "max_grad_norm": 0.0,
            "no_prox": False,
        },
        expected=(
            ((0.8982036028, -1.89620759),),
            ((0.9576319864, -1.94895418),),
            ((0.9683290781, -2.017171075),),
        ),
    ),
    Golden(
        name="adan_wd_no_prox",
        optimizer="adan",
        options={
            "lr": 0.1,
            "betas": (0.98, 0.92, 0.99),
            "eps": 1e-08,
            "weight_decay": 0.02,
            "max_grad_norm": 0.0,
            "no_prox": True,
        },
        expected=(
            ((0.89800001, -1.896000005),),
            ((0.9575476575, -1.948852504),),
            ((0.9682663121, -2.017206036),),
        ),
    ),
    Golden(
        name="adan_clip0.3",
        optimizer="adan",
        options={
            "lr": 0.1,
            "betas": (0.98, 0.92, 0.99),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "max_grad_norm": 0.3,
            "no_prox": False,
        },
        expected=(
            ((0.90000001, -1.900000005),),
            ((0.9551925728, -1.948719771),),
            ((0.9678604121, -2.010182928),),
        ),
    ),
    Golden(
        name="adan_maximize",
        optimizer="adan",
        options={
            "lr": 0.1,
            "betas": (0.98, 0.92, 0.99),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "max_grad_norm": 0.0,
            "no_prox": False,
            "maximize": True,
        },
        gradients=(((-0.1, 0.2),), ((0.3, -0.4),), ((-0.05, -0.6),)),
        same_as="adan",
        expected=(
            ((0.90000001, -1.900000005),),
            ((0.9613436575, -1.956644504),),
            ((0.9739774075, -2.028895741),),
        ),
    ),
    Golden(
        name="acprop",
        optimizer="acprop",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-16,
            "weight_decay": 0.0,
            "decoupled": True,
            "rectify": False,
            "momentum_update": False,
            "amsgrad": False,
        },
        expected=(((0.99, -1.98),), ((1.323333333, -2.202222222),), ((1.299217811, -2.40486291),)),
    ),
    Golden(
        name="acprop_eps1e-8",
        optimizer="acprop",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "decoupled": True,
            "rectify": False,
            "momentum_update": False,
            "amsgrad": False,
        },
        expected=(((0.99, -1.98),), ((1.323127725, -2.202187924),), ((1.299015009, -2.40481705),)),
    ),
    Golden(
        name="acprop_8steps",
        optimizer="acprop",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "decoupled": True,
            "rectify": False,
            "momentum_update": False,
            "amsgrad": False,
        },
        expected=(
            ((0.99, -1.98),),
            ((1.323127725, -2.202187924),),
            ((1.299015009, -2.40481705),),
            ((1.24129607, -2.352955544),),
            ((1.430523251, -2.465037782),),
            ((1.4035907, -2.63715578),),
            ((1.345490765, -2.583098798),),
            ((1.527504491, -2.693813299),),
        ),
    ),
    Golden(
        name="acprop_8steps_rectify",
        optimizer="acprop",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-16,
            "weight_decay": 0.0,
            "decoupled": True,
            "rectify": True,
            "momentum_update": False,
            "amsgrad": False,
        },
        expected=(
            ((0.99, -1.98),),
            ((1.001052632, -1.991578947),),
            ((1.006181783, -2.021025442),),
            ((1.006911646, -2.036093776),),
            ((1.01478911, -2.05725028),),
            ((1.014027386, -2.062117727),),
            ((1.011973024, -2.060206573),),
            ((1.019510257, -2.064790619),),
        ),
    ),
    Golden(
        name="acprop_wd_decoupled",
        optimizer="acprop",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-16,
            "weight_decay": 0.01,
            "decoupled": True,
            "rectify": False,
            "momentum_update": False,
            "amsgrad": False,
        },
        expected=(((0.989, -1.978),), ((1.321344333, -2.198244222),), ((1.295907467, -2.398686666),)),
    ),
    Golden(
        name="acprop_wd_l2",
        optimizer="acprop",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-16,
            "weight_decay": 0.01,
            "decoupled": False,
            "rectify": False,
            "momentum_update": False,
            "amsgrad": False,
        },
        expected=(((0.989, -1.978),), ((1.282040404, -2.170030303),), ((1.251253724, -2.368215042),)),
    ),
    Golden(
        name="acprop_amsgrad_8steps",
        optimizer="acprop",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "decoupled": True,
            "rectify": False,
            "momentum_update": False,
            "amsgrad": True,
        },
        expected=(
            ((0.99, -1.98),),
            ((1.322922739, -2.202153689),),
            ((1.298811423, -2.404777045),),
            ((1.241095682, -2.35291612),),
            ((1.430313477, -2.46499726),),
            ((1.403381704, -2.637113846),),
            ((1.345283398, -2.583057193),),
            ((1.527292358, -2.69377109),),
        ),
    ),
    Golden(
        name="adabelief",
        optimizer="adabelief",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-16, "rectify": False},
        expected=(
            ((0.8888888889, -1.888888889),),
            ((0.9421968849, -1.927994987),),
            ((0.9718067364, -2.004354532),),
        ),
    ),
    Golden(
        name="adabelief_8steps_rectify",
        optimizer="adabelief",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-16, "rectify": True},
        expected=(
            ((0.99, -1.98),),
            ((1.001052632, -1.991578947),),
            ((1.006181783, -2.021025442),),
            ((1.006911646, -2.036093776),),
            ((1.01478911, -2.05725028),),
            ((1.015558717, -2.059305443),),
            ((1.016001585, -2.061114997),),
            ((1.017535487, -2.063708714),),
        ),
    ),
    Golden(
        name="generalized_signsgd",
        optimizer="generalized_signsgd",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "use_bias_correction": False,
        },
        expected=(
            ((-2.162177663, 1.162227661),),
            ((0.6931430706, -1.178172973),),
            ((2.316033559, -4.141704974),),
        ),
    ),
    Golden(
        name="generalized_signsgd_lr0.001",
        optimizer="generalized_signsgd",
        options={
            "lr": 0.001,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "use_bias_correction": False,
        },
        expected=(
            ((0.9683782234, -1.968377723),),
            ((0.9969314307, -1.99178173),),
            ((1.013160336, -2.02141705),),
        ),
    ),
    Golden(
        name="generalized_signsgd_bias_correction",
        optimizer="generalized_signsgd",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "use_bias_correction": True,
        },
        expected=(
            ((9.999989996e-07, -1.0000005),),
            ((0.6719144522, -1.55074151),),
            ((0.9997591476, -2.149408482),),
        ),
    ),
    Golden(
        name="generalized_signsgd_beta2_0",
        optimizer="generalized_signsgd",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.0),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "use_bias_correction": False,
        },
        expected=(((0.9000001, -1.90000005),), ((1.000000052, -2.000000005),), ((1.09999998, -2.099999992),)),
    ),
    Golden(
        name="generalized_signsgd_l2",
        optimizer="generalized_signsgd",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.1,
            "use_bias_correction": False,
        },
        expected=(
            ((-2.162227661, 1.16225266),),
            ((0.5558992602, 0.01132336121),),
            ((1.978928895, -2.726026203),),
        ),
    ),
    Golden(
        name="koala_v",
        optimizer="koala_v",
        options={
            "lr": 1.0,
            "sigma": 1.0,
            "q": 1.0,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.0,
        },
        losses=LOSSES,
        expected=(((0.76, -1.52),), ((1.296692913, -2.235590551),), ((1.239376127, -2.923391991),)),
    ),
    Golden(
        name="koala_v_lr0.1",
        optimizer="koala_v",
        options={
            "lr": 0.1,
            "sigma": 1.0,
            "q": 1.0,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.0,
        },
        losses=LOSSES,
        expected=(((0.976, -1.952),), ((1.029669291, -2.023559055),), ((1.023937613, -2.092339199),)),
    ),
    Golden(
        name="koala_v_sigma0.1",
        optimizer="koala_v",
        options={
            "lr": 1.0,
            "sigma": 0.1,
            "q": 1.0,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.0,
        },
        losses=LOSSES,
        expected=(
            ((0.8630705394, -1.726141079),),
            ((1.29525076, -2.302381373),),
            ((1.242017188, -2.941184243),),
        ),
    ),
    Golden(
        name="koala_v_two_tensors",
        optimizer="koala_v",
        options={
            "lr": 1.0,
            "sigma": 1.0,
            "q": 1.0,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.0,
        },
        params=((1.0,), (-2.0,)),
        gradients=(((0.1,), (-0.2,)), ((-0.3,), (0.4,)), ((0.05,), (0.6,))),
        losses=LOSSES,
        expected=(
            ((0.7435897436,), (-1.512195122,)),
            ((1.454506921,), (-2.344967343,)),
            ((1.337621793,), (-3.07224656,)),
        ),
    ),
    Golden(
        name="koala_v_wd_official",
        optimizer="koala_v",
        options={
            "lr": 1.0,
            "sigma": 1.0,
            "q": 1.0,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.1,
            "wd_in_direction": False,
        },
        losses=LOSSES,
        expected=(
            ((0.7741935484, -1.548387097),),
            ((1.459683361, -2.462373513),),
            ((1.341142091, -3.884868745),),
        ),
    ),
    Golden(
        name="koala_v_wd_consistent",
        optimizer="koala_v",
        options={
            "lr": 1.0,
            "sigma": 1.0,
            "q": 1.0,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.1,
            "wd_in_direction": True,
        },
        losses=LOSSES,
        expected=(
            ((0.5483870968, -1.096774194),),
            ((1.048191591, -1.688647936),),
            ((0.7713343222, -2.459630781),),
        ),
    ),
    Golden(
        name="koala_m",
        optimizer="koala_m",
        options={
            "lr": 1.0,
            "sw": 0.1,
            "sc": 0.0,
            "sv": 0.1,
            "a": 0.9,
            "qw": 0.01,
            "qv": 0.01,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.0,
        },
        losses=LOSSES,
        expected=(
            ((0.9587316877, -1.917463375),),
            ((1.151337897, -2.166553224),),
            ((1.146769284, -2.632126234),),
        ),
    ),
    Golden(
        name="koala_m_wd",
        optimizer="koala_m",
        options={
            "lr": 1.0,
            "sw": 0.1,
            "sc": 0.0,
            "sv": 0.1,
            "a": 0.9,
            "qw": 0.01,
            "qv": 0.01,
            "r": None,
            "alpha_r": 0.9,
            "R0": 1.0,
            "weight_decay": 0.1,
        },
        losses=LOSSES,
        expected=(
            ((0.9075236157, -1.815047231),),
            ((1.059625938, -1.951158533),),
            ((0.9009214011, -2.386896577),),
        ),
    ),
    Golden(
        name="pnm",
        optimizer="pnm",
        options={"lr": 0.1, "betas": (0.9, 1.0), "weight_decay": 0.0, "decoupled": True},
        expected=(
            ((0.9983005883, -1.996601177),),
            ((1.004248529, -2.005098235),),
            ((0.9994731824, -2.009142835),),
        ),
    ),
    Golden(
        name="pnm_5steps_wd",
        optimizer="pnm",
        options={"lr": 0.1, "betas": (0.9, 1.0), "weight_decay": 0.01, "decoupled": True},
        expected=(
            ((0.9973005883, -1.994601177),),
            ((1.002251229, -2.001103634),),
            ((0.9964736306, -2.00314713),),
            ((0.9990204303, -1.999529542),),
            ((1.00010132, -2.009303196),),
        ),
    ),
    Golden(
        name="adapnm",
        optimizer="adapnm",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999, 1.0),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "amsgrad": True,
            "decoupled": True,
        },
        expected=(
            ((0.8300588507, -1.830058842),),
            ((0.9700308388, -1.971458975),),
            ((0.8746963042, -2.005993123),),
        ),
    ),
    Golden(
        name="adapnm_no_amsgrad",
        optimizer="adapnm",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.5, 1.0),
            "eps": 1e-08,
            "weight_decay": 0.0,
            "amsgrad": False,
            "decoupled": True,
        },
        gradients=FIVE_GRADIENTS,
        expected=(
            ((0.8300588507, -1.830058842),),
            ((0.9544521101, -1.959158283),),
            ((0.8502036569, -1.988590232),),
            ((0.9776931786, -2.00356862),),
            ((0.8545447997, -2.035032654),),
        ),
    ),
    Golden(
        name="adapnm_5steps_wd",
        optimizer="adapnm",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999, 1.0),
            "eps": 1e-08,
            "weight_decay": 0.01,
            "amsgrad": True,
            "decoupled": True,
        },
        expected=(
            ((0.8290588507, -1.828058842),),
            ((0.96820178, -1.967630916),),
            ((0.8718990435, -2.000197433),),
            ((0.9324755703, -1.986077079),),
            ((0.956775963, -2.057825952),),
        ),
    ),
    Golden(
        name="adafactor_torch_vector_lr0.01",
        optimizer="adafactor",
        options={
            "mode": "torch",
            "lr": 0.01,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "weight_decay": 0.0,
        },
        expected=(
            ((0.9841886117, -1.984188612),),
            ((1.000201584, -1.999490503),),
            ((0.995899229, -2.020034102),),
        ),
    ),
    Golden(
        name="adafactor_torch_vector_lr0.1",
        optimizer="adafactor",
        options={
            "mode": "torch",
            "lr": 0.1,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "weight_decay": 0.0,
        },
        expected=(
            ((0.841886117, -1.841886117),),
            ((0.9883013092, -1.981799513),),
            ((0.9456846508, -2.185292601),),
        ),
    ),
    Golden(
        name="adafactor_paper_vector",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "relative_step": True,
            "scale_parameter": True,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (0.01, 0.001),
            "d": 1.0,
            "beta1": None,
            "weight_decay": 0.0,
            "factored": True,
        },
        expected=(
            ((0.9888196601, -1.985857864),),
            ((1.004562006, -2.001488544),),
            ((1.000776831, -2.021600207),),
        ),
    ),
    Golden(
        name="adafactor_external_lr_vector",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "lr": 0.8,
            "relative_step": False,
            "scale_parameter": False,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "beta1": None,
            "weight_decay": 0.0,
            "factored": True,
        },
        expected=(
            ((0.2, -1.2),),
            ((1.017955117, -1.98163254),),
            ((0.8002356582, -3.021235513),),
        ),
    ),
    Golden(
        name="adafactor_torch_matrix_lr0.01",
        optimizer="adafactor",
        options={
            "mode": "torch",
            "lr": 0.01,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "weight_decay": 0.0,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9897264737, -1.984268324, 0.4810565535), (0.2324774146, 3.016770023, -1.516155025)),),
            (((1.013514713, -2.010134087, 0.4766621642), (0.2234015747, 3.013069347, -1.498550985)),),
            (((1.009785693, -2.039172487, 0.4862556069), (0.2050738309, 3.005140419, -1.502480215)),),
        ),
    ),
    Golden(
        name="adafactor_paper_matrix",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "relative_step": True,
            "scale_parameter": True,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (0.01, 0.001),
            "d": 1.0,
            "beta1": None,
            "weight_decay": 0.0,
            "factored": True,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9908951682, -1.985743994, 0.48263315), (0.2332115197, 3.016429235, -1.516011445)),),
            (((1.014013608, -2.011401265, 0.4781734868), (0.2239934577, 3.012592845, -1.497340234)),),
            (((1.010584507, -2.03924379, 0.4873770124), (0.2068731089, 3.004870158, -1.50116941)),),
        ),
    ),
    Golden(
        name="adafactor_external_lr_matrix",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "lr": 0.8,
            "relative_step": False,
            "scale_parameter": False,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "beta1": None,
            "weight_decay": 0.0,
            "factored": True,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.5053224461, -1.242508678, -0.4121403401), (-0.5937248709, 3.807488463, -2.277875896)),),
            (((1.649380662, -2.486482153, -0.623481631), (-1.030213219, 3.629510219, -1.431237061)),),
            (((1.470401332, -3.880219122, -0.1630314853), (-1.909877853, 3.248950718, -1.619825742)),),
        ),
    ),
    Golden(
        name="adafactor_paper_matrix_beta1",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "relative_step": True,
            "scale_parameter": True,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "beta1": 0.9,
            "weight_decay": 0.0,
            "factored": True,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9989726474, -1.998426832, 0.4981056553), (0.2482477415, 3.001677002, -1.501615503)),),
            (((1.000424298, -1.999594778, 0.4959617784), (0.2457641001, 3.002816634, -1.501310943)),),
            (((1.00135892, -2.003541679, 0.4949889605), (0.241701155, 3.00305162, -1.501428667)),),
        ),
    ),
    Golden(
        name="adafactor_paper_matrix_wd",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "relative_step": True,
            "scale_parameter": True,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "beta1": None,
            "weight_decay": 0.1,
            "factored": True,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9880650235, -1.980945424, 0.4802258284), (0.2320620521, 3.011785673, -1.51366285)),),
            (((1.01017294, -2.003478572, 0.4750412353), (0.2226158945, 3.00308956, -1.49357433)),),
            (((1.004778108, -2.029092421, 0.483813714), (0.2039790631, 2.990197966, -1.495009309)),),
        ),
    ),
    Golden(
        name="adafactor_torch_matrix_wd",
        optimizer="adafactor",
        options={
            "mode": "torch",
            "lr": 0.01,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "weight_decay": 0.1,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9887264737, -1.982268324, 0.4805565535), (0.2322274146, 3.013770023, -1.514655025)),),
            (((1.011502228, -2.006125985, 0.4756859966), (0.2229284119, 3.007059273, -1.495553912)),),
            (((1.006769147, -2.033100306, 0.4847846072), (0.2044143173, 2.99613911, -1.497979747)),),
        ),
    ),
    Golden(
        name="adafactor_paper_matrix_unfactored",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "relative_step": True,
            "scale_parameter": True,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (0.01, 0.001),
            "d": 1.0,
            "beta1": None,
            "weight_decay": 0.0,
            "factored": False,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9882517732, -1.985139538, 0.4842380997), (0.2338815658, 3.016291859, -1.516388444)),),
            (((1.007685324, -2.004435239, 0.4770828409), (0.2234167169, 3.011532223, -1.498925684)),),
            (((1.003706177, -2.025577532, 0.4916313954), (0.2076737875, 3.000567237, -1.502139328)),),
        ),
    ),
    Golden(
        name="adafactor_torch_matrix_tiny_gradients",
        optimizer="adafactor",
        options={
            "mode": "torch",
            "lr": 0.01,
            "beta2_decay": -0.8,
            "eps": (None, 0.001),
            "d": 1.0,
            "weight_decay": 0.0,
        },
        params=MATRIX,
        gradients=TINY_MATRIX_GRADIENTS,
        expected=(
            (((0.9894181668, -1.983796219, 0.4804880638), (0.2319515647, 3.017273289, -1.516639835)),),
            (((1.013207289, -2.009662942, 0.4760935113), (0.2228753879, 3.013572475, -1.499035141)),),
            (((1.009083855, -2.041772698, 0.4867016403), (0.2026091419, 3.004804915, -1.503379961)),),
        ),
    ),
    Golden(
        name="adafactor_paper_matrix_tiny_gradients",
        optimizer="adafactor",
        options={
            "mode": "paper",
            "relative_step": True,
            "scale_parameter": True,
            "warmup_init": False,
            "beta2_decay": -0.8,
            "eps": (4e-20, 0.001),
            "d": 1.0,
            "beta1": None,
            "weight_decay": 0.0,
            "factored": True,
        },
        params=MATRIX,
        gradients=TINY_MATRIX_GRADIENTS,
        expected=(
            (((0.9930115709, -1.988511093, 0.4856009816), (0.2348911564, 3.015524241, -1.515565195)),),
            (((1.012060754, -2.010566412, 0.4815533889), (0.2265250068, 3.011891839, -1.496899877)),),
            (((1.0092375, -2.035565429, 0.4898279543), (0.2119271419, 3.00471076, -1.500465236)),),
        ),
    ),
    Golden(
        name="diffgrad",
        optimizer="diffgrad",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.0},
        expected=(
            ((0.9475022473, -1.945016687),),
            ((0.9770887532, -1.968654376),),
            ((0.9933672689, -2.006117803),),
        ),
    ),
    Golden(
        name="diffgrad_l2",
        optimizer="diffgrad",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.1},
        expected=(
            ((0.9450166872, -1.940131281),),
            ((0.9489878049, -1.923643402),),
            ((0.9347531423, -1.939226574),),
        ),
    ),
    Golden(
        name="rmsprop",
        optimizer="rmsprop",
        options={"lr": 0.1, "alpha": 0.99, "eps": 1e-08},
        expected=(
            ((9.999990004e-07, -1.0000005),),
            ((0.9491586955, -1.895323262),),
            ((0.7921409458, -2.698827648),),
        ),
    ),
    Golden(
        name="rmsprop_centered",
        optimizer="rmsprop",
        options={"lr": 0.1, "alpha": 0.99, "eps": 1e-08, "centered": True},
        expected=(
            ((-0.005036805159, -0.9949626898),),
            ((0.946045996, -1.891202006),),
            ((0.7888560973, -2.699357418),),
        ),
    ),
    Golden(
        name="rmsprop_momentum",
        optimizer="rmsprop",
        options={"lr": 0.1, "alpha": 0.99, "eps": 1e-08, "momentum": 0.9},
        expected=(
            ((9.999990004e-07, -1.0000005),),
            ((0.04915959545, -0.9953237117),),
            ((-0.06361541834, -1.794618989),),
        ),
    ),
    Golden(
        name="rmsprop_tf",
        optimizer="rmsprop",
        options={"lr": 0.1, "alpha": 0.9, "eps": 0.01, "tf_style": True, "momentum": 0.9},
        expected=(
            ((0.9895229067, -1.97908023),),
            ((1.013024785, -2.003906411),),
            ((1.028395877, -2.093642736),),
        ),
    ),
    Golden(
        name="rmsprop_eps_in_sqrt",
        optimizer="rmsprop",
        options={"lr": 0.1, "alpha": 0.99, "eps": 1e-08, "eps_in_sqrt": True},
        expected=(
            ((4.999625031e-05, -1.0000125),),
            ((0.9492032415, -1.895333219),),
            ((0.7921862167, -2.698836993),),
        ),
    ),
    Golden(
        name="rmsprop_scalar",
        optimizer="scalar_rmsprop",
        options={
            "lr": 0.1,
            "alpha": 0.99,
            "eps": 1e-08,
            "scope": "global",
            "normalize_by_dim": False,
            "debias": False,
        },
        expected=(
            ((0.5527866045, -1.105573209),),
            ((1.100966069, -1.836479161),),
            ((1.039373886, -2.575585356),),
        ),
    ),
    Golden(
        name="rmsprop_scalar_debias",
        optimizer="scalar_rmsprop",
        options={"lr": 0.1, "alpha": 0.99, "eps": 1e-08, "normalize_by_dim": False, "debias": True},
        expected=(
            ((0.9552786425, -1.910557285),),
            ((1.032608884, -2.013664274),),
            ((1.0219941, -2.141041686),),
        ),
    ),
    Golden(
        name="rmsprop_scalar_by_dim",
        optimizer="scalar_rmsprop",
        options={"lr": 0.1, "alpha": 0.99, "eps": 1e-08, "normalize_by_dim": True, "debias": False},
        expected=(
            ((0.367544868, -0.7350897359),),
            ((1.142787642, -1.768746768),),
            ((1.055683146, -2.814000719),),
        ),
    ),
    Golden(
        name="rmsprop_scalar_by_dim_debias",
        optimizer="scalar_rmsprop",
        options={"lr": 0.1, "alpha": 0.99, "eps": 1e-08, "normalize_by_dim": True, "debias": True},
        expected=(
            ((0.9367544508, -1.873508902),),
            ((1.046115926, -2.019324202),),
            ((1.031104355, -2.199463065),),
        ),
    ),
    Golden(
        name="padam",
        optimizer="padam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "partial": 0.125,
            "amsgrad": True,
            "weight_decay": 0.0,
        },
        expected=(
            ((0.9986664796, -1.997757294),),
            ((1.000229186, -1.99925856),),
            ((1.001114519, -2.00336889),),
        ),
    ),
    Golden(
        name="padam_partial0.25",
        optimizer="padam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "partial": 0.25,
            "amsgrad": True,
            "weight_decay": 0.0,
        },
        expected=(
            ((0.9943765956, -1.992047299),),
            ((0.9993183679, -1.996400809),),
            ((1.002109783, -2.006881176),),
        ),
    ),
    Golden(
        name="padam_beta2_0.9_5steps",
        optimizer="padam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.9),
            "eps": 1e-08,
            "partial": 0.125,
            "amsgrad": True,
            "weight_decay": 0.0,
        },
        gradients=FIVE_GRADIENTS,
        expected=(
            ((0.9925010585, -1.987388333),),
            ((1.001079099, -1.995639472),),
            ((1.00583328, -2.017736412),),
            ((1.009327939, -2.035390416),),
            ((1.011653714, -2.049725431),),
        ),
    ),
    Golden(
        name="padam_paper_no_debias",
        optimizer="padam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 0.0,
            "partial": 0.125,
            "amsgrad": True,
            "weight_decay": 0.0,
            "debias": "none",
        },
        expected=(
            ((0.995783035, -1.992907938),),
            ((1.002423901, -1.999287705),),
            ((1.006806509, -2.019634811),),
        ),
    ),
    Golden(
        name="padam_consistent_debias",
        optimizer="padam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "partial": 0.125,
            "amsgrad": True,
            "weight_decay": 0.0,
            "debias": "consistent",
        },
        expected=(
            ((0.9822172063, -1.970093025),),
            ((0.9982893097, -1.98553322),),
            ((1.006111874, -2.021850994),),
        ),
    ),
    Golden(
        name="gadam_iterates",
        optimizer="adamw",
        options={"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-08, "weight_decay": 0.01},
        expected=(
            ((0.89900001, -1.898000005),),
            ((0.9475199911, -1.932712357),),
            ((0.974322289, -1.998915559),),
        ),
    ),
    Golden(
        name="gadamx_iterates",
        optimizer="padam",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-08,
            "weight_decay": 0.01,
            "decoupled": True,
            "partial": 0.125,
            "amsgrad": True,
        },
        expected=(
            ((0.9976664796, -1.995757294),),
            ((0.9982315196, -1.995262802),),
            ((0.9981186211, -1.99737787),),
        ),
    ),
    Golden(
        name="lars",
        optimizer="lars",
        options={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0001, "trust_coefficient": 0.001, "eps": 0.0},
        expected=(((0.9999, -1.9998),), ((0.999944046, -1.999798698),), ((0.9999650894, -2.000020184),)),
    ),
    Golden(
        name="lars_matrix",
        optimizer="lars",
        options={"lr": 0.1, "momentum": 0.9, "weight_decay": 0.0001, "trust_coefficient": 0.001, "eps": 0.0},
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9999573134, -1.999914627, 0.499872047), (0.2498294137, 3.000213092, -1.500255799)),),
            (((1.000055296, -2.000019628, 0.4997113845), (0.2495849108, 3.000359256, -1.500167577)),),
            (((1.000115811, -2.000445382, 0.4996772154), (0.2491991625, 3.000380183, -1.500143322)),),
        ),
    ),
    Golden(
        name="lars_lr_schedule_paper",
        optimizer="lars",
        options={
            "momentum": 0.9,
            "weight_decay": 0.0001,
            "trust_coefficient": 0.001,
            "eps": 0.0,
            "lr_inside_buffer": True,
        },
        lrs=(0.1, 0.05, 0.02),
        expected=(((0.9999, -1.9998),), ((0.999877023, -1.999709349),), ((0.9998526243, -1.999672293),)),
    ),
    Golden(
        name="lamb",
        optimizer="lamb",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-06,
            "weight_decay": 0.01,
            "bias_correction": True,
            "max_grad_norm": None,
        },
        expected=(
            ((0.8426673092, -1.841108765),),
            ((1.007315778, -1.958958579),),
            ((1.089846835, -2.163190463),),
        ),
    ),
    Golden(
        name="lamb_matrix",
        optimizer="lamb",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-06,
            "weight_decay": 0.01,
            "bias_correction": True,
            "max_grad_norm": None,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.8320075957, -1.830343456, 0.3328381406), (0.0832538289, 3.161340505, -1.663835521)),),
            (((0.9654573406, -1.925870888, 0.09267615756), (-0.1730091058, 3.293016946, -1.623787963)),),
            (((1.059215378, -2.157638361, 0.01281200606), (-0.5064670066, 3.328480127, -1.607486648)),),
        ),
    ),
    Golden(
        name="lamb_clip0.3",
        optimizer="lamb",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-06,
            "weight_decay": 0.01,
            "bias_correction": True,
            "max_grad_norm": 0.3,
        },
        expected=(
            ((0.8426673092, -1.841108765),),
            ((1.031113908, -1.915173442),),
            ((1.09805501, -2.122126917),),
        ),
    ),
    Golden(
        name="lamb_no_bias_correction",
        optimizer="lamb",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.999),
            "eps": 1e-06,
            "weight_decay": 0.01,
            "bias_correction": False,
            "max_grad_norm": None,
        },
        expected=(
            ((0.8421476491, -1.841625017),),
            ((1.005317108, -1.961557003),),
            ((1.088344106, -2.165738788),),
        ),
    ),
    Golden(
        name="adaptive_norm_sgd_reconstruction",
        optimizer="moment_estimation_sgd",
        options={"lr": 0.1, "beta": 0.99, "offset": 1e-08, "init": "first", "delayed": True},
        expected=(
            ((0.9552786425, -1.910557285),),
            ((1.089442715, -2.089442715),),
            ((1.067516266, -2.352560109),),
        ),
    ),
    Golden(
        name="adaptive_norm_sgd_reconstruction_8steps",
        optimizer="moment_estimation_sgd",
        options={"lr": 0.1, "beta": 0.9, "offset": 0.05, "init": "first", "delayed": True},
        expected=(
            ((0.9634512005, -1.926902401),),
            ((1.073097599, -2.073097599),),
            ((1.057203145, -2.263831049),),
            ((1.029808863, -2.209042485),),
            ((1.113813356, -2.321048476),),
            ((1.100707209, -2.478322239),),
            ((1.076762681, -2.430433183),),
            ((1.15067939, -2.528988794),),
        ),
    ),
    Golden(
        name="soap",
        optimizer="soap",
        options={"lr": 0.02},
        params=(((0.0, 0.3), (-0.27, -0.89), (-0.45, -0.99)), (-0.05, 0.11, -1.53)),
        gradients=(
            (((0.23, 0.09), (0.15, -0.08), (0.41, 0.59)), (0.28, 0.54, -0.06)),
            (((-0.03, -0.37), (0.31, 0.4), (-0.24, 0.37)), (0.11, 0.22, -0.21)),
        ),
        expected=(
            (((0.0, 0.3), (-0.27, -0.89), (-0.45, -0.99)), (-0.05, 0.11, -1.53)),
            (
                (
                    (-0.0179821120713, 0.311355849491),
                    (-0.289810622089, -0.910917903376),
                    (-0.440289577524, -1.02163230059),
                ),
                (-0.0699859918705, 0.0899820040648, -1.50969800426),
            ),
        ),
    ),
    Golden(
        name="muon",
        optimizer="muon",
        options={"lr": 0.02, "adjust": "original", "coefficients": "classic"},
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((1.009365802, -1.994845161, 0.4853245204), (0.2382329063, 3.002112256, -1.501957419)),),
            (((1.010850295, -2.005220032, 0.4828596356), (0.2286775665, 2.992539161, -1.487809954)),),
            (((1.010159974, -2.02256834, 0.4825590986), (0.2099206294, 2.985649499, -1.48611526)),),
        ),
    ),
    Golden(
        name="muon_match_rms",
        optimizer="muon",
        options={
            "lr": 0.02,
            "coefficients": "classic",
            "nesterov": False,
            "momentum": 0.9,
            "weight_decay": 0.3,
            "steps": 3,
        },
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (((0.9977559884, -1.987551466, 0.4923469444), (0.2446177414, 2.984862696, -1.492843133)),),
            (((0.9907641773, -1.976869559, 0.4831423216), (0.238351412, 2.969091454, -1.485523191)),),
            (((0.985898563, -1.971323367, 0.4791916291), (0.2305581575, 2.952166199, -1.476265182)),),
        ),
    ),
    Golden(
        name="lion",
        optimizer="lion",
        options={"lr": 0.1, "betas": (0.9, 0.99), "weight_decay": 0.01},
        expected=(((0.899, -1.898),), ((0.998101, -1.996102),), ((0.897102899, -2.094105898),)),
    ),
    Golden(
        name="schedule_free_adamw_warmup",
        optimizer="schedule_free_adamw",
        options={
            "lr": 0.1,
            "betas": (0.9, 0.99),
            "eps": 0.001,
            "weight_decay": 0.1,
            "warmup_steps": 3,
            "r": 1.0,
            "weight_lr_power": 1.0,
        },
        expected=(
            (
                (
                    0.9636633663,
                    -1.960165837,
                ),
            ),
            (
                (
                    1.031266154,
                    -2.018277404,
                ),
            ),
            (
                (
                    1.015544464,
                    -2.106531709,
                ),
            ),
            (
                (
                    0.9766243968,
                    -2.088755151,
                ),
            ),
        ),
    ),
    Golden(
        name="schedule_free_adamw_moving_rate",
        optimizer="schedule_free_adamw",
        options={"weight_decay": 0.1},
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        lrs=(0.02, 0.05, 0.03, 0.01),
        expected=(
            (
                (
                    (
                        0.978000002,
                        -1.976000001,
                        0.4790000007,
                    ),
                    (
                        0.2295000005,
                        3.014,
                        -1.517,
                    ),
                ),
            ),
            (
                (
                    (
                        1.032459894,
                        -2.022732552,
                        0.4573135205,
                    ),
                    (
                        0.2007936015,
                        2.988651932,
                        -1.463335497,
                    ),
                ),
            ),
            (
                (
                    (
                        1.030240148,
                        -2.044182923,
                        0.4695344616,
                    ),
                    (
                        0.1836409745,
                        2.972549768,
                        -1.460441588,
                    ),
                ),
            ),
            (
                (
                    (
                        1.027145452,
                        -2.047977334,
                        0.468056405,
                    ),
                    (
                        0.1737696271,
                        2.971709562,
                        -1.462953798,
                    ),
                ),
            ),
        ),
    ),
    Golden(
        name="schedule_free_sgd",
        optimizer="schedule_free_sgd",
        options={"lr": 0.5, "momentum": 0.8, "weight_decay": 0.1, "warmup_steps": 3, "r": 1.0, "weight_lr_power": 1.0},
        expected=(
            (
                (
                    0.9666666667,
                    -1.933333333,
                ),
            ),
            (
                (
                    1.0236,
                    -1.9912,
                ),
            ),
            (
                (
                    0.9761571429,
                    -2.141457143,
                ),
            ),
            (
                (
                    0.9116545018,
                    -2.051833399,
                ),
            ),
        ),
    ),
    Golden(
        name="schedule_free_radam",
        optimizer="schedule_free_radam",
        options={"lr": 0.1, "betas": (0.9, 0.99), "eps": 0.001, "weight_decay": 0.1, "r": 1.0, "weight_lr_power": 1.0},
        expected=(
            (
                (
                    1,
                    -2,
                ),
            ),
            (
                (
                    1,
                    -2,
                ),
            ),
            (
                (
                    1,
                    -2,
                ),
            ),
            (
                (
                    1,
                    -2,
                ),
            ),
            (
                (
                    1.007519195,
                    -2.004480582,
                ),
            ),
            (
                (
                    1.00546923,
                    -2.011026298,
                ),
            ),
            (
                (
                    1.00125623,
                    -2.008678385,
                ),
            ),
        ),
    ),
    Golden(
        name="schedule_free_radam_sgd_phase",
        optimizer="schedule_free_radam",
        options={"lr": 0.1, "weight_decay": 0.1, "silent_sgd_phase": False},
        params=MATRIX,
        gradients=MATRIX_GRADIENTS,
        expected=(
            (
                (
                    (
                        0.98,
                        -1.96,
                        0.465,
                    ),
                    (
                        0.2075,
                        3.02,
                        -1.545,
                    ),
                ),
            ),
            (
                (
                    (
                        0.99111,
                        -1.97122,
                        0.4569425,
                    ),
                    (
                        0.19535875,
                        2.99789,
                        -1.4980025,
                    ),
                ),
            ),
            (
                (
                    (
                        0.98817556,
                        -1.99039512,
                        0.46091723,
                    ),
                    (
                        0.179266065,
                        2.97186844,
                        -1.48319299,
                    ),
                ),
            ),
            (
                (
                    (
                        0.9809923244,
                        -1.984999506,
                        0.4508850853,
                    ),
                    (
                        0.1592347872,
                        2.967948033,
                        -1.490716859,
                    ),
                ),
            ),
            (
                (
                    (
                        0.9785501757,
                        -1.984557432,
                        0.4466992121,
                    ),
                    (
                        0.1494061461,
                        2.964090177,
                        -1.49186866,
                    ),
                ),
            ),
            (
                (
                    (
                        0.9765235987,
                        -1.984935326,
                        0.4445354334,
                    ),
                    (
                        0.1422967079,
                        2.960987268,
                        -1.492816156,
                    ),
                ),
            ),
            (
                (
                    (
                        0.974643835,
                        -1.984469638,
                        0.4418176453,
                    ),
                    (
                        0.1364680459,
                        2.959794395,
                        -1.494198055,
                    ),
                ),
            ),
        ),
    ),
)

AVERAGES: dict[str, tuple[Tensors, ...]] = {
    "gadam_average_after_each_step": (
        ((0.89900001, -1.898000005),),
        ((0.9232600006, -1.915356181),),
        ((0.9402807634, -1.943209307),),
    ),
    "gadamx_average_after_each_step": (
        ((0.9976664796, -1.995757294),),
        ((0.9979489996, -1.995510048),),
        ((0.9980055401, -1.996132656),),
    ),
}
"""Running means of the iterates of `gadam_iterates` and `gadamx_iterates`, collected at every step."""

ADAN_RESTART_AFTER = 2
ADAN_RESTART = Golden(
    name="adan_restart_after_step2_6steps",
    optimizer="adan",
    options={"lr": 0.1, "betas": (0.98, 0.92, 0.99), "eps": 1e-08, "weight_decay": 0.0},
    expected=(
        ((0.90000001, -1.900000005),),
        ((0.9613436575, -1.956644504),),
        ((0.8613436775, -2.056644502),),
        ((0.7706077343, -2.032835429),),
        ((0.8133766945, -2.058850271),),
        ((0.8184063773, -2.103505076),),
    ),
)
"""Adan whose state is forgotten once, after step `ADAN_RESTART_AFTER`."""

SGDW_PAPER_ALPHA = 0.1
SGDW_PAPER_MULTIPLIERS = (1.0, 0.5, 0.2)
SGDW_PAPER = Golden(
    name="sgdw_lr_schedule_paper",
    optimizer="sgdw",
    options={"momentum": 0.9, "weight_decay": 0.001},
    expected=(((0.989, -1.978),), ((0.9945055, -1.979011),), ((0.9987065989, -1.992415198),)),
)
"""SGDW as printed in its paper, rate inside the buffer and decay times the multiplier: another method."""
