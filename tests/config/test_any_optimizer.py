"""Optimizers of torch and of other libraries by their class path: as built by hand, and refused in our words."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from lightning_optim import (
    Adan,
    OptimizerStrategy,
    OptionError,
    create_optimizer,
    list_optimizers,
    register_optimizer,
)
from lightning_optim.callbacks import IterateAveraging, LookaheadSync
from lightning_optim.cli import main
from lightning_optim.config.recipes import REGISTERED
from lightning_optim.core.optimizer import OPTIMIZERS, Optimizer
from lightning_optim.reports.memory import predicted_memory, state_memory
from tests.harness.data import batches
from tests.harness.modules import Configured, Made, vector
from tests.harness.nets import frozen_net, plain_net
from tests.harness.ranks import run_ranks
from tests.harness.strategies import Kind, strategy_of
from tests.harness.trainers import trainer
from tests.harness.worlds import whole

CLASSES = sorted(
    name for name, cls in vars(torch.optim).items() if isinstance(cls, type) and cls is not torch.optim.Optimizer
)
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "LBFGS": {"max_iter": 3, "line_search_fn": "strong_wolfe"},
    "Rprop": {"etas": [0.4, 1.1]},
    "AdamW": {"betas": [0.8, 0.9], "amsgrad": True},
}


class Table(nn.Module):
    """A sparse embedding and nothing else; its inputs are the signs of those of the data."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Embedding(2, 2, sparse=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rows((x[:, 0] > 0).long())  # type: ignore[no-any-return]


def net_for(name: str) -> Any:
    if name == "SparseAdam":
        return Table
    if name == "Muon":  # of torch: matrices alone
        return lambda: nn.Sequential(nn.Linear(4, 6, bias=False), nn.Tanh(), nn.Linear(6, 2, bias=False))
    return plain_net


def spec_for(name: str) -> dict[str, Any]:
    return {"name": f"torch.optim.{name}", "lr": 0.05, **OPTIONS.get(name, {})}


def by_hand(name: str, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in OPTIONS.get(name, {}).items()}
    made: torch.optim.Optimizer = getattr(torch.optim, name)(groups, lr=0.05, **options)
    return made


def by_role(name: str, params: list[nn.Parameter]) -> list[dict[str, Any]]:
    if name == "Muon":  # its network has no biases
        return [{"params": params}]
    return [{"params": params[::2]}, {"params": params[1::2], "weight_decay": 0.0}]


def fitted(module: Any, *callbacks: Any, **options: Any) -> Tensor:
    trainer(*callbacks, max_epochs=1, **options).fit(module, batches())
    return vector(module)


def decaying(name: str) -> bool:
    return "weight_decay" in OptimizerStrategy(f"torch.optim.{name}").kind.options


@pytest.mark.parametrize("name", CLASSES)
def test_a_run_is_that_of_the_class_built_by_hand(name: str) -> None:
    """Bit for bit: with defaults, with weight decay for weights alone, and with a rate of its own for one layer."""
    weights: list[str] = []
    runs: list[tuple[dict[str, Any], Any]] = [({}, lambda ps: [{"params": ps}])]
    if name not in ("SparseAdam", "LBFGS"):
        runs.append(
            (
                {"groups": [{"params": "net.2.*", "lr": 0.001}]},
                lambda ps: [{"params": ps[: len(ps) // 2]}, {"params": ps[len(ps) // 2 :], "lr": 0.001}],
            )
        )
    if decaying(name):
        runs.append(({"weight_decay": 0.2}, lambda ps: [{"weight_decay": 0.2, **group} for group in by_role(name, ps)]))
    for more, groups in runs:
        spec = {**spec_for(name), **({"no_decay": []} if decaying(name) and "weight_decay" not in more else {}), **more}
        torch.manual_seed(0)
        mine = Configured(spec, net_for(name))
        torch.manual_seed(0)
        hand = Made(lambda ps, groups=groups: by_hand(name, groups(ps)), net_for(name))  # type: ignore[misc]
        before = vector(mine)
        assert torch.equal(before, vector(hand))
        assert torch.equal(fitted(mine), fitted(hand))
        assert not torch.equal(vector(mine), before)
        weights.append(str(vector(mine).tolist()))
        strategy = OptimizerStrategy.parse(mine.hparams["optimizer"])
        assert OptimizerStrategy.parse(yaml.safe_load(yaml.safe_dump(strategy.as_config()))) == strategy
    assert len(set(weights)) == len(weights)


# ---------------------------------------------------------------- what is wrong


class NoGroups(torch.optim.SGD):
    """Takes one group, as LBFGS does, and has a weight decay."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        if len(self.param_groups) > 1:
            raise ValueError("one group, please")


class Handing(torch.optim.SGD):
    """Hands on what it does not know."""

    def __init__(self, params: Any, warm: int = 3, **options: Any) -> None:
        super().__init__(params, **options)
        self.warm = warm


class Base(torch.optim.Optimizer):
    """As base classes of other packages: what it takes is given by the classes, which swallow what they do not know."""

    def __init__(self, params: Any, defaults: dict[str, Any], **options: Any) -> None:
        self.maximize = options.get("maximize", False)
        super().__init__(params, defaults)


class Swallowing(Base):
    def __init__(self, params: Any, lr: float = 0.5, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)


HERE = __name__
WRONG: list[tuple[Any, str]] = [
    ("torch.optim.Sdg", r"optimizer 'torch.optim.Sdg': torch.optim has no 'Sdg'. Did you mean SGD"),
    ("torch.optim.sgd", r"torch.optim has no 'sgd'. Did you mean SGD|'torch.optim.sgd' is a module. .* mean SGD"),
    ("torch.nn.Linear", r"'torch.nn.Linear' is a class, but no optimizer. Name a subclass of torch.optim.Optimizer"),
    ("torch.optim.Optimizer", r"'torch.optim.Optimizer' is the base class of optimizers"),
    ("lightning_optim.Optimizer", r"'lightning_optim.Optimizer' is the base class of optimizers"),
    ("lightning_optim.create_optimizer", r"is no class, but <function create_optimizer"),
    ("torchx.optim.SGD", r"there is no module 'torchx' here. Install the package that has it"),
    ("broken_module.SGD", r"importing broken_module failed: ZeroDivisionError: division by zero"),
    ("needing_module.SGD", r"importing needing_module failed: No module named 'not_there'"),
    ("Rprop", r"There is no optimizer named 'Rprop'. Did you mean torch.optim.Rprop\?"),
    ("SGD", r"no optimizer named 'SGD'. Did you mean sgd or torch.optim.SGD\?"),
    (int, r"'builtins.int' is a class, but no optimizer"),
    (
        {"name": "torch.optim.SGD", "momentun": 1},
        r"has no option 'momentun'. Did you mean momentum\? Its options are lr",
    ),
    ({"name": "torch.optim.SGD", "lr": -1}, r"'torch.optim.SGD': SGD refuses lr=-1: Invalid learning rate: -1"),
    ({"name": "torch.optim.SGD", "lr": "1e-3"}, r"lr='1e-3' must be a finite number"),
    ({"name": "torch.optim.SGD", "lr": float("inf")}, r"lr=inf must be a finite number"),
    ({"name": "torch.optim.SGD", "lr": None}, r"lr=None must be a finite number"),
    ({"name": "torch.optim.SGD", "lr": True}, r"lr=True must be a finite number"),
    ({"name": "torch.optim.SGD", "momentum": float("nan")}, r"momentum=nan must be a number"),
    ({"name": "torch.optim.SGD", "momentum": 10**400}, r"momentum=1000+... must be a number"),
    ({"name": "torch.optim.Adam", "betas": [0.9, 2], "lr": 0.1}, r"Adam refuses betas=\(0.9, 2\): Invalid beta"),
    ({"name": "torch.optim.Adam", "state_bits": 8}, r"no option 'state_bits', which is of our own optimizers"),
    ({"name": "torch.optim.Adam", "full_precision": []}, r"has no full_precision: Adam keeps its state in its own way"),
    ({"name": "torch.optim.LBFGS", "no_decay": []}, r"has no weight_decay, so no_decay would mean nothing"),
    ({"name": "torch.optim.LBFGS", "groups": [{"params": "*", "lr": 1}]}, r"LBFGS takes one parameter group only"),
    ({"name": "torch.optim.SGD", "groups": [{"params": "*", "lr": -1}]}, r"group '\*': SGD refuses lr=-1: Invalid"),
    ({"name": "torch.optim.SGD", "groups": [{"params": "*", "lrr": 1}]}, r"group '\*' has no option 'lrr'. Did you"),
    ({"name": f"{HERE}.NoGroups"}, r"needs lr, for which NoGroups has no default.*such as lr: 0.001"),
    ({"name": f"{HERE}.Swallowing", "lrr": 1}, r"no option 'lrr'. Did you mean lr\? Its options are lr"),
    ({"name": "torch.optim.Adam", "betas": [0.9]}, r"betas=\[0.9\] must have 2 values, as its default \(0.9, 0.999\)"),
    ({"name": f"{HERE}.NoGroups", "lr": -1}, r"NoGroups refuses lr=-1: Invalid learning rate"),
    ({"name": f"{HERE}.Handing", "momentun": 1}, r"no option 'momentun'. Did you mean momentum.*options are warm, lr"),
    ({"name": f"{HERE}.Handing", "groups": [{"params": "*", "warm": 1}]}, r"warm is one for all groups"),
    ({"class_path": "torch.optim.SGD", "lr": 1}, r"must be class_path and init_args, or a mapping with name"),
]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    (tmp_path / "needing_module.py").write_text("import not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("broken_module", "needing_module"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(("spec", "words"), WRONG, ids=str)
def test_wrong_classes_and_options(spec: Any, words: str, modules: None) -> None:
    with pytest.raises(OptionError, match=words) as caught:
        OptimizerStrategy.parse(spec)
    assert "\n" not in str(caught.value)
    with pytest.raises(OptionError, match=words):
        create_optimizer(spec, plain_net())


@pytest.mark.parametrize(
    ("net", "spec", "words"),
    [
        (frozen_net, "torch.optim.SGD", "no parameter to train"),
        (plain_net, "torch.optim.Muon", "'torch.optim.Muon': Muon refuses these parameters: .*2D parameters"),
        (plain_net, "torch.optim.SparseAdam", r"serves embeddings with sparse=True.*net.0.weight has dense gradients"),
        (
            plain_net,
            {"name": f"{HERE}.NoGroups", "lr": 0.1, "weight_decay": 0.1},
            r"NoGroups takes one parameter group only, so biases and norms.*weight_decay=0.1. Write no_decay: \[\]",
        ),
    ],
)
def test_what_does_not_fit_the_module(net: Any, spec: Any, words: str) -> None:
    module = Configured(spec, net)
    with pytest.raises(OptionError, match=words):
        fitted(module)
    assert not module.losses


# ---------------------------------------------------------------- what works


def test_a_class_is_as_good_as_its_path() -> None:
    assert OptimizerStrategy(torch.optim.SGD, lr=0.1).as_config() == {"name": "torch.optim.SGD", "lr": 0.1}
    assert OptimizerStrategy(Adan) == OptimizerStrategy("lightning_optim.Adan") == OptimizerStrategy("adan")
    written = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    assert OptimizerStrategy.parse(written) == OptimizerStrategy.parse(torch.optim.SGD, lr=0.1)
    optimizer: Any = create_optimizer(torch.optim.SGD, plain_net(), lr=0.1)
    assert [(type(optimizer), group["lr"]) for group in optimizer.param_groups] == [(torch.optim.SGD, 0.1)] * 2
    one = create_optimizer({"name": f"{HERE}.NoGroups", "lr": 0.1, "weight_decay": 0.1, "no_decay": []}, plain_net())
    assert len(one.param_groups) == len(create_optimizer(NoGroups, plain_net(), lr=0.1).param_groups) == 1
    assert create_optimizer(Swallowing, plain_net(), maximize=True).param_groups[0]["lr"] == 0.5
    handing: Any = create_optimizer(Handing, plain_net(), warm=5, momentum=0.5)
    assert (handing.warm, handing.param_groups[0]["momentum"]) == (5, 0.5)


def test_what_does_not_decay_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Since a class that is made by hand decays all parameters."""
    fitted(Configured("torch.optim.AdamW"))
    assert "torch.optim.AdamW: weight_decay=0.01 leaves out 2 parameters: biases and norms" in caplog.text
    caplog.clear()
    fitted(Configured({"name": "torch.optim.AdamW", "no_decay": []}))
    assert "leaves out" not in caplog.text


def test_a_class_of_a_function_works_where_nothing_is_saved() -> None:
    class Local(torch.optim.SGD):
        pass

    local: Any = create_optimizer(Local, plain_net(), lr=0.1)
    assert type(local) is Local
    with pytest.raises(OptionError, match=r"Local.* is defined in a function.*top of a module.*register_optimizer"):
        fitted(Configured(Local))


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`", "ignore:.*your dataloader is not resumable")
@pytest.mark.parametrize(
    ("spec", "callback"),
    [
        ({"name": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9, "schedule": "cosine"}, LookaheadSync),
        ({"name": "torch.optim.LBFGS", "lr": 0.1, "max_iter": 2}, IterateAveraging),
        ({"name": "lion_pytorch.Lion", "lr": 0.01}, IterateAveraging),
    ],
    ids=str,
)
def test_a_run_that_is_resumed_is_the_same(spec: Any, callback: Any, tmp_path: Path) -> None:
    """With a schedule and with callbacks that keep slots in its state."""
    saving = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=4, save_on_train_epoch_end=False, save_top_k=-1)
    torch.manual_seed(0)
    whole = Configured(spec)
    trainer(saving, callback(), max_steps=8).fit(whole, batches())
    again = Configured.load_from_checkpoint(tmp_path / "step=4.ckpt")
    assert again.hparams["optimizer"] == spec
    fitting = trainer(callback(), max_steps=8)
    fitting.fit(again, batches(), ckpt_path=tmp_path / "step=4.ckpt")
    assert torch.equal(vector(again), vector(whole))
    if spec["name"] != "torch.optim.LBFGS":
        found = predicted_memory(create_optimizer({**spec, "schedule": None}, Configured()))
        slots = {entry.slot: entry.bytes for entry in found if entry.elements > 1}
        kept = [entry for entry in state_memory(fitting.optimizers[0]) if entry.slot in slots]
        assert [(e.slot, e.bytes) for e in found if e.slot in slots] == [(e.slot, e.bytes) for e in kept]
        assert len(kept) == 4


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "LBFGS"])
def test_predicted_memory_is_that_of_a_step(name: str) -> None:
    """To the byte, with the numbers that each parameter has, and for sparse gradients."""
    net = net_for(name)()
    optimizer = create_optimizer(spec_for(name), net)
    predicted = predicted_memory(optimizer)
    net(torch.ones(8, 4, dtype=torch.float32, device="cpu")).sum().backward()
    optimizer.step()
    assert sorted((e.name, e.slot, e.bytes) for e in predicted) == sorted(
        (e.name, e.slot, e.bytes) for e in state_memory(optimizer)
    )


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (
            "torch.optim.Adam",
            "torch.optim.SGD",
            r"SGD keeps no state|SGD keeps momentum_buffer, and the checkpoint is of",
        ),
        (
            "torch.optim.Adam",
            "torch.optim.RMSprop",
            r"RMSprop keeps square_avg, and .* with exp_avg, exp_avg_sq. Go on",
        ),
        (
            "torch.optim.Adam",
            "torch.optim.LBFGS",
            r"groups of \[2, 2\] parameters, and these are \[4\].*no_decay: \[\]",
        ),
        (
            "adan",
            "torch.optim.AdamW",
            r"is of another optimizer, with betas=\(0.98, 0.92, 0.99\).*load_from_checkpoint",
        ),
        ({"name": "adamw", "state_bits": 8}, "torch.optim.AdamW", ""),
        ("torch.optim.AdamW", "adamw", ""),
    ],
)
def test_a_checkpoint_of_another_class_is_taken_or_refused(before: Any, after: Any, words: str, tmp_path: Path) -> None:
    """torch would take each, and fail in the next step."""
    trainer(ModelCheckpoint(tmp_path, "end"), max_epochs=1).fit(Configured(before), batches())
    module, fitting = Configured(after), trainer(max_epochs=2)
    if not words:
        fitting.fit(module, batches(), ckpt_path=tmp_path / "end.ckpt")
        assert {float(state["step"]) for state in fitting.optimizers[0].state.values()} == {8.0}
        return
    with pytest.raises(OptionError, match=words):
        fitting.fit(module, batches(), ckpt_path=tmp_path / "end.ckpt")
    assert not module.losses


OVER_RANKS = {
    "name": "torch.optim.AdamW",
    "lr": 0.01,
    "groups": [{"params": "net.2.*", "lr": 0.1}],
    "schedule": "linear",
}


def final(kind: Kind, folder: Path, resume: bool = False) -> tuple[list[int], Tensor]:
    """The sizes of the groups and the weights after a fit, which saves after four steps or goes on from there."""
    torch.manual_seed(0)
    module = Configured(OVER_RANKS)
    saving = ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_on_train_epoch_end=False, save_top_k=-1)
    fitting = trainer(saving, strategy=strategy_of(kind), max_steps=6)
    fitting.fit(module, batches(), ckpt_path=folder / "step=4.ckpt" if resume else None)
    weights = torch.cat([p.reshape(-1) for p in whole(fitting.strategy.model or module).values()])
    return [len(group["params"]) for group in fitting.optimizers[0].param_groups], weights


def every_kind(folder: Path) -> list[Tensor]:
    kinds: list[Kind] = ["ddp", "fsdp1 full", "fsdp2 full"]
    return [final(kind, folder / kind, resume)[1] for kind in kinds for resume in (False, True)]


@pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable")
def test_ranks_train_as_one_process_does(tmp_path: Path) -> None:
    """Under DDP and FSDP, with groups and a schedule, from the start and resumed."""
    sizes, alone = final("single", tmp_path / "single")
    assert sizes == [1, 1, 1, 1]
    for of_rank in run_ranks(every_kind, tmp_path):
        for found in of_rank:
            torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-6)


def test_the_command_describes_a_class(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (["torch.optim.SGD"], ["SGD(params, lr=0.001, momentum=0", "stochastic gradient descent", "State: none."]),
        (["torch.optim.AdamW", "amsgrad=true"], ["max_exp_avg_sq; bytes per parameter: 12", "amsgrad=True"]),
        (["torch.optim.LBFGS"], ["State: it is not known before a run", "one parameter group only"]),
        ([f"{HERE}.NoGroups"], ["NoGroups(params, lr, weight_decay=0.0)"]),
    ):
        with pytest.raises(SystemExit) as done:
            main(["optimizers", *arguments])
        said = capsys.readouterr()
        assert (done.value.code, said.err) == (0, "")
        assert all(word in said.out for word in words), said.out
    with pytest.raises(SystemExit):
        main(["optimizers", "torch.optim.SGD", "lrr=1"])
    assert capsys.readouterr().err.startswith("lightning-optim: optimizer 'torch.optim.SGD' has no option 'lrr'")


# ---------------------------------------------------------------- words of one's own


class Mine(torch.optim.SGD):
    """SGD with another name.

    Args:
        lr: Step size.
    """


@pytest.fixture
def registry() -> Iterator[None]:
    before, pages = dict(REGISTERED), dict(OPTIMIZERS)
    yield
    for found, kept in ((REGISTERED, before), (OPTIMIZERS, pages)):
        for word in found.keys() - kept.keys():
            del found[word]


def test_a_registered_word_goes_where_words_go(registry: None, capsys: pytest.CaptureFixture[str]) -> None:
    register_optimizer("mine", Mine)
    register_optimizer("mine", Mine)  # a module may be run twice
    assert "mine" in list_optimizers()
    strategy = OptimizerStrategy("mine", lr=0.1)
    assert (strategy.optimizer_class, strategy.as_config()) == (Mine, {"name": "mine", "lr": 0.1})
    assert OptimizerStrategy(Mine).name == f"{HERE}.Mine"  # which another process can import
    with pytest.raises(OptionError, match=r"no optimizer named 'mines'. Did you mean mine"):
        OptimizerStrategy("mines")
    for arguments, words in (([], "SGD with another name."), (["mine"], f"mine (defined as {HERE}.Mine)")):
        with pytest.raises(SystemExit):
            main(["optimizers", *arguments])
        assert words in capsys.readouterr().out

    class Local(torch.optim.SGD):
        pass

    register_optimizer("my_local", Local)
    module = Configured(Local)
    fitted(module)
    assert module.hparams["optimizer"] == "my_local"


@pytest.mark.parametrize(
    ("word", "cls", "words"),
    [
        ("adan", Mine, "the word 'adan' is taken: it means lightning_optim.*Adan. Choose another"),
        ("ranger", Mine, "the word 'ranger' is taken: it is a recipe"),
        ("torch.mine", Mine, "'torch.mine' must be a word of letters"),
        ("mine", nn.Linear, "Linear' is a class, but no optimizer"),
        ("mine", 3, "is no class, but 3"),
    ],
)
def test_words_that_cannot_be_registered(word: str, cls: Any, words: str, registry: None) -> None:
    with pytest.raises(OptionError, match=words):
        register_optimizer(word, cls)
    assert word not in REGISTERED


def test_a_page_takes_no_word_that_is_taken(registry: None) -> None:
    with pytest.raises(OptionError, match=r"class Page: the word 'adan' is taken: it means .*Adan. Choose another"):

        class Page(Optimizer, name="adan"):
            pass

    assert OPTIMIZERS["adan"] is Adan


PAGE = """
from lightning_optim import Optimizer
from lightning_optim.language import Options, Slots, Value


class Adan(Optimizer):
    '''A page with a name that is taken, in a module of a user.

    Args:
        lr: Step size.
    '''

    lr: float = 1e-3

    @staticmethod
    def update(p: Value, g: Value, s: Slots, h: Options) -> Value:
        return p - h.lr * g
"""


def test_a_page_of_a_user_works_from_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """By its class path, without registration, and though its class has the name of one of ours."""
    (tmp_path / "page_of_a_user.py").write_text(PAGE)
    monkeypatch.chdir(tmp_path)  # where the command looks, as Python does
    monkeypatch.setattr(sys, "path", [*sys.path])
    quiet = {"max_epochs": 1, "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "tests.harness.modules.Configured",
            "init_args": {"optimizer": {"name": "page_of_a_user.Adan", "lr": 0.5}},
        },
        "data": {"class_path": "tests.harness.data.Data"},
        "trainer": {**quiet, "accelerator": "cpu", "devices": 1, "default_root_dir": str(tmp_path)},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "run.yaml", "--model.optimizer.lr", "0.25"])
    saved = torch.load(next((tmp_path / "checkpoints").glob("*.ckpt")), weights_only=True)
    assert saved["hyper_parameters"]["optimizer"] == {"name": "page_of_a_user.Adan", "lr": 0.25}
    assert OPTIMIZERS["adan"] is Adan
    with pytest.raises(SystemExit):
        main(["optimizers", "page_of_a_user.Adan"])
    assert "A page with a name that is taken" in capsys.readouterr().out
    sys.modules.pop("page_of_a_user")
