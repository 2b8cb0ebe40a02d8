"""Writes the files of `test_earlier_files.py` from an earlier commit; runs in a checkout of it.

    git worktree add ../earlier COMMIT
    cd ../earlier && PYTHONPATH=. python FOLDER/make.py FOLDER MARK

Each file holds parameters, the state_dict of an optimizer after four steps, and the parameters after three more. Rows
repeat, so that the files are small.
"""

from __future__ import annotations

import gzip
import io
import sys
from pathlib import Path
from typing import Any

import torch

SPECS: dict[str, dict[str, Any]] = {
    "adamw": {"name": "adamw", "lr": 0.01},
    "adan8": {"name": "adan", "lr": 0.01, "state_bits": 8},
    "pnm8": {"name": "pnm", "lr": 0.01, "state_bits": 8, "state_format": "dynamic"},
    "adafactor": {"name": "adafactor", "lr": 0.01},
    "koala_v": {"name": "koala_v", "sigma": 0.1},
}


def take_steps(optimizer: Any, params: list[torch.Tensor], first: int, count: int) -> None:
    """Steps along gradients that depend on the number of the step alone."""
    for t in range(first, first + count):
        for p in params:
            row = torch.arange(p.shape[-1], dtype=torch.float32, device="cpu") % 7 - 3.0
            p.grad = (row * (1 + t % 3) / 8).expand(p.shape).clone()
        if optimizer.inputs:
            optimizer.set_loss(1.0)
        optimizer.step()


def write(held: Any, path: Path) -> None:
    buffer = io.BytesIO()
    torch.save(held, buffer)
    path.write_bytes(gzip.compress(buffer.getvalue()))


def main(folder: Path, mark: str) -> None:
    from lightning_optim import create_optimizer

    for word, spec in SPECS.items():
        params: list[torch.Tensor] = [torch.nn.Parameter(torch.ones(shape)) for shape in ((64, 64), (3,))]
        optimizer = create_optimizer({**spec, "engine": "reference"}, params)
        take_steps(optimizer, params, 0, 4)
        held = {"params": [p.detach().clone() for p in params], "optimizer": optimizer.state_dict()}
        write(held, folder / f"{word}.{mark}.pt.gz")
        take_steps(optimizer, params, 4, 3)
        write([p.detach().clone() for p in params], folder / f"{word}.{mark}.after.pt.gz")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
