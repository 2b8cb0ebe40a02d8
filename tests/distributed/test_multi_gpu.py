"""The YAMLs of examples/multi_gpu behind the configs of other examples, on two processes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.cli import main
from tests.harness.ranks import run_ranks

ROOT = Path(__file__).parents[2]
MODEL = "examples/language_model/transformer.yaml"
QUIET = ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
DATA = ["--data.batches=6", "--data.batch_size=4", "--trainer.limit_val_batches=1"]
SMALL = ["--model.depth=2", "--model.width=16", *DATA]
LARGE = "--model=examples.multi_gpu.model.LargeLanguageModel"
# FSDP1 on CPUs, for which Lightning has to be told that it is another strategy.
ON_CPU = ["--trainer.accelerator=cpu", "--trainer.strategy.class_path=tests.harness.cpu_fsdp.CPUFSDP"]


def fit(folder: Path, name: str, *more: str) -> dict[str, Any]:
    """What a run leaves: its checkpoint."""
    config = ["--config", MODEL, *(["--config", f"examples/multi_gpu/{name}.yaml"] if name else [])]
    logger = ["--trainer.logger=lightning.pytorch.loggers.CSVLogger", f"--trainer.logger.save_dir={folder}"]
    main(["fit", *config, *QUIET, *logger, *SMALL, *more])
    [path] = folder.rglob("*.ckpt")
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


def weights(state: dict[str, Any]) -> Tensor:
    return torch.cat([value.reshape(-1).double() for value in state["state_dict"].values()])


@pytest.fixture(autouse=True, scope="module")
def in_root() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        yield


@pytest.fixture(scope="module")
def ddp(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(fit, tmp_path_factory.mktemp("ddp"), "ddp")[0]


@pytest.mark.parametrize(("name", "more"), [("fsdp2", []), ("fsdp1", ON_CPU), ("fsdp2", [LARGE])])
def test_every_strategy_trains_the_same_language_model(
    name: str, more: list[str], ddp: dict[str, Any], tmp_path: Path
) -> None:
    """Callbacks, the sanity check and a validation included; the large model has first weights of its own."""
    found = run_ranks(fit, tmp_path, name, *more)[0]
    assert found["global_step"] == ddp["global_step"] == 3
    assert found["state_dict"].keys() == ddp["state_dict"].keys()
    difference = (weights(found) - weights(ddp)).abs().max()
    assert difference.isfinite()
    assert (difference < 1e-4) == (LARGE not in more)  # AdamW's steps are 3e-3


def test_the_large_model_says_what_it_is_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        fit(tmp_path, "", LARGE)
    assert end.value.code == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == "lightning-optim: LargeLanguageModel is for FSDP2: add --config examples/multi_gpu/fsdp2.yaml."
