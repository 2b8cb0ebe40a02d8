"""The example for several machines on two "nodes" of one process each, which torchrun starts on the loopback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer

from examples.digits.digits import DigitsClassifier, DigitsData
from tests.harness.modules import vector
from tests.harness.ranks import _free_port
from tests.harness.trainers import trainer

ROOT = Path(__file__).parent.parent.parent
CONFIG = "examples/multi_gpu/nodes.yaml"
STEPS = 3


class Weights(Callback):
    """Each rank leaves its last weights in a file."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = {"weights": vector(pl_module), "rank": trainer.global_rank, "node": trainer.node_rank}
        torch.save(found, self.folder / f"{trainer.global_rank}.pt")


def start(node: int, port: int, folder: Path) -> subprocess.Popen[str]:
    script = folder / "lightning-optim"
    script.write_text("from lightning_optim.cli import main\n\nmain()\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env["GLOO_SOCKET_IFNAME"] = "lo0" if sys.platform == "darwin" else "lo"
    env.pop("TRITON_INTERPRET", None)
    nodes = ["--nnodes=2", "--nproc-per-node=1", f"--node-rank={node}", "--master-addr=127.0.0.1"]
    line = [sys.executable, "-m", "torch.distributed.run", *nodes, f"--master-port={port}", str(script)]
    line += ["fit", "--config", CONFIG, "--trainer.accelerator=cpu", f"--trainer.max_steps={STEPS}"]
    line += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.log_every_n_steps=1"]
    line += ["--trainer.callbacks+=tests.distributed.test_nodes.Weights", f"--trainer.callbacks.folder={folder}"]
    return subprocess.Popen(line, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder, port = tmp_path_factory.mktemp("nodes"), _free_port()
    nodes = [start(node, port, folder) for node in (0, 1)]
    try:
        said = [node.communicate(timeout=200)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    return folder, [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


def test_both_nodes_end_with_the_same_weights(results: tuple[Path, list[dict[str, Any]]]) -> None:
    _, found = results
    assert [(one["rank"], one["node"]) for one in found] == [(0, 0), (1, 1)]
    assert torch.equal(found[0]["weights"], found[1]["weights"])


def test_they_are_those_of_one_process(results: tuple[Path, list[dict[str, Any]]]) -> None:
    """The same batches in one process: the gradients of each node's half were rounded to bfloat16 on their way.

    That is one part in 512, and Adan makes much of it only where a gradient is nearly zero, so the way from the first
    weights to the last agrees to a few percent of its length.
    """
    from lightning.pytorch import seed_everything

    seed_everything(0, verbose=False)
    module, data = DigitsClassifier("adan"), DigitsData()
    initial = vector(module)
    trainer(max_steps=STEPS).fit(module, data)
    _, found = results
    moved, off = (vector(module) - initial).norm(), (found[0]["weights"] - vector(module)).norm()
    assert 0 < off < 0.03 * moved


def test_one_checkpoint_is_written_and_whole(results: tuple[Path, list[dict[str, Any]]]) -> None:
    from lightning_optim.checkpoints.integrity import damage

    folder, found = results
    (checkpoint,) = folder.rglob("*.ckpt")
    assert damage(checkpoint) == ""
    state = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert torch.equal(torch.cat([value.reshape(-1) for name, value in state.items()]), found[0]["weights"])


def test_the_slurm_script_asks_for_what_the_config_says() -> None:
    """It cannot run here: its syntax, its command and its numbers."""
    script = ROOT / "examples" / "multi_gpu" / "slurm.sh"
    subprocess.run(["bash", "-n", str(script)], check=True)
    text, config = script.read_text(), yaml.safe_load((ROOT / CONFIG).read_text())
    asked = {key: int(value) for key, value in re.findall(r"^#SBATCH --([a-z-]+)=(\d+)$", text, re.MULTILINE)}
    assert asked["nodes"] == config["trainer"]["num_nodes"]
    assert asked["ntasks-per-node"] == config["trainer"]["devices"]
    assert f"srun lightning-optim fit --config {CONFIG}" in text
    readme = (ROOT / "examples" / "multi_gpu" / "README.md").read_text()
    assert readme.count(f"--no-python lightning-optim fit --config {CONFIG}") == 2  # one for each node
