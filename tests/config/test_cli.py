"""The command line: every way to say which optimizer, and one clear sentence for what is wrong."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from torch import nn

import lightning_optim
from lightning_optim import OptimizerStrategy
from lightning_optim.cli import main
from lightning_optim.core.optimizer import OPTIMIZERS
from lightning_optim.language.docstrings import arguments
from tests.config.bad import BAD
from tests.harness.data import Data
from tests.harness.modules import Configured, Plain
from tests.harness.nets import frozen_net
from tests.harness.trainers import QUIET


class Frozen(Configured):
    def __init__(self, optimizer: lightning_optim.OptimizerSpec = "adan") -> None:
        super().__init__(optimizer, frozen_net)


class Bare(Plain):
    """Takes a spec without the mixin."""

    def __init__(self, optimizer: lightning_optim.OptimizerSpec = "adan") -> None:
        super().__init__()
        self.spec = optimizer


@pytest.fixture
def config(tmp_path: Path) -> Any:
    """Writes a config: the trainer's usual keys, and what is given."""

    def write(model: Any = None, callbacks: Any = (), **trainer: Any) -> str:
        saving = {
            "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
            "init_args": {"dirpath": str(tmp_path), "filename": "end"},
        }
        quiet = {**QUIET, "default_root_dir": str(tmp_path)}
        content = {
            "seed_everything": 0,
            "model": model or {"class_path": "tests.harness.modules.Configured"},
            "data": {"class_path": "tests.harness.data.Data"},
            "trainer": {**quiet, "callbacks": [saving, *callbacks], **trainer},
        }
        path = tmp_path / "config.in.yaml"
        path.write_text(yaml.safe_dump(content))
        return str(path)

    return write


def configured(spec: Any) -> dict[str, Any]:
    return {"class_path": "tests.harness.modules.Configured", "init_args": {"optimizer": spec}}


def trained(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the checkpoint that a fit wrote: the first parameter group, and the hyper-parameters."""
    saved = torch.load(folder / "end.ckpt", weights_only=True)
    assert saved["global_step"] == 4
    return saved["optimizer_states"][0]["param_groups"][0], saved["hyper_parameters"]


@pytest.mark.parametrize(
    ("in_config", "arguments", "expected"),
    [
        ("adan", [], {"lr": 1e-3, "betas": (0.98, 0.92, 0.99)}),
        ({"name": "adan", "lr": 0.02}, [], {"lr": 0.02, "no_prox": False}),
        ({"name": "adamw", "lr": 0.02, "no_decay": []}, [], {"lr": 0.02, "weight_decay": 0.01}),
        ("adan", ["--model.init_args.optimizer", "adamw"], {"betas": (0.9, 0.999), "weight_decay": 0.01}),
        ("adan", ["--model.optimizer", "lion"], {"betas": (0.9, 0.99)}),
        ("lion", ["--model.optimizer={name: adan, lr: 0.3, betas: [0.9, 0.9, 0.9]}"], {"lr": 0.3, "no_prox": False}),
        ({"name": "lion", "lr": 0.5}, ["--model.optimizer=adan"], {"lr": 1e-3, "no_prox": False}),
    ],
)
def test_the_optimizer_by_config_and_command_line(
    in_config: Any, arguments: list[str], expected: dict[str, Any], config: Any, tmp_path: Path
) -> None:
    main(["fit", "--config", config(configured(in_config)), *arguments])
    group, hparams = trained(tmp_path)
    assert {key: group[key] for key in expected} == expected
    spec = hparams["optimizer"]
    assert isinstance(spec, str | dict)
    assert OptimizerStrategy.parse(spec).create(nn.Linear(2, 2)).param_groups[0]["lr"] == group["lr"]


BY_DEPTH = {"layer_decay": {"decay": 0.5, "blocks": ["net.0"]}}


@pytest.mark.parametrize(
    ("first", "changes", "expected"),
    [
        ("lion", [".lr", "1e-3"], {"name": "lion", "lr": 1e-3}),
        ("lion", [".lr=1e-3", ".betas=[0.5, 9e-1]"], {"name": "lion", "lr": 1e-3, "betas": [0.5, 0.9]}),
        ({"name": "lion", "lr": 0.5, "no_decay": []}, [".lr=1e-3"], {"name": "lion", "lr": 1e-3, "no_decay": []}),
        ({"name": "lion", "schedule": "cosine"}, [".schedule.final=0.1"], {"name": "cosine", "final": 0.1}),
        ("lion", [".schedule=linear", ".schedule.warmup_steps", "2"], {"name": "linear", "warmup_steps": 2}),
        (
            "lion",
            [".schedule={name: step, warmup_steps: 2}", ".schedule.warmup", "5e-2"],
            {"name": "step", "warmup": 0.05},
        ),
        (
            "lion",
            [".schedule={name: step, warmup: 0.1}", ".schedule.warmup=0.5 epochs"],
            {"name": "step", "warmup": "0.5 epochs"},
        ),
        ({"name": "lion", "lr": 0.5}, [".name=adan"], {"name": "adan", "lr": 0.5}),
        (None, [".lr", "1e-3"], {"name": "adan", "lr": 1e-3}),  # of the module's default
        ({"name": "lion", "lr": 0.5, "schedule": "cosine"}, [".schedule=null"], {"name": "lion", "lr": 0.5}),
        ("lion", [".no_decay+", "*"], {"name": "lion", "no_decay": ["bias", "norm", "*"]}),
        ("lion", [".freeze+", "net.0.*"], {"name": "lion", "freeze": ["net.0.*"]}),
        ("lion", [".layer_decay", "75e-2"], {"name": "lion", "layer_decay": 0.75}),
        ({"name": "lion", "layer_decay": 0.5}, [".layer_decay.blocks=[net.0]"], {"name": "lion"} | BY_DEPTH),
        ("lion", [".groups+={params: '*', lr: 1e-3}"], {"name": "lion", "groups": [{"params": "*", "lr": 1e-3}]}),
    ],
)
@pytest.mark.parametrize("argument", ["--model.optimizer", "--model.init_args.optimizer"])
def test_one_option_on_the_command_line(
    first: Any, changes: list[str], expected: dict[str, Any], argument: str, config: Any, tmp_path: Path
) -> None:
    given = [argument + change if change.startswith(".") else change for change in changes]
    main(["fit", "--config", config(configured(first) if first else None), *given])
    spec = trained(tmp_path)[1]["optimizer"]
    assert spec == expected or spec["schedule"] == expected


def files(tmp_path: Path, *contents: Any) -> list[str]:
    """The arguments for configs that follow each other."""
    given = []
    for i, content in enumerate(contents):
        (tmp_path / f"{i}.yaml").write_text(yaml.safe_dump({"model": content}))
        given += ["--config", str(tmp_path / f"{i}.yaml")]
    return given


@pytest.mark.parametrize("module", [Configured, Bare])
@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("lion", {"lr": 1e-3}, {"name": "lion", "lr": 1e-3}),
        (
            {"name": "lion", "lr": 0.5, "weight_decay": 0.3},
            {"lr": 1e-3},
            {"name": "lion", "lr": 1e-3, "weight_decay": 0.3},
        ),
        ({"name": "lion", "schedule": "cosine"}, {"schedule": {"final": 0.1}}, {"name": "cosine", "final": 0.1}),
        ({"name": "lion", "lr": 0.5}, {"name": "adan"}, "adan"),  # with a name it is whole
        (None, {"lr": 1e-3}, {"name": "adan", "lr": 1e-3}),
    ],
)
def test_a_second_config_changes_one_option(
    module: Any, first: Any, second: Any, expected: Any, tmp_path: Path
) -> None:
    """With a LightningCLI of one's own, for one class of modules or for any, with the mixin and without."""
    for whole in (False, True):
        arguments = [{"optimizer": spec} for spec in (first, second) if spec is not None]
        path = f"{module.__module__}.{module.__name__}"
        given = files(
            tmp_path, *([{"class_path": path, "init_args": args} for args in arguments] if whole else arguments)
        )
        kind: Any = LightningModule if whole else module
        made = LightningCLI(
            kind, run=False, args=given, subclass_mode_model=whole, seed_everything_default=False,
            trainer_defaults=QUIET, save_config_callback=None,
        )  # fmt: skip
        spec: Any = OptimizerStrategy.parse(
            made.model.spec if module is Bare else made.model.hparams.optimizer
        ).as_config()
        assert spec == expected or spec["schedule"] == expected


def test_a_linked_argument_may_be_the_optimizer() -> None:
    class Linked(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            parser.add_argument("--lr", type=float, default=0.5)
            parser.link_arguments("lr", "model.optimizer", compute_fn=lambda lr: {"name": "lion", "lr": lr})

    kind: Any = Configured
    made = Linked(
        kind, run=False, args=["--lr=0.25"], seed_everything_default=False, trainer_defaults=QUIET,
        save_config_callback=None,
    )  # fmt: skip
    assert made.model.hparams.optimizer == {"name": "lion", "lr": 0.25}


def test_a_wrong_change_is_refused(config: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for change, words in (
        (".lrr=1", "optimizer 'lion' has no option 'lrr'. Did you mean lr"),
        (".lr=fast", "optimizer 'lion': lr='fast' must be a number"),
        (".schedule.final=0.1", "schedule={'final': 0.1} has no 'name'"),
    ):
        assert said(capsys, ["fit", "--config", config(configured("lion")), f"--model.optimizer{change}"]).startswith(
            f"lightning-optim: {words}"
        )


def test_a_written_config_can_be_read_again(config: Any, tmp_path: Path) -> None:
    """It is written beside the log: without a logger there is none."""
    logs = f"{{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {{save_dir: {tmp_path / 'logs'}}}}}"
    spec = {"name": "adan", "lr": 0.3, "no_decay": ["bias"]}
    main(["fit", "--config", config(configured(spec)), f"--trainer.logger={logs}", "--trainer.log_every_n_steps=1"])
    (tmp_path / "end.ckpt").unlink()
    (written,) = (tmp_path / "logs").rglob("config.yaml")
    content = yaml.safe_load(written.read_text())
    assert content["model"]["init_args"]["optimizer"] == spec
    again = tmp_path / "again.yaml"
    written.rename(again)
    main(["fit", "--config", str(again)])
    assert trained(tmp_path)[0]["lr"] == 0.3


def said(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """What the command complains of."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    return capsys.readouterr().err


WHOLE = [(spec, words) for spec, words in BAD if not isinstance(spec, dict) or "name" in spec]  # others are changes


@pytest.mark.parametrize(("spec", "words"), WHOLE[::2], ids=lambda value: str(value)[:40])
def test_wrong_specs_in_a_config(
    spec: Any, words: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, ["fit", "--config", config(configured(spec))])
    assert re.search(words, text)
    assert text.startswith("lightning-optim: ")
    assert text.count("\n") == 1
    assert not (tmp_path / "end.ckpt").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model.optimizer=adam2"], "lightning-optim: There is no optimizer named 'adam2'. Did you mean adam"),
        (["--model.optimizer={name: adan, lr: -1}"], "lightning-optim: optimizer 'adan': lr=-1.0 is out of range"),
        (["--trainer.epochs=3"], "epochs"),
    ],
)
def test_wrong_words_on_the_command_line(
    arguments: list[str], words: str, config: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in said(capsys, ["fit", "--config", config(), *arguments])


AVERAGING = "lightning_optim.callbacks.IterateAveraging"


@pytest.mark.parametrize(
    ("callback", "words"),
    [
        ({"class_path": AVERAGING, "init_args": {"kindd": "mean"}}, "Option 'kindd' is not accepted"),
        ({"class_path": AVERAGING, "init_args": {"kind": "median"}}, r"kind.*\n.*Expected .*'mean', 'ema'"),
        ({"class_path": AVERAGING, "init_args": {"decay": 1.5}}, r"^lightning-optim: .*decay=1.5 must be in \(0, 1\)"),
        ({"class_path": AVERAGING + "2"}, "IterateAveraging2"),
        (
            {"class_path": "lightning_optim.callbacks.LookaheadSync", "init_args": {"k": 0}},
            r"^lightning-optim: LookaheadSync: k=0 must be an integer of at least 1",
        ),
    ],
)
def test_wrong_callbacks_in_a_config(
    callback: Any, words: str, config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert re.search(words, said(capsys, ["fit", "--config", config(callbacks=[callback])]))
    assert not (tmp_path / "end.ckpt").exists()


def test_what_only_the_module_shows_is_said_before_training(
    config: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = said(capsys, ["fit", "--config", config({"class_path": "tests.config.test_cli.Frozen"})])
    assert text.splitlines()[-1].startswith("lightning-optim: Frozen has no parameter to train")
    assert not (tmp_path / "end.ckpt").exists()


# ---------------------------------------------------------------- the page of an optimizer


@pytest.mark.parametrize(
    ("arguments", "state", "needs"),
    [
        (
            ["adam"],
            "exp_avg, exp_avg_sq; bytes per parameter: 8 at 32 bits, 4 at 16 bits",
            "nothing beyond one element",
        ),
        (
            ["adam", "amsgrad=true"],
            "exp_avg, exp_avg_sq, max_exp_avg_sq; bytes per parameter: 12 at 32 bits, 8 at 16 bits",
            "nothing beyond one element",
        ),
        (
            ["adafactor", "mode=paper", "beta1=0.9"],
            "row_var, col_var, exp_avg; bytes per parameter: 4 at 32 bits, 2 at 16 bits",
            "norm of each tensor, row and column means",
        ),
        (["lamb", "max_grad_norm=1"], "exp_avg, exp_avg_sq;", "norm of all tensors, norm of each tensor"),
        (["lamb", "adapt=false"], "exp_avg, exp_avg_sq;", "nothing beyond one element"),
        (["sgdw", "momentum=0"], "none; bytes per parameter: 0 at 32 bits", "nothing beyond one element"),
        (
            ["koala_v", "r=2.0", "engine=reference"],
            "P; bytes per parameter: 0 at 32 bits",
            "norm of each tensor, loss, norm of all tensors",
        ),
    ],
)
def test_the_page_counts_state_and_needs_under_the_given_options(
    arguments: list[str], state: str, needs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["optimizers", *arguments])
    assert not done.value.code
    text = " ".join(capsys.readouterr().out.split())
    assert f"State: {state}" in text
    found = re.search(r"Needs: ([^.]*)\.", text)
    assert found
    assert sorted(found[1].split(", ")) == sorted(needs.split(", "))


# ---------------------------------------------------------------- a LightningCLI of one's own


def cli(tmp_path: Path, *arguments: str) -> LightningCLI:
    options = {**QUIET, "enable_checkpointing": False, "default_root_dir": tmp_path}
    return LightningCLI(
        Plain,
        Data,
        args=["fit", "--seed_everything=0", *arguments],
        trainer_defaults=options,
        save_config_callback=None,
    )


@pytest.mark.parametrize("name", ["lightning_optim.Adan", "lightning_optim.optimizers.adan.Adan"])
def test_a_stock_cli_takes_a_class(name: str, tmp_path: Path) -> None:
    done = cli(tmp_path, f"--optimizer={name}", "--optimizer.lr=0.01", "--optimizer.state_bits=16")
    optimizer = done.trainer.optimizers[0]
    assert type(optimizer) is lightning_optim.Adan
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["state_bits"]) == (0.01, 16)
    assert {float(state["step"]) for state in optimizer.state.values()} == {4.0}


def test_a_stock_cli_makes_koala_work_with_its_callback(tmp_path: Path) -> None:
    arguments = ["--optimizer=lightning_optim.KoalaV", "--trainer.callbacks=lightning_optim.callbacks.LossInput"]
    assert cli(tmp_path, *arguments).trainer.global_step == 4


@pytest.mark.parametrize("by", ["lightning_optim.callbacks.EvaluationWeights", ""])
def test_a_stock_cli_evaluates_the_average_with_its_callback(by: str, tmp_path: Path) -> None:
    arguments = ["--optimizer=lightning_optim.ScheduleFreeAdamW", *([f"--trainer.callbacks={by}"] if by else [])]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        done: Any = cli(tmp_path, *arguments)
    said = [str(one.message) for one in caught if "without the callback EvaluationWeights" in str(one.message)]
    assert len(said) == (0 if by else 1)
    assert done.trainer.optimizers[0].is_training == (not by)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--optimizer.lr=fast"], "Expected a <class 'float'>"),
        (["--optimizer.state_bits=7"], "Expected a typing.Literal[32, 16"),
        (["--optimizer.betas=[0.9, 0.99]"], "Expected a tuple with 3 elements"),
        (["--optimizer.careful=true"], "Option 'careful' is not accepted"),
    ],
)
def test_a_stock_cli_checks_types(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli(tmp_path, "--optimizer=lightning_optim.Adan", *arguments)
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("name", ["adan", "adafactor", "adamw", "koala_v", "lamb", "sgdw"])
def test_the_help_explains_every_option(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cls = OPTIMIZERS[name]
    with pytest.raises(SystemExit):
        cli(tmp_path, f"--optimizer.help=lightning_optim.{cls.__name__}")
    text = " ".join(capsys.readouterr().out.split()).split("Help for")[1]
    for option in cls.options.values():
        found = re.search(rf"--optimizer\.{option.name} \S+ ([^(]*)(.*?)\(type: .*?, default: ", text)
        assert found, f"{option.name} is not in the help of {name}"
        assert len(found[1]) > 8, f"nothing is said of {option.name}"
        if not option.shared:
            start = arguments(cls.__doc__)[option.name].partition("(")[0].split()[:6]
            assert " ".join(start) in found[1], f"{option.name} of {name} is explained in other words"
    assert {"maximize", "state_bits", "engine"} <= cls.options.keys()


def test_a_page_says_where_its_recommended_options_come_from(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["optimizers", "lars"])
    told = " ".join(capsys.readouterr().out.split())
    assert "On digits: what did best in a few runs of examples/digits" in told
    assert "On other data begin with the default" in told
