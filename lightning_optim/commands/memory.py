"""`lightning-optim memory`: will it fit?"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from lightning.pytorch import LightningModule
from rich.console import Console

from lightning_optim.commands.project import Project
from lightning_optim.config.command_line import read_value
from lightning_optim.errors import OptionError, first_line, needed, shown
from lightning_optim.estimate.estimate import estimate_memory
from lightning_optim.estimate.result import MemoryEstimate
from lightning_optim.estimate.views import picture, sentences, tables, title

OF_TRAINER = {"strategy": "strategy", "devices": "devices", "num_nodes": "nodes", "precision": "precision"}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise OptionError(f"{message}. `lightning-optim memory --help` shows the options.")


def parser() -> argparse.ArgumentParser:
    """The options of the command itself. Others are those of `fit`."""
    made = _Parser(
        prog="lightning-optim memory",
        usage="lightning-optim memory (--config FILE | CLASS) [OPTIONS]",
        description="The memory of a training before it runs: parameters, gradients, optimizer state and buffers on "
        "each rank. Nothing is allocated. CLASS is the import path of a LightningModule, such as my_project.Net. "
        "Other options are those of `fit`: --config FILE, --model.width 8, --trainer.precision bf16-true, ...",
        epilog="Example: lightning-optim memory --config digits.yaml --optimizer adamw adan --devices 8 --fits 24GB",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--optimizer", nargs="+", metavar="SPEC", help="words or mappings to compare, such as adan '{name: adamw}'")
    add("--strategy", help="single_device, ddp, fsdp, fsdp_cpu_offload or model_parallel (FSDP2)")
    add("--sharding", help="of fsdp: FULL_SHARD, SHARD_GRAD_OP, NO_SHARD or HYBRID_SHARD")
    add("--devices", help="ranks of a node")
    add("--nodes", help="number of nodes")
    add("--precision", help="the Trainer's: 32-true, bf16-true, 16-mixed, ...")
    add("--bits", nargs="+", type=int, help="bits of optimizer state to compare; default: 32 16 8")
    add("--fits", metavar="SIZE", help="memory of a device, such as 24GB: does it fit, and which model would?")
    add("--activations", action="store_true", help="run two batches of the config's data on the CPU to measure them")
    add("--batch-size", type=int, metavar="N", help="cut or repeat these batches to N samples")
    add("--build", choices=["meta", "cpu"], default="meta", help="where the module is built; meta takes no memory")
    add("--json", action="store_true", help="print JSON")
    add("--picture", type=Path, metavar="FILE", help="draw a bar for each optimizer into a PNG, PDF or SVG file")
    return made


def run(args: Sequence[str]) -> int:
    """Count, and print tables or JSON.

    Raises:
        OptionError: for what cannot be read, built or counted.
    """
    by_class = bool(args) and not args[0].startswith("-")
    options, rest = parser().parse_known_args(args[1:] if by_class else args)
    if options.picture is not None:
        _check_picture(options.picture)
    if options.batch_size is not None and not options.activations:
        raise OptionError("--batch-size changes activations alone. Add --activations, or leave it out.")
    project = Project([_of_word(args[0]), args[0], *rest] if by_class else rest)
    estimate = _estimate(project, options)
    if options.picture is not None:
        _draw(estimate, options.picture)
    if options.json:
        print(json.dumps(estimate.as_dict(), indent=2))
    else:
        console = Console()
        console.print(title(estimate), highlight=False, markup=False)
        for table in tables(estimate, console.width):
            console.print(table)
        for sentence in sentences(estimate):
            console.print(sentence, highlight=False, markup=False)
        if options.picture is not None:
            print(f"The picture is in {options.picture}.")
    return 0


def _draw(estimate: MemoryEstimate, path: Path) -> None:
    try:
        picture(estimate).savefig(path, dpi=150)
    except OSError as error:
        raise OptionError(f"--picture {path} cannot be written: {first_line(error)}") from error


def _of_word(word: str) -> str:
    """The option for a word without one: a file or the path of a class."""
    return "--config" if word.endswith((".yaml", ".yml")) else "--model"


def _estimate(project: Project, options: argparse.Namespace) -> MemoryEstimate:
    trainer = project.trainer_options(logger=False)
    given: dict[str, Any] = {ours: trainer[theirs] for theirs, ours in OF_TRAINER.items() if trainer.get(theirs)}
    given |= {name: value for name in OF_TRAINER.values() if (value := getattr(options, name)) is not None}
    specs = None if options.optimizer is None else [read_spec(word) for word in options.optimizer]
    found = trainer.get("callbacks") or []
    return estimate_memory(
        _Factory(project),
        specs,
        accelerator=trainer.get("accelerator") or "auto",
        sharding=options.sharding,
        bits=options.bits,
        callbacks=found if isinstance(found, list | tuple) else [found],
        fits=options.fits,
        activations=options.activations,
        data=project.data() if options.activations else None,
        batch_size=options.batch_size,
        build=options.build,
        **given,
    )


class _Factory:
    """Makes the module of a project on the device of now, under the name of its class."""

    def __init__(self, project: Project) -> None:
        self._project = project
        self.__qualname__ = project.model_class.rpartition(".")[2]

    def __call__(self) -> LightningModule:
        return self._project.module(device=torch.get_default_device())


def read_spec(word: str) -> Any:
    """A spec from a word of the command line: a name, or a mapping in YAML.

    Raises:
        OptionError: for a mapping that is no YAML.

    Example:
        >>> read_spec("adan"), read_spec("{name: adamw, lr: 1e-3}")
        ('adan', {'name': 'adamw', 'lr': 0.001})
    """
    if not word.lstrip().startswith("{"):
        return word
    try:
        found = yaml.safe_load(word)
    except yaml.YAMLError as error:
        raise OptionError(f"--optimizer {shown(word)} is no mapping in YAML: {first_line(error)}") from error
    return {key: read_value(value) for key, value in found.items()}


def _check_picture(path: Path) -> None:
    """Refuse a file that cannot be drawn, before anything is counted."""
    needed("matplotlib.figure", "--picture")
    if path.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise OptionError(f"--picture {path} must end in .png, .pdf or .svg.")
    if not path.parent.is_dir():
        raise OptionError(f"--picture {path}: there is no folder {path.parent}.")
