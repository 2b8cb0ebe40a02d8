"""What each part of the fine-tuning is worth: test accuracy over seeds, and bytes of optimizer state.

python -m examples.finetune.measure    # 30 runs; writes finetune.json and prints the table of the page
"""

from __future__ import annotations

import json
import logging
import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer, seed_everything

from examples.finetune.finetune import FewDigits, Finetuned
from lightning_optim.callbacks import IterateAveraging

SEEDS = 5
HEAD: dict[str, Any] = {"groups": [{"params": "head.*", "lr": 3e-3}]}
ARMS: dict[str, tuple[dict[str, Any], bool]] = {  # options of the optimizer, and whether weights are averaged
    "begun anew": ({}, False),
    "the head alone (`freeze`)": ({"freeze": ["body.*"], "lr": 3e-3}, False),
    "all, 32 bits": (HEAD, False),
    "all, 8 bits": ({**HEAD, "state_bits": 8}, False),
    "all, 8 bits, averaged": ({**HEAD, "state_bits": 8}, True),
    "all, 8 bits, averaged, `layer_decay: 0.7`": ({"lr": 3e-3, "layer_decay": 0.7, "state_bits": 8}, True),
}


def run(arm: str, seed: int, folder: Path, epochs: int = 12) -> dict[str, float]:
    """The test accuracy of a run, and the bytes of its optimizer state without averages."""
    options, averaged = ARMS[arm]
    seed_everything(seed, verbose=False)
    pretrained = None if arm == "begun anew" else str(folder / "pretrained.pt")
    module = Finetuned({"name": "adamw", "lr": 1e-3, **options}, pretrained)
    averaging: list[Callback] = [IterateAveraging("mean", start=0.5, every=1)] if averaged else []
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = Trainer(max_epochs=epochs, accelerator="cpu", enable_checkpointing=False, callbacks=averaging, **quiet)
    trainer.fit(module, FewDigits())
    [tested] = trainer.test(module, FewDigits(), verbose=False)
    state = [x for slots in trainer.optimizers[0].state.values() for name, x in slots.items() if "exp" in name]
    return {"accuracy": tested["test/accuracy"], "bytes": sum(x.nbytes for x in state)}


def table(found: dict[str, list[dict[str, float]]]) -> str:
    """The rows of the page."""
    rows = ["| fine-tuned | test accuracy | bytes of moments |", "| --- | --- | --- |"]
    for arm, runs in found.items():
        values = [one["accuracy"] for one in runs]
        accuracy = f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"
        rows.append(f"| {arm} | {accuracy} | {runs[0]['bytes']:,.0f} |")
    return "\n".join(rows)


def main() -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        found = {arm: [run(arm, seed, Path(folder)) for seed in range(SEEDS)] for arm in ARMS}
    Path(__file__).with_name("finetune.json").write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


if __name__ == "__main__":
    main()
