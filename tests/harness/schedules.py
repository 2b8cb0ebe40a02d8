"""A spec of every schedule with its defaults."""

from __future__ import annotations

from typing import Any

from lightning_optim.training.shapes import SHAPES

SPECS: dict[str, dict[str, Any]] = {
    name: {"name": name, **({"monitor": "loss"} if name == "plateau" else {})} for name in SHAPES
}
