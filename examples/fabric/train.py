"""The training loop of examples/plain_loop by Lightning Fabric: the same on one device, under DDP, FSDP1 and FSDP2.

python -m examples.fabric.train examples/fabric/digits.yaml
python -m examples.fabric.train examples/fabric/digits.yaml fabric='{accelerator: cpu, devices: 2, strategy: ddp}'
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.fabric import Fabric
from lightning.fabric.strategies.model_parallel import ModelParallelStrategy
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import WeightAverage, create_optimizer
from lightning_optim.errors import OptionError, needed


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1437 images of handwritten digits for training and 360 for validation, always the same ones."""
    pixels, labels = needed("sklearn.datasets", "This example").load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)[order]
    digits = torch.tensor(labels)[order]
    return TensorDataset(images[:-360], digits[:-360]), TensorDataset(images[-360:], digits[-360:])


def network(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.GroupNorm(4, width),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
        nn.GroupNorm(4, 2 * width),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * 4 * 4, 10),
    )


def shard(model: nn.Module, mesh: Any) -> nn.Module:
    """What FSDP2 asks for: each layer that has parameters by itself, and then the rest."""
    from torch.distributed.fsdp import fully_shard

    for layer in model.children():
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])
    return model


def fabric_of(options: dict[str, Any]) -> Fabric:
    """Fabric with the options of the config."""
    if options.get("strategy") == "fsdp2":
        one_file = ModelParallelStrategy(shard, options["devices"], 1, save_distributed_checkpoint=False)
        options = {**options, "strategy": one_file}
    return Fabric(**options)


@torch.no_grad()
def accuracy(fabric: Fabric, model: Any, batches: Any) -> float:
    """The share of images whose digit is found, over all devices."""
    right = [(model(images).argmax(1) == labels).float() for images, labels in batches]
    mean: Any = fabric.all_reduce(torch.cat(right).mean())
    return float(mean)


def train(config: dict[str, Any]) -> dict[str, float]:
    """Train as the config says. Returns the accuracy of the last weights, and of their average."""
    fabric = fabric_of(config["fabric"])
    if "LT_CLI_USED" not in os.environ:  # `fabric run` has launched the processes already
        fabric.launch()
    fabric.seed_everything(0, verbose=False)
    batches, held_out = fabric.setup_dataloaders(
        *(DataLoader(part, config["batch_size"], shuffle=i == 0) for i, part in enumerate(digits()))
    )
    model = fabric.setup_module(network(config["width"]))  # FSDP shards it here, so the optimizer comes after it
    optimizer: Any = fabric.setup_optimizers(create_optimizer(config["optimizer"], model))
    average = WeightAverage(optimizer, **config["average"])

    path = Path(config["folder"], "last.ckpt")
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "average": average.state_dict(), "epoch": 0}
    if path.exists():
        fabric.load(path, state)
        average.load_state_dict(state["average"])  # after the other two
        fabric.print(f"{path}: going on after epoch {state['epoch']}")

    for epoch in range(state["epoch"] + 1, config["epochs"] + 1):
        for images, labels in batches:
            optimizer.zero_grad()
            fabric.backward(cross_entropy(model(images), labels))
            fabric.clip_gradients(model, optimizer, max_norm=config["clip"])
            optimizer.step()
        fabric.print(f"epoch {epoch}: accuracy {accuracy(fabric, model, held_out):.4f}")

    fabric.save(path, {**state, "average": average.state_dict(), "epoch": config["epochs"]})
    found = {"last": accuracy(fabric, model, held_out)}
    with average.applied(model):
        found["average"] = accuracy(fabric, model, held_out)
    fabric.print(f"accuracy {found['last']:.4f}, and {found['average']:.4f} with the average of {average.count} steps")
    return found


if __name__ == "__main__":
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    changes = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in sys.argv[2:])}
    try:
        train({**config, **changes})
    except OptionError as error:  # of a word in the config, or a package that is missing
        sys.exit(str(error))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
