"""`lightning-optim compare`, and the same in Python."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from lightning_optim.commands.sources import ConfigSource, PythonSource
from lightning_optim.errors import OptionError, nearest
from lightning_optim.race import grid
from lightning_optim.race.comparison import Comparison
from lightning_optim.race.files import PAGE, PICTURE, RESULT
from lightning_optim.race.lightning_race import race
from lightning_optim.race.lines import in_yaml
from lightning_optim.race.picture import missing
from lightning_optim.race.progress import Bar, Progress
from lightning_optim.race.store import count_runs
from lightning_optim.race.terms import Terms

PROG = "lightning-optim compare"
OF_CONFIG = ("config", "model", "data", "trainer", "optimizer", "lr_scheduler", "seed_everything", "ckpt_path")
REPLACED = "Loggers, checkpoints and progress bars of the config are left out; its other callbacks run."
NO_SCHEDULER = "lr_scheduler of the config is left out. Give candidates a schedule: {name: adamw, schedule: cosine}."


def compare(
    candidates: Sequence[Any],
    config: str | os.PathLike[str] | Sequence[str] | None = None,
    *,
    module: Callable[..., Any] | None = None,
    data: Any = None,
    trainer: Mapping[str, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    processes: int = 1,
    progress: Progress | None = None,
    **terms: Any,
) -> Comparison:
    """Race optimizers on one module and its data: the same seeds, first weights and batches for all.

    `print` of what it returns shows the table and what can be said; `data()` has it as plain values.

    Args:
        candidates: Words, paths of classes such as "torch.optim.SGD", or mappings with name and options. All others are
            compared with the first.
        config: A YAML file as of `lightning-optim fit`, or a list of arguments of that command.
        module: Instead of `config`, a class or function that makes the LightningModule. It gets `optimizer` if it takes
            that; else its optimizer is replaced.
        data: A class or function that makes the data, or data, which is copied for each run: a LightningDataModule, a
            DataLoader, or a pair of them for training and validation.
        trainer: Arguments of the Trainer.
        folder: Where runs and files are kept; one that is there is continued. None keeps nothing.
        processes: Number of runs at a time; of more than 1 each is in a process of its own.
        progress: What is told while it runs.
        terms: Of `lightning_optim.race.terms.Terms`: `lr`, `factors`, `seeds`, `epochs`, `steps`, `metric`, ...

    Raises:
        OptionError: for a candidate that there is not, a metric that was not logged, and other wrong arguments.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch, index):
        ...         return torch.nn.functional.mse_loss(self.layer(batch[0]), batch[1])
        >>> x = torch.linspace(-1, 1, 32)[:, None]
        >>> data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, 3 * x + 1), batch_size=8)
        >>> found = compare(["adamw", "sgd"], module=Line, data=data, epochs=2, seeds=2, lr=0.1, extend=0)
        >>> [(standing.name, standing.best.lr) for standing in found.standings]
        [('adamw', 0.3), ('sgd', 0.9)]
    """
    if (config is None) == (module is None):
        raise OptionError("compare needs either config, a YAML file, or module, a class of a LightningModule.")
    where: dict[str, Any] = {"folder": folder, "processes": processes, "progress": progress}
    if module is not None:
        python = PythonSource(module, data, trainer)
        read = _terms(terms)
        return race(python, candidates, read, settings=python.settings(bool(read.budget())), **where)
    if data is not None or trainer is not None:
        raise OptionError("compare got config and data or trainer. Give them in the config.")
    is_file = isinstance(config, str | os.PathLike)
    source = ConfigSource(["--config", os.fspath(config)] if is_file else list(config or ()))  # type: ignore[arg-type]
    return _of_config(source, candidates, _terms(terms, source.project.seed), **where)


def _terms(given: Mapping[str, Any], first_seed: int | None = None) -> Terms:
    known = [field.name for field in dataclasses.fields(Terms)]
    if wrong := next((name for name in given if name not in known), None):
        raise OptionError(f"compare has no option {wrong!r}.{nearest(wrong, known)} Options are {', '.join(known)}.")
    return Terms(**{"first_seed": first_seed or 0, **given})


def run(args: Sequence[str]) -> int:
    """Run the command.

    Args:
        args: The command line behind the command's name.

    Returns:
        The exit status.

    Raises:
        OptionError: for a wrong option.
    """
    mine, of_config = split(args)
    parser = _parser()
    given = parser.parse_intermixed_args(mine)
    source = ConfigSource(of_config)
    folder = Path(given.out) if given.out else Path("races") / _stem(of_config, source)
    from rich.console import Console

    console = Console(stderr=True)
    greeting = " ".join(filter(None, [REPLACED, missing()]))
    names = ("lr", "seeds", "epochs", "steps", "metric", "mode", "extend")
    terms = Terms(factors=given.grid, first_seed=source.project.seed or 0, **{n: getattr(given, n) for n in names})
    where = {"folder": folder, "processes": given.processes, "progress": Bar(console, greeting)}
    command = shlex.join(["lightning-optim", "compare", *args])
    try:
        comparison = _of_config(source, given.candidates, terms, about={"command": command}, **where)
    except KeyboardInterrupt:
        done = count_runs(folder)
        print(
            f"{PROG}: stopped. {done} runs are in {folder}; the same command goes on with the others.", file=sys.stderr
        )
        return 130
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()  # of the config's strategy; gloo would abort at exit
    files = [folder / name for name in (PAGE, PICTURE, RESULT) if (folder / name).exists()]
    console.print(f"Files: {', '.join(map(str, files))}", highlight=False, markup=False, soft_wrap=True)
    print(json.dumps(comparison.data(), indent=1) if given.json else str(comparison))
    return 0


def _of_config(source: ConfigSource, candidates: Sequence[Any], terms: Terms, **options: Any) -> Comparison:
    """A race on a config."""
    project = source.project
    data = project.options.get("data")
    settings = source.settings(bool(terms.budget()))
    about = {
        "what": f"{project.model_class}{f' on {data.class_path}' if data else ''}",
        **{key: in_yaml(value) for key, value in settings.items() if value and key != "trainer"},
        **options.pop("about", {}),
    }
    notes = [NO_SCHEDULER] if project.options.get("lr_scheduler") else []
    return race(source, candidates, terms, config=source.spec, settings=settings, about=about, notes=notes, **options)


def split(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments of this command, and those of the config.

    Raises:
        OptionError: for an option of neither.

    Example:
        >>> split(["--config", "digits.yaml", "adamw", "--seeds", "3", "--model.width", "8", "adan"])
        (['adamw', '--seeds', '3', 'adan'], ['--config', 'digits.yaml', '--model.width', '8'])
    """
    flags = {word for action in _parser()._actions for word in action.option_strings}
    mine, of_config = [], []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        name = word.partition("=")[0]
        if not word.startswith("--") or name in flags:
            mine.append(word)
            continue
        if name == "-c" or name.lstrip("-").partition(".")[0].rstrip("+") not in OF_CONFIG:
            hint = nearest(name, [*flags, *(f"--{key}" for key in OF_CONFIG)])
            raise OptionError(f"compare has no option {name!r}.{hint} `{PROG} --help` lists them.")
        of_config.append(word)
        if "=" not in word and rest and not rest[0].startswith("--"):
            of_config.append(rest.pop(0))
    return mine, of_config


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"compare: {message}. `{PROG} --help` says more.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROG,
        usage=f"{PROG} --config FILE CANDIDATE [CANDIDATE ...] [options]",
        description="Race optimizers on your own module and data: the same seeds, first weights and batches for all, a "
        "small grid of learning rates for each. Runs are kept in a folder, so the same command continues a race that "
        "was stopped.",
        epilog="Options of fit, such as --config FILE, --model.width 8 and --trainer.devices 1, are taken too.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "candidates",
        nargs="*",
        metavar="CANDIDATE",
        help="a word such as adan, a class such as torch.optim.SGD, or a mapping such as '{name: lion, weight_decay: "
        "0.1}'; all others are compared with the first",
    )
    add("--seeds", type=_seeds, default=3, metavar="N", help="number of seeds, or a list such as 1,2,5 (default: 3)")
    add(
        "--lr",
        type=float,
        metavar="LR",
        help="AdamW's learning rate, on which others are based (default: the config's)",
    )
    add(
        "--grid",
        type=_floats,
        default=grid.FACTORS,
        metavar="F,F,...",
        help="factors on a candidate's own learning rate; 1 tries no other (default: 0.3,1,3)",
    )
    add(
        "--extend",
        type=int,
        default=2,
        metavar="N",
        help="try up to so many more where the best lies at the edge of the grid (default: 2)",
    )
    add("--epochs", type=int, metavar="N", help="epochs of a run (default: as in the config)")
    add("--steps", type=int, metavar="N", help="optimizer steps of a run (default: as in the config)")
    add("--metric", metavar="NAME", help="what decides (default: the validation loss, else the training loss)")
    add("--mode", choices=("min", "max"), help="which way is better (default: by the name of the metric)")
    add("--processes", type=int, default=1, metavar="N", help="runs at a time, each in a process (default: 1)")
    add("--out", metavar="FOLDER", help="where runs and files are kept (default: races/NAME OF THE CONFIG)")
    add("--json", action="store_true", help="print the table as JSON")
    return parser


def _seeds(text: str) -> int | list[int]:
    try:
        numbers = [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seeds, such as 5, nor a list of them") from None
    return numbers if "," in text else numbers[0]


def _floats(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of factors, such as 0.3,1,3") from None


def _stem(of_config: Sequence[str], source: ConfigSource) -> str:
    """A name for the folder of a race: that of the last config, else of the module."""
    words = [word for arg in of_config for word in arg.split("=", 1)]
    files = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config"]
    return Path(files[-1]).stem if files else source.project.model_class.rpartition(".")[2]
