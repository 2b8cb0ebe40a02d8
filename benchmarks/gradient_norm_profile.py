"""What looks of GradientNormProfile cost, on the language model of the examples: every second step has a look.

python -m benchmarks.gradient_norm_profile --out benchmarks/results/gradient_norm_profile.json
python -m benchmarks.gradient_norm_profile --pictures docs      # gradient_norms_pre.png and gradient_norms_post.png

Times are seconds of the processor (`time.process_time`) on one thread, so that other programs do not count.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger

from examples.language_model.language_model import LanguageModel, SourceText
from lightning_optim.callbacks import GradientNormProfile
from lightning_optim.reports.depth_profile import picture


class Steps(Callback):
    """The time of each step, all hooks of other callbacks included."""

    def __init__(self) -> None:
        self.begun: list[float] = []

    def on_train_batch_start(self, *args: Any, **kwargs: Any) -> None:
        self.begun.append(time.process_time())

    def medians(self) -> tuple[float, float]:
        """Of steps with a look and without, for looks in every second step; the first ones are left out."""
        times = [later - earlier for earlier, later in zip(self.begun[4:], self.begun[5:], strict=False)]
        return statistics.median(times[::2]), statistics.median(times[1::2])


class FirstLook(GradientNormProfile):
    """Notes how long the look before the first step takes."""

    seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        begun = time.process_time()
        super().on_train_start(trainer, pl_module)
        self.seconds = time.process_time() - begun


def measure(logging_to: str | None, steps: int) -> dict[str, float]:
    seed_everything(0, verbose=False)
    profile, watch = FirstLook(every=2, table=False), Steps()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[watch, profile],
        logger=TensorBoardLogger(logging_to) if logging_to else False,
        log_every_n_steps=10,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(LanguageModel(), SourceText(batches=steps))
    look, step = watch.medians()
    return {"step": step, "step_with_look": look, "look_in_steps": look / step - 1, "first_look": profile.seconds}


def draw(norm: Literal["pre", "post"], path: Path) -> None:
    """The picture of a short run of twelve blocks, with a warm-up."""
    seed_everything(0, verbose=False)
    profile = GradientNormProfile(every=25, batches=8, table=False)
    schedule = {"name": "constant", "warmup_steps": 50}
    model = LanguageModel(norm, depth=12, optimizer={"name": "adamw", "lr": 1e-3, "schedule": schedule})
    quiet: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = Trainer(max_steps=76, accelerator="cpu", callbacks=[profile], limit_val_batches=0, **quiet)
    trainer.fit(model, SourceText())
    picture(profile.profiles["blocks"]).savefig(path, dpi=90)
    print(profile.profiles["blocks"][0].verdict())


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the looks of GradientNormProfile.")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--pictures", type=Path, help="a folder for the two pictures, instead of times")
    args = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    if args.pictures:
        draw("pre", args.pictures / "gradient_norms_pre.png")
        draw("post", args.pictures / "gradient_norms_post.png")
        return
    with tempfile.TemporaryDirectory() as folder:
        found = {
            "without a logger": measure(None, args.steps),
            "TensorBoard, with pictures": measure(folder, args.steps),
        }
    about = {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}
    text = json.dumps({"about": about, **found}, indent=1)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
