"""The language model from its config, and what is committed of its runs."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
import yaml

from examples.language_model.warm_up import LRS, NORMS, SEEDS, WARM_UP, arms, cells, train
from lightning_optim.cli import main

CONFIG = "examples/language_model/transformer.yaml"
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("norm", NORMS)
def test_a_few_steps_by_the_command(
    norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    small = [
        "--model.depth=4",
        "--model.width=32",
        "--data.batch_size=4",
        "--data.batches=6",
        "--trainer.limit_val_batches=1",
    ]
    logs = f"--trainer.logger.init_args.save_dir={tmp_path}"
    quiet = ["--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", CONFIG, f"--model.norm={norm}", *small, *quiet, logs])
    assert "Gradient norms of blocks (4 blocks) before step 1" in capsys.readouterr().out
    [checkpoint] = tmp_path.glob("language_model/version_0/checkpoints/*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    assert saved["global_step"] == 6
    assert saved["hyper_parameters"]["norm"] == norm
    assert ("last_norm.weight" in saved["state_dict"]) == (norm == "pre")
    [profile] = saved["callbacks"]["GradientNormProfile"]["profiles"]["blocks"]
    assert len(profile["norms"]["feed_forward_output"]) == 4


def test_a_wrong_word_gets_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit):
        main(["fit", "--config", CONFIG, "--model.norm=both"])
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1] == "lightning-optim: TransformerBlock: norm='both' must be 'pre' or 'post'."


def test_what_is_committed_is_what_the_script_runs() -> None:
    """All arms and seeds, at the learning rate of the config too; a warm-up changes nothing before the first step."""
    folder = ROOT / "examples/language_model"
    config = yaml.safe_load((folder / "transformer.yaml").read_text())
    assert config["model"]["init_args"]["optimizer"]["lr"] in LRS
    found = json.loads((folder / "warm_up.json").read_text())["runs"]
    runs = {(run["lr"], run["norm"], run["warm_up"], run["seed"]): run for run in found}
    assert list(runs) == list(itertools.product(LRS, NORMS, (0, WARM_UP), SEEDS))
    for norm, seed in itertools.product(NORMS, SEEDS):
        assert len({runs[lr, norm, n, seed]["losses"][0] for lr in LRS for n in (0, WARM_UP)}) == 1
    page = (folder / "README.md").read_text()
    for arm in arms(found):
        assert f"| {' | '.join(cells(arm))} |" in page


def test_a_run_of_the_script() -> None:
    run = train(3e-3, "post", 2, seed=0, steps=3)
    assert (run["norm"], run["warm_up"], len(run["losses"])) == ("post", 2, 3)
    assert 2 < run["val_loss"] < 7
