"""AdamW with 8-bit state by bitsandbytes."""

from __future__ import annotations

import importlib
from typing import Any

from examples.migrate.task import Task, fit


class Before(Task):
    def configure_optimizers(self) -> Any:
        bitsandbytes = importlib.import_module("bitsandbytes")  # pip install bitsandbytes
        return bitsandbytes.optim.AdamW8bit(self.parameters(), lr=2e-3, weight_decay=0.01)


if __name__ == "__main__":
    print(fit(Before)[1].callback_metrics["val/accuracy"])
