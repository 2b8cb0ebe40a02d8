"""A training loop in plain torch: an optimizer by its name, state in 8 bits, an average of the weights, a checkpoint.

python -m examples.plain_loop.train examples/plain_loop/digits.yaml
python -m examples.plain_loop.train examples/plain_loop/digits.yaml epochs=20    # goes on where the first one ended
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_optim import WeightAverage, create_optimizer
from lightning_optim.errors import OptionError, needed


def digits(device: str) -> tuple[Tensor, Tensor]:
    """1797 images of handwritten digits and what they show, in an order of chance that is always the same."""
    pixels, labels = needed("sklearn.datasets", "This example").load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(pixels / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    return images[order].to(device), torch.tensor(labels)[order].to(device)


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


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def train(config: dict[str, Any]) -> dict[str, float]:
    """Train as the config says. Returns the accuracy of the last weights, and of their average."""
    torch.manual_seed(0)
    images, labels = digits(config["device"])
    held_out = images[-360:], labels[-360:]
    model = network(config["width"]).to(config["device"])
    optimizer = create_optimizer(config["optimizer"], model)  # of a module, so biases and norms do not decay
    average = WeightAverage(optimizer, **config["average"])

    path, done = Path(config["folder"], "last.pt"), 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.load_state_dict(saved["average"])  # after the other two
        done = saved["epoch"]
        print(f"{path}: going on after epoch {done}")

    for epoch in range(done + 1, config["epochs"] + 1):
        order = torch.randperm(len(images) - 360, generator=torch.Generator().manual_seed(epoch))
        for batch in torch.split(order, config["batch_size"]):
            optimizer.zero_grad()
            loss: Any = cross_entropy(model(images[batch]), labels[batch])
            loss.backward()
            optimizer.step()
        print(f"epoch {epoch}: accuracy {accuracy(model, *held_out):.4f}")

    path.parent.mkdir(parents=True, exist_ok=True)
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "average": average}
    torch.save({"epoch": config["epochs"], **{name: part.state_dict() for name, part in parts.items()}}, path)
    found = {"last": accuracy(model, *held_out)}
    with average.applied(model):
        found["average"] = accuracy(model, *held_out)
    print(f"accuracy {found['last']:.4f}, and {found['average']:.4f} with the average of {average.count} steps. {path}")
    return found


if __name__ == "__main__":
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    changes = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in sys.argv[2:])}
    try:
        train({**config, **changes})
    except OptionError as error:  # of a word in the config, or a package that is missing
        sys.exit(str(error))
