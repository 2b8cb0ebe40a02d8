"""The command `lightning-optim`: help that helps, exit codes, and text that fits terminals and pipes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightning_optim
from lightning_optim.cli import main
from lightning_optim.config import layout
from lightning_optim.config.catalog import lines
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.docstrings import arguments

ROOT = Path(__file__).parents[2]


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """The exit status, and what stands on stdout and stderr."""
    with pytest.raises(SystemExit) as end:
        main(arguments)
    printed = capsys.readouterr()
    return int(end.value.code or 0), printed.out, printed.err


@pytest.mark.parametrize("option", ["--help", "-h"])
def test_the_help_lists_every_command(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, option)
    assert (status, err) == (0, "")
    for command in ("fit", "validate", "test", "predict", "compare", "optimizers", "--version"):
        assert f"\n  {command} " in out
    assert max(map(len, out.splitlines())) <= 80
    status, out, _ = run(capsys, "optimizers", option)
    assert status == 0
    assert out.startswith("usage: lightning-optim optimizers [NAME ...] [OPTION=VALUE ...]")
    assert max(map(len, out.splitlines())) <= 80


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "--version") == (0, f"lightning-optim {lightning_optim.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fitt"], "lightning-optim: there is no command 'fitt'. Did you mean fit"),
        (["compile"], "lightning-optim: there is no command 'compile'. Did you mean compare?"),
        (["optimizers", "adam2"], "lightning-optim: There is no optimizer named 'adam2'. Did you mean adam"),
        (["optimizers", "--all"], "lightning-optim: '--all' is no option of `optimizers`; --help says more."),
        (["optimizers", "lr=1"], "lightning-optim: 'lr=1' is an option of no optimizer; name one, such as: adamw lr=1"),
        (["optimizers", "adan", "lrr=1"], "lightning-optim: Adan has no option 'lrr'. Did you mean lr?"),
        (["optimizers", "adan", "lr=[oops"], "lightning-optim: Adan: lr='[oops' must be a number."),
    ],
)
def test_what_is_not_known_gets_one_sentence(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith(words)
    assert err.count("\n") == 1


def test_without_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys)
    assert (status, out) == (2, "")
    assert err.startswith("usage: lightning-optim COMMAND")


def test_an_option_of_a_description_is_one_of_the_optimizer(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["optimizers", "adam", "engine=fast"])
    assert (end.value.code, "engine='fast'" in capsys.readouterr().err) == (2, True)


def test_the_help_of_fit_says_where_an_optimizer_goes(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "fit", "--help")
    assert status == 0
    text = " ".join(out.split())
    assert text.startswith("usage: lightning-optim [options] fit")
    known = text.partition("known subclasses: torch.optim")[2].partition(")")[0]
    offered = set(re.findall(r"lightning_optim\.[\w.]+", known))
    assert offered == {f"lightning_optim.{cls.__name__}" for cls in OPTIMIZERS.values()}  # no base classes
    assert "A ConfiguredOptimizer takes --model.optimizer adan, or a mapping such as {name: adan, lr: 0.002}" in text
    status, out, _ = run(capsys, "fit", "--model.help", "tests.harness.modules.Configured")
    text = " ".join(out.split())
    assert "--model.optimizer OPTIMIZER A name, such as adan, or a mapping with name and options" in text


@pytest.mark.parametrize("width", [20, 40, 80, 120, layout.UNLIMITED])
def test_words_are_never_cut(width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    _, out, _ = run(capsys, "optimizers")
    texts = [text for entry in lines() for text in (entry.name, entry.paper, *entry.slots, *entry.needs)]
    words = {word for text in texts for word in text.split()}
    assert words <= {word.strip(",:") for word in out.split()} | set(out.split())
    long = [line for line in out.splitlines() if len(line) > width]
    assert [line for line in long if len(line.split()) > 2] == []
    for name in OPTIMIZERS:
        _, out, _ = run(capsys, "optimizers", name)
        told = " ".join(text for key, text in arguments(OPTIMIZERS[name].__doc__).items() if key != "params")
        assert set(told.split()) <= set(out.split())


def test_a_pipe_gets_a_line_for_each_optimizer_and_may_close() -> None:
    """In any encoding."""
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "PYTHONIOENCODING": "ascii"}
    code = "from lightning_optim.cli import main; main()"
    script = f"'{sys.executable}' -W ignore -c '{code}' optimizers | head -n 5"
    done = subprocess.run(script, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    lines_of_table = done.stdout.splitlines()
    assert [line.split()[0] for line in lines_of_table[3:]] == sorted(OPTIMIZERS)[:2]
    assert done.stderr == ""
    closed = script.replace("| head -n 5", ">&-")
    assert subprocess.run(closed, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True).stderr == ""


def test_without_a_logger_the_config_in_the_current_folder_is_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would write the config that it has read there, and refuse since `config.yaml` exists."""
    monkeypatch.chdir(tmp_path)
    mine = (
        "seed_everything: 1\n"
        "model: {class_path: lightning.pytorch.demos.boring_classes.BoringModel}\n"
        "trainer: {accelerator: cpu, max_steps: 1, limit_val_batches: 0, logger: false, enable_checkpointing: false}\n"
    )
    Path("config.yaml").write_text(mine)
    main(["fit", "--config", "config.yaml", "--trainer.enable_progress_bar", "false"])
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert Path("config.yaml").read_text() == mine
