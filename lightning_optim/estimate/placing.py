"""A module as a rank of a training has it, on the meta device: built, converted, wrapped and sharded."""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.distributed.placement import is_dtensor
from lightning_optim.errors import OptionError, first_line
from lightning_optim.estimate.fake_ranks import meta_as_accelerator
from lightning_optim.estimate.spread import Spread
from lightning_optim.training.lightning_names import is_a, overrides

Make = Callable[[], nn.Module]
STEPS = 1000  # of the Trainer that a module sees; a schedule may ask for the length of training


def maker(module: nn.Module | Make, device: str = "meta") -> Make:
    """A function that makes a module on the meta device, again and again.

    Args:
        module: A module, which is not changed, or a function that makes one.
        device: Where a function makes it: "meta", or "cpu" for modules that compute with values of tensors.
    """
    if isinstance(module, nn.Module):
        return lambda: on_meta(module)
    return lambda: _made(module, device)


def on_meta(module: nn.Module) -> nn.Module:
    """A copy of a module on the meta device. No values are copied, and tied weights stay tied."""
    copies: dict[int, Any] = {}
    for x in itertools.chain(module.parameters(), module.buffers()):
        copies[id(x)] = x if is_lazy(x) else _meta_of(x)
    for child in module.modules():
        if vars(child).get("_trainer") is not None:
            copies[id(vars(child)["_trainer"])] = None  # `deepcopy` takes this for its copy
    return copy.deepcopy(module, copies)


def _meta_of(x: Tensor) -> Tensor:
    empty = torch.empty_like(x, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=x.requires_grad) if isinstance(x, nn.Parameter) else empty


def _made(make: Make, device: str) -> nn.Module:
    title = getattr(make, "__qualname__", "the module")
    try:
        with quiet(), torch.device(device):
            module = make()
    except OptionError:
        raise
    except Exception as error:  # a user's constructor may raise anything
        where = _line_of(error)
        if device != "meta" or isinstance(error, OSError | ImportError):  # a file that is not there, here or on the CPU
            raise OptionError(f"{title} cannot be built{where}: {type(error).__name__}: {first_line(error)}") from error
        raise OptionError(
            f"{title} cannot be built on the meta device, where tensors have no values{where}: {type(error).__name__}: "
            f"{first_line(error)} Build it on the CPU, which takes memory for its parameters: --build cpu, or "
            "estimate_memory(..., build='cpu'). Or compute there with torch.device('cpu') in its constructor."
        ) from error
    if not isinstance(module, nn.Module):
        raise OptionError(f"{title} returned {type(module).__name__}, which is no torch.nn.Module.")
    values = any(not x.is_meta for x in itertools.chain(module.parameters(), module.buffers()))
    return on_meta(module) if values else module


def _line_of(error: BaseException) -> str:
    """The last line of a user's file in a traceback."""
    found, trace = "", error.__traceback__
    while trace is not None:
        path = Path(trace.tb_frame.f_code.co_filename)
        if not any(path.is_relative_to(folder) for folder in (sys.prefix, sys.base_prefix, Path(__file__).parents[1])):
            found = f" ({path.name}, line {trace.tb_lineno})"
        trace = trace.tb_next
    return found


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Inside, Lightning and FSDP say nothing about devices that are not there."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for one, level in zip(loggers, levels, strict=True):
            one.setLevel(level)


def placed(make: Make, spread: Spread) -> tuple[nn.Module, list[str]]:
    """The module of this rank, and sentences on what was assumed. Call it inside `as_rank` for a sharded training.

    Raises:
        OptionError: where it cannot be built, has lazy parameters, or cannot be sharded as the strategy says.
    """
    module, notes = make(), []
    title = type(module).__name__
    mesh = _mesh(spread) if spread.kind == "fsdp2" else None
    with quiet():
        try:
            _configure_model(module, spread, mesh)
            refuse_lazy(module)
            if spread.kind == "fsdp2":
                notes += _shard(module, mesh)
            if spread.dtype is not None:
                module.to(spread.dtype)
            if spread.kind == "fsdp1":
                _wrap(module, spread)
        except OptionError:
            raise
        except Exception as error:  # of the user's configure_model, or of torch about the model
            raise OptionError(
                f"{title} cannot be placed under {spread.title}{_line_of(error)}: {type(error).__name__}: "
                f"{first_line(error)}"
            ) from error
    return module, notes


def refuse_lazy(module: nn.Module) -> None:
    """Refuse lazy parameters.

    Raises:
        OptionError: if there are any.
    """
    lazy = [name for name, p in module.named_parameters() if is_lazy(p)]
    if lazy:
        raise OptionError(
            f"{type(module).__name__} has lazy modules, whose sizes are unknown before a batch: {', '.join(lazy[:3])}"
            f"{', ...' if len(lazy) > 3 else ''}. Give their layers all sizes, such as nn.Linear for nn.LazyLinear."
        )


def _configure_model(module: Any, spread: Spread, mesh: Any) -> None:
    """Call the hooks in which a LightningModule makes or shards its layers, as a fit does."""
    from lightning.pytorch import LightningModule, Trainer

    if not is_a(module, LightningModule):
        return
    options: Any = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    module.trainer = Trainer(accelerator="cpu", devices=1, max_steps=STEPS, max_epochs=-1, **options)
    module._device_mesh = mesh
    if overrides(module, "configure_model", LightningModule):
        with torch.device("meta"), _wrapping(spread):
            module.configure_model()
    if overrides(module, "setup", LightningModule) and not any(True for _ in module.parameters()):
        with torch.device("meta"):
            module.setup("fit")


@contextlib.contextmanager
def _wrapping(spread: Spread) -> Iterator[None]:
    """Inside, `torch.distributed.fsdp.wrap.wrap` wraps as under FSDPStrategy."""
    if spread.kind != "fsdp1":
        yield
        return
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp.wrap import enable_wrap

    with _fsdp_options(spread) as options, enable_wrap(wrapper_cls=FullyShardedDataParallel, **options):
        yield


def _wrap(module: nn.Module, spread: Spread) -> None:
    """Flatten and shard the parameters of a module, as FSDPStrategy does."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(child, FullyShardedDataParallel) for child in module.modules()):
        return
    with _fsdp_options(spread) as options:
        # The wrapper holds the module, and the module must hold it: FSDP knows its handles by weak references.
        vars(module)["_estimate_wrapper"] = FullyShardedDataParallel(module, **options)


@contextlib.contextmanager
def _fsdp_options(spread: Spread) -> Iterator[dict[str, Any]]:
    from lightning.pytorch.plugins.precision import FSDPPrecision
    from torch.distributed.device_mesh import init_device_mesh

    strategy, precision = spread.strategy, FSDPPrecision(spread.precision)  # type: ignore[arg-type]
    given = dict(strategy.kwargs)
    if isinstance(given.get("device_mesh"), tuple):
        given["device_mesh"] = init_device_mesh("cpu", given["device_mesh"])
    with meta_as_accelerator(spread.devices) as device:
        yield {
            **given,
            "sharding_strategy": strategy.sharding_strategy,
            "mixed_precision": strategy.mixed_precision or precision.mixed_precision_config,
            "device_id": device,
            "param_init_fn": lambda module: None,
            "sync_module_states": False,
        }


def _mesh(spread: Spread) -> Any:
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", spread.mesh, mesh_dim_names=("data_parallel", "tensor_parallel"))


def _shard(module: nn.Module, mesh: Any) -> list[str]:
    """Shard a module that does not shard itself, and say so."""
    from lightning.pytorch import LightningModule
    from torch.distributed.fsdp import fully_shard

    if any(is_dtensor(p) for p in module.parameters()):
        return []
    title = type(module).__name__
    if overrides(module, "configure_model", LightningModule):
        return [f"{title}.configure_model shards nothing, so every rank holds all parameters."]
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList | nn.Sequential)]
    units = [unit for one in lists for unit in one if any(True for _ in unit.parameters())]
    for unit in reversed(dict.fromkeys(units)):  # inner ones first
        fully_shard(unit, mesh=mesh["data_parallel"])
    fully_shard(module, mesh=mesh["data_parallel"])
    return [
        f"{title} has no configure_model, in which FSDP2 has it call fully_shard, so a run would refuse it. Counted as "
        "if each module of its lists and sequences were sharded by itself, and the rest together."
    ]
