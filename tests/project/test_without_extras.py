"""What `pip install lightning-optim` alone gives: everything but extras, each of which is named with its command."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lightning_optim.errors import EXTRAS
from tests.harness.bare import run_without

DISTRIBUTIONS = {"sklearn": "scikit-learn"}
HIDDEN = {DISTRIBUTIONS.get(package, package) for package in EXTRAS}

SCRIPT = """
import contextlib, importlib.util, io, json, sys, warnings
import lightning.pytorch, torch

before = set(sys.modules)
from lightning_optim import Adan

loaded = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
from lightning_optim.cli import main

warnings.simplefilter("ignore")
found = {"loaded": loaded, "installed": [name for name in %(extras)r if importlib.util.find_spec(name)]}
fit = ["fit", "--model", "tests.harness.modules.Configured", "--data", "tests.harness.data.Data"]
fit += ["--trainer.max_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
fit += ["--trainer.enable_model_summary=false"]
commands = {
    "optimizers": ["optimizers", "adan"],
    "csv": [*fit, "--trainer.callbacks=lightning_optim.callbacks.OptimizerStateMemory"],
    "tensorboard": [*fit, "--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=."],
}
for name, arguments in commands.items():
    out, err = io.StringIO(), io.StringIO()
    status = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(arguments)
        except SystemExit as end:
            status = end.code
    found[name] = [status, out.getvalue(), err.getvalue()]
weight = torch.nn.Parameter(torch.ones(1))
weight.grad = torch.ones(1)
try:
    Adan([weight], engine="triton").step()
except ValueError as error:
    found["triton"] = str(error)
print("FOUND" + json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What came of several commands, in one process without any package of an extra."""
    folder = tmp_path_factory.mktemp("bare")
    printed = run_without(HIDDEN, folder, SCRIPT % {"extras": list(EXTRAS)})
    answer: dict[str, Any] = json.loads(printed.partition("FOUND")[2])
    return answer


def test_none_of_them_is_there(found: dict[str, Any]) -> None:
    assert found["installed"] == []


def test_the_import_loads_little_beside_torch_and_lightning(found: dict[str, Any]) -> None:
    """It takes 0.15 s more. What draws, reads data or computes statistics is imported where it is used."""
    assert set(found["loaded"]) <= {"lightning_optim", "jsonargparse", "typeshed_client", "ruamel", "yaml"}


def test_commands_work_without(found: dict[str, Any]) -> None:
    assert found["optimizers"][0] == 0
    status, out, err = found["csv"]
    assert status == 0, err
    assert "Optimizer state of Adan" in out


def test_tensorboard_is_named_with_its_command(found: dict[str, Any]) -> None:
    status, _, err = found["tensorboard"]
    assert status == 2
    last = err.strip().splitlines()[-1]
    assert last == (
        "lightning-optim: tensorboard is needed, and is not installed. Type: pip install 'lightning-optim[tensorboard]'"
    )
    assert "Traceback" not in err


def test_triton_is_named_with_its_command(found: dict[str, Any]) -> None:
    assert "triton is not installed (pip install 'lightning-optim[triton]')" in found["triton"]
