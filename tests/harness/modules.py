"""One family of modules to train: any network, a mean squared error, and a record of what was seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_optim import ConfiguredOptimizer, OptimizerSpec
from tests.harness.nets import plain_net
from tests.harness.strategies import shard

Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


def vector(module: nn.Module) -> Tensor:
    """A copy of all parameters in one row."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()]).clone()


def slot(optimizer: torch.optim.Optimizer, name: str) -> Tensor:
    """A copy of one slot of all parameters in one row."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    return torch.cat([optimizer.state[p][name].reshape(-1) for p in params]).clone()


class Plain(LightningModule):
    """A module that says nothing of optimizers.

    Notes the loss of each training batch. Under FSDP2 each layer of the type `unit` is sharded by itself, and the rest
    together.
    """

    unit: type[nn.Module] = nn.Linear

    def __init__(self, net: Callable[[], nn.Module] = plain_net) -> None:
        super().__init__()
        self.net = net()
        self.losses: list[float] = []

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            shard(self, self.unit, self.device_mesh["data_parallel"])

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.net(inputs)
        return outputs

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def training_step(self, batch: Sequence[Tensor], index: int) -> Tensor:
        loss = self.loss(batch)
        self.losses.append(loss.item())
        return loss


class Made(Plain):
    """With an optimizer that is made from the list of its parameters."""

    def __init__(self, make: Make, net: Callable[[], nn.Module] = plain_net) -> None:
        super().__init__(net)
        self.make = make

    def configure_optimizers(self) -> Any:
        return self.make(list(self.parameters()))


class Toy(Made):
    """Notes the weights that each validation and test batch sees."""

    def __init__(self, make: Make, net: Callable[[], nn.Module] = plain_net) -> None:
        super().__init__(make, net)
        self.validated: list[Tensor] = []
        self.tested: list[Tensor] = []

    def validation_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.validated.append(vector(self))

    def test_step(self, batch: Sequence[Tensor], index: int) -> None:
        self.tested.append(vector(self))


class Configured(ConfiguredOptimizer, Plain):
    """With an optimizer by a word, a mapping or a strategy, as users write modules."""

    def __init__(self, optimizer: OptimizerSpec = "adan", net: Callable[[], nn.Module] = plain_net) -> None:
        super().__init__(net)
        self.save_hyperparameters(ignore="net")


class Pair(Toy):
    """Two networks under manual optimization; the second takes a step in every second batch, or later."""

    def __init__(self, make: Make, second: int = 2) -> None:
        super().__init__(make)
        self.automatic_optimization = False
        self.other, self.second = nn.Linear(4, 2), second

    def training_step(self, batch: Sequence[Tensor], index: int) -> None:  # type: ignore[override]
        every: Any = self.optimizers()
        for optimizer, net, turn in zip(every, (self.net, self.other), (1, self.second), strict=True):
            if index % turn == turn - 1:
                optimizer.zero_grad()
                self.manual_backward(nn.functional.mse_loss(net(batch[0]), batch[1]))
                optimizer.step()

    def configure_optimizers(self) -> Any:
        return [self.make(list(net.parameters())) for net in (self.net, self.other)]
