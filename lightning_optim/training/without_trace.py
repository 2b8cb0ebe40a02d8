"""Call a module's `training_step` without a trace: what it changes is changed back, what it would do is not done."""

from __future__ import annotations

import functools
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torchmetrics import Metric

from lightning_optim.analysis.closures import generators_kept
from lightning_optim.distributed.placement import is_sharded, reshard
from lightning_optim.training.lightning_names import is_a

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

Undo = Callable[[], None]
OWN = {"_parameters", "_modules"}  # attributes of a module that are left alone
# Generators of random numbers, and how their states are read and set.
GENERATORS: tuple[tuple[Any, Callable[[Any], Any], Callable[[Any, Any], Any]], ...] = (
    (torch.Generator, torch.Generator.get_state, torch.Generator.set_state),
    (np.random.Generator, lambda g: g.bit_generator.state, lambda g, state: setattr(g.bit_generator, "state", state)),
    (np.random.RandomState, np.random.RandomState.get_state, np.random.RandomState.set_state),
    (random.SystemRandom, lambda g: None, lambda g, state: None),  # it has none
    (random.Random, random.Random.getstate, random.Random.setstate),
)
_INSIDE: list[None] = []  # an item for each `without_trace` that has begun and not ended


def nesting() -> int:
    """How many `without_trace` the program is inside of: 0 in training itself."""
    return len(_INSIDE)


@contextmanager
def without_trace(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Inside, `training_step` may be called as in training, and nobody sees that it was.

    The Trainer says that it is training, as it does when hooks prepare a batch for training. Nothing is logged. A
    backward pass by `manual_backward`, and a step of an optimizer or a scheduler, is skipped. Afterwards parameters,
    gradients, buffers, lists, dicts and arrays of modules, the states of metrics and of random generators are what they
    were; a stop that the step asks for is none. Files and objects of other kinds are not known here.
    """
    reshard(trainer.strategy.model)  # a validation leaves gathered parameters, whose memory the next step frees
    with ExitStack() as stack:
        _INSIDE.append(None)
        stack.callback(_INSIDE.pop)
        stack.enter_context(torch.inference_mode(False))  # validation is in inference mode, training is not
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_uncompiled())
        stack.enter_context(generators_kept())
        stack.callback(setattr, trainer.state, "stage", trainer.state.stage)
        stack.callback(setattr, trainer, "loggers", trainer.loggers)
        stack.callback(setattr, trainer, "should_stop", trainer.should_stop)
        trainer.state.stage = RunningStage.TRAINING
        trainer.loggers = [DummyLogger() for _ in trainer.loggers]
        for undo in (*kept(trainer.strategy.model or module, module), *_mute(trainer, module)):
            stack.callback(undo)
        yield


def _uncompiled() -> Any:
    """Code compiled by torch.compile does not see new hooks, and would be compiled again for each new momentum."""
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6 and newer
    return nullcontext() if set_stance is None else set_stance("force_eager")


# ---------------------------------------------------------------- what is not done


def _mute(trainer: Trainer, module: LightningModule) -> Iterator[Undo]:
    for part in module.modules():
        if is_a(part, LightningModule):
            yield _replace(part, "log", _nothing)
            yield _replace(part, "manual_backward", _nothing)
    for optimizer in (*trainer.optimizers, *_wrappers(module)):
        yield _replace(optimizer, "step", _closure_only)
        yield _replace(optimizer, "zero_grad", _nothing)
        yield _replace(optimizer, "set_loss", _nothing)
    for config in trainer.lr_scheduler_configs:
        yield _replace(config.scheduler, "step", _nothing)
    # A step that calls `loss.backward()` itself makes gradients, and those of an accumulation may be there.
    for p in module.parameters():
        if not is_lazy(p) and not is_sharded(p):
            yield _put_back(p, "grad", p.grad)
            p.grad = None


def _wrappers(module: LightningModule) -> list[Any]:
    found: Any = module.optimizers()
    return found if isinstance(found, list) else [found]


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Do nothing."""


def _closure_only(closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
    return None if closure is None else closure()


def _replace(owner: Any, name: str, by: Any) -> Undo:
    """Replace a method of one object."""
    before = vars(owner).get(name)
    vars(owner)[name] = by

    def undo() -> None:
        if before is None:
            vars(owner).pop(name, None)
        else:
            vars(owner)[name] = before

    return undo


def _put_back(owner: Any, name: str, value: Any) -> Undo:
    return lambda: setattr(owner, name, value)


# ---------------------------------------------------------------- what is changed back


def kept(outermost: nn.Module, module: LightningModule, parameters: bool = True) -> Iterator[Undo]:
    """Functions that change the attributes and buffers of all submodules back, and their parameters."""
    for p in (
        module.parameters() if parameters else ()
    ):  # a step may clip weights, or move those of a second network that follows the first
        if not is_lazy(p) and not is_sharded(p):
            yield _undo_of_tensor(p)
    flat = any(map(_is_fsdp1, outermost.modules()))  # FSDP1 keeps views of its flat parameters as attributes
    seen: dict[int, Undo] = {}
    for part in module.modules():
        if not _is_fsdp1(part):
            tensors = not flat or isinstance(part, Metric)
            before = _attributes(part, tensors)
            content = [_content(value, seen, tensors or name == "_buffers") for name, value in before.items()]
            yield _restoring(part, before, content, tensors)


def _attributes(part: nn.Module, tensors: bool) -> dict[str, Any]:
    own = vars(part).items()
    return {name: value for name, value in own if name not in OWN and (tensors or not isinstance(value, Tensor))}


def _is_fsdp1(module: nn.Module) -> bool:
    fully_sharded = sys.modules.get("torch.distributed.fsdp")
    return fully_sharded is not None and isinstance(module, fully_sharded.FullyShardedDataParallel)


def _restoring(part: nn.Module, before: Mapping[str, Any], content: Iterable[Undo], tensors: bool) -> Undo:
    def undo() -> None:
        _restore(content)
        for name in _attributes(part, tensors).keys() - before.keys():
            del vars(part)[name]
        vars(part).update(before)

    return undo


def _content(value: Any, seen: dict[int, Undo], tensors: bool) -> Undo:
    """A function that gives a tensor, array, container or generator of random numbers the content of now."""
    if id(value) not in seen:
        seen[id(value)] = _nothing  # a container that holds itself
        seen[id(value)] = _undo_of(value, seen, tensors)
    return seen[id(value)]


def _undo_of(value: Any, seen: dict[int, Undo], tensors: bool) -> Undo:
    if isinstance(value, nn.Parameter) or (isinstance(value, Tensor) and (not tensors or is_lazy(value))):
        return _nothing
    if isinstance(value, Tensor):
        return _undo_of_tensor(value)
    if isinstance(value, dict):
        items = dict(value)
        inner = [_content(item, seen, tensors) for item in items.values()]
        ordered: Any = OrderedDict if isinstance(value, OrderedDict) else dict  # which keeps its order elsewhere
        return lambda: _refill(inner, value, items, ordered.clear, ordered.update)
    for kind, fill in ((list, list.extend), (deque, deque.extend), (set, set.update), (bytearray, bytearray.extend)):
        if isinstance(value, kind):
            copied = kind(value)
            inner = [_content(item, seen, tensors) for item in copied]
            return lambda: _refill(inner, value, copied, kind.clear, fill)
    if isinstance(value, tuple):
        inner = [_content(item, seen, tensors) for item in value]
        return lambda: _restore(inner)
    if isinstance(value, np.ndarray) and value.flags.writeable:
        return functools.partial(np.copyto, value, value.copy())
    for kind, get, put in GENERATORS:
        if isinstance(value, kind):
            return functools.partial(put, value, get(value))
    return _nothing


def _undo_of_tensor(value: Tensor) -> Undo:
    if value.is_inference():  # kept by a validation step, and nothing outside of inference mode can change it
        return _nothing
    copied = value.detach().clone()

    @torch.no_grad()
    def undo() -> None:
        value.copy_(copied)

    return undo


def _refill(inner: Iterable[Undo], value: Any, items: Any, clear: Any, fill: Any) -> None:
    _restore(inner)
    clear(value)
    fill(value, items)


def _restore(inner: Iterable[Undo]) -> None:
    for restore in inner:
        restore()
