"""User code that type checkers must accept, with nothing silenced. It runs as well."""

from __future__ import annotations

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from lightning_optim import (
    LAMB,
    Adan,
    Lion,
    Optimizer,
    OptimizerSpec,
    OptimizerStrategy,
    create_optimizer,
    from_paper,
    list_optimizers,
    normalized_weight_decay,
)
from lightning_optim.callbacks import (
    BatchSizeScaling,
    GradientNoise,
    IterateAveraging,
    LookaheadSync,
    NonFiniteGuard,
    OptimizerStateMemory,
    WarmupFreeSchedule,
)


def optimizers_take_parameters_and_options() -> None:
    model = nn.Linear(2, 2)
    Adan(model.parameters())
    Adan(model.parameters(), 1e-3, (0.98, 0.92, 0.99))
    Adan(model.named_parameters(), lr=1, betas=(0.9, 0.9, 0.9), weight_decay=0.02, no_prox=True)
    Lion([model.weight], lr=1e-4, betas=(0.9, 0.99), state_bits=8, state_format="log")
    LAMB([{"params": [model.weight]}, {"params": [model.bias], "weight_decay": 0.0}], maximize=True, engine="reference")


def an_optimizer_is_one_of_torch() -> None:
    model = nn.Linear(2, 2)
    optimizer: torch.optim.Optimizer = Adan(model.parameters(), capturable=False)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad(set_to_none=True)
    optimizer.load_state_dict(optimizer.state_dict())


def a_closure_and_a_loss_reach_the_step() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = Lion([weight])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = weight.square().sum()
        torch.autograd.backward(loss)  # torch does not type `loss.backward()`, which mypy's strict mode refuses
        return loss

    optimizer.step(closure)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 1e-3})


def a_word_makes_an_optimizer() -> None:
    model = nn.Linear(2, 2)
    specs: list[OptimizerSpec] = ["adan", {"name": "adan", "lr": 2e-3}, OptimizerStrategy("lamb", state_bits=8)]
    made: list[Optimizer] = [create_optimizer(spec, model) for spec in specs]
    assert [type(optimizer) for optimizer in made] == [Adan, Adan, LAMB]
    names: list[str] = list_optimizers("ad*")
    assert "adan" in names


def papers_and_decays_are_converted() -> None:
    decay: float = normalized_weight_decay(0.05, batch_size=128, dataset_size=50_000, epochs=10)
    ours: float = from_paper(decay, lr=1e-3)
    assert ours > decay


def callbacks_take_their_options() -> None:
    callbacks: list[Callback] = [
        BatchSizeScaling(256, rule="sqrt"),
        GradientNoise(eta=0.1, kind="isotropic"),
        IterateAveraging("ema", decay=0.99, start=0.5, every="epoch", ramp=True),
        LookaheadSync(k=5, alpha=0.5, momentum="none"),
        NonFiniteGuard("raise", patience=None),
        OptimizerStateMemory(table=False, csv="memory.csv"),
        WarmupFreeSchedule("exponential", decay="cosine"),
    ]
    Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False, accelerator="cpu")
