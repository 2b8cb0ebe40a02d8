"""The fine-tuning example: its commands, and what its page says of its runs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from examples.finetune.finetune import Finetuned
from examples.finetune.measure import ARMS, SEEDS, run, table
from lightning_optim.cli import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "examples/finetune/README.md").read_text()
LINES = re.findall(r"^lightning-optim (fit .*finetune\.yaml(?! --config).*)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers", "ignore:.*Checkpoint directory")
def test_the_commands(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand, with fewer epochs; the checkpoint is made, once."""
    monkeypatch.chdir(ROOT)
    pretrained = tmp_path / "pretrained.pt"
    fast = ["--trainer.max_epochs=4", "--trainer.accelerator=cpu"]
    fast += [f"--model.pretrained={pretrained}", "--model.width=16"]
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={tmp_path}"]
    main([*shlex.split(line), *fast, *logger, "--trainer.enable_progress_bar=false"])
    assert torch.load(pretrained, weights_only=True)["0.0.0.weight"].shape == (16, 1, 3, 3)
    said = capsys.readouterr().out
    assert "Optimizer state of AdamW" in said
    [checkpoint] = tmp_path.rglob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 20
    frozen = "freeze" in line
    body = torch.load(pretrained, weights_only=True)["0.3.0.weight"]
    assert torch.equal(saved["state_dict"]["body.3.0.weight"], body) == frozen


def test_it_begins_with_the_body_of_the_checkpoint(tmp_path: Path) -> None:
    module = Finetuned(pretrained=str(tmp_path / "made.pt"), width=8)
    module.prepare_data()
    module.setup("fit")
    saved = torch.load(tmp_path / "made.pt", weights_only=True)
    assert all(torch.equal(value, saved[f"0.{name}"]) for name, value in module.body.state_dict().items())
    assert not torch.equal(module.head.state_dict()["1.weight"], saved["1.1.weight"])


def test_what_is_committed_is_what_the_page_says(tmp_path: Path) -> None:
    found = json.loads((ROOT / "examples/finetune/finetune.json").read_text())
    assert list(found) == list(ARMS)
    assert all(len(runs) == SEEDS for runs in found.values())
    assert table(found) in PAGE
    again = run("begun anew", 0, tmp_path, epochs=1)
    assert again["bytes"] == found["begun anew"][0]["bytes"]
