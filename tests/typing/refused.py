"""User code with one mistake in each marked line, which type checkers must find there and nowhere else.

The mark names mypy's error code, or - where mypy finds nothing, and pyright's rule where that differs from
`reportArgumentType`. Nothing here runs:
the functions are never called.
"""

from __future__ import annotations

import torch
from torch import nn

from lightning_optim import (
    LAMB,
    AdamW,
    Adan,
    Lion,
    Optimizer,
    OptimizerSpec,
    OptimizerStrategy,
    create_optimizer,
    list_optimizers,
)
from lightning_optim.callbacks import (
    BatchSizeScaling,
    IterateAveraging,
    LookaheadSync,
    NonFiniteGuard,
    OptimizerStateMemory,
    WarmupFreeSchedule,
)
from lightning_optim.language import Operand, Options, Slot, Slots, Value, norm


def wrong_options(model: nn.Module) -> None:
    Adan()  # error: call-arg reportCallIssue
    Adan(model.parameters(), learning_rate=1e-3)  # error: call-arg reportCallIssue
    Adan(model.parameters(), momentum=0.9)  # error: call-arg reportCallIssue
    Adan(model.parameters(), lr="1e-3")  # error: arg-type
    Adan(model.parameters(), betas=(0.9, 0.999))  # error: arg-type
    Adan(model.parameters(), betas=0.9)  # error: arg-type
    Adan(model.parameters(), no_prox="yes")  # error: arg-type
    Lion(model.parameters(), lr=None)  # error: arg-type
    Lion(model.parameters(), betas=(0.9, 0.99, 0.999))  # error: arg-type
    Lion(model.parameters(), 1e-4, (0.9, 0.99), 0.0, True, True)  # error: call-arg reportCallIssue
    LAMB(model.parameters(), state_bits=4)  # error: arg-type
    LAMB(model.parameters(), state_format="linear")  # error: arg-type
    AdamW(model.parameters(), fused=True)  # error: call-arg reportCallIssue
    AdamW(model.parameters(), engine=None)  # error: arg-type


def wrong_use(model: nn.Module) -> None:
    optimizer = Adan(model.parameters())
    optimizer.learning_rate = 1e-3  # error: attr-defined reportAttributeAccessIssue
    optimizer.step(1)  # error: arg-type
    optimizer.set_loss()  # error: call-arg reportCallIssue
    parameter: nn.Parameter = optimizer  # error: assignment reportAssignmentType
    scheduler: torch.optim.SGD = Lion([parameter])  # error: assignment reportAssignmentType
    del scheduler


def wrong_specs(model: nn.Module) -> None:
    spec: OptimizerSpec = 3  # error: assignment reportAssignmentType
    OptimizerStrategy()  # error: call-arg reportCallIssue
    OptimizerStrategy("adan", no_decay=3)  # error: arg-type
    create_optimizer("adan")  # error: call-arg reportCallIssue
    create_optimizer(spec, 3)  # error: arg-type
    name: str = create_optimizer("adan", model)  # error: assignment reportAssignmentType
    names: list[Optimizer] = list_optimizers()  # error: assignment reportAssignmentType
    del name, names


def wrong_callbacks() -> None:
    IterateAveraging(beta=0.99)  # error: call-arg reportCallIssue
    IterateAveraging("median")  # error: arg-type
    IterateAveraging(every="step")  # error: arg-type
    LookaheadSync(k="5")  # error: arg-type
    LookaheadSync(evaluate="average")  # error: arg-type
    NonFiniteGuard("ignore")  # error: arg-type
    WarmupFreeSchedule("slow")  # error: arg-type
    BatchSizeScaling()  # error: call-arg reportCallIssue
    BatchSizeScaling(256, rule="cubic")  # error: arg-type
    OptimizerStateMemory(csv=3)  # error: arg-type


def wrong_page(model: nn.Module) -> None:
    class WrongPage(Optimizer):
        """An optimizer with mistakes in its options, its scalars and its update."""

        batch_scaling = "cubic"  # error: assignment reportAssignmentType
        lr: float = "fast"  # error: assignment reportAssignmentType
        buf = Slot("m", per="row")  # error: arg-type

        @staticmethod
        def scalars(h: Options, t: Operand) -> dict[str, Operand]:
            return {"late": "yes"}  # error: dict-item reportReturnType

        @staticmethod
        def predict(p: Value, s: Slots, h: Options) -> Value:
            return p if h.lr else -p if s.buf else p  # error: - reportGeneralTypeIssues

        @staticmethod
        def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
            s.buf = "oops"  # error: assignment
            s.buf = None  # error: assignment
            p.grad = g  # error: attr-defined reportAttributeAccessIssue
            if g > 0:  # error: - reportGeneralTypeIssues
                return p
            p = p - norm(g, over="layer")  # error: arg-type
            return p - h.lr * g if not g > 0 else p  # error: - reportGeneralTypeIssues

    WrongPage(model.parameters(), momentum=0.9)  # error: call-arg reportCallIssue
    WrongPage(model.parameters(), lr="1e-3")  # error: arg-type
