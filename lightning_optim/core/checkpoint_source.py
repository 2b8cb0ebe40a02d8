"""Which class wrote a checkpoint, and what a load says about it.

The class stands in the parameter groups of a file, the one place that every loader of torch keeps. Files of earlier
versions, of torch.optim and of other libraries lack it; there the options and the slots of the file tell.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lightning_optim.core.parameter_groups import KNOWN_KEYS
from lightning_optim.core.state_check import present
from lightning_optim.core.state_layout import STORAGE_OPTIONS, WHOLE, StateLayout
from lightning_optim.stages.stage import Stage

# The key of a parameter group in a file, and there only.
CLASS_KEY = "optimizer_class"
# The key of an element that shows FSDP2 the device of a state of single numbers, in files of sharded runs only.
DEVICE_KEY = "device_of_state"


@dataclass(frozen=True)
class Source:
    """Where a state_dict comes from.

    Attributes:
        is_own: Whether this package wrote it.
        other_class: The class that wrote it, if that is another one; empty otherwise.
        keeps_options: Whether options stay those of the optimizer because the file has other parameter groups.
        scheduled: Whether a scheduler sets the learning rate of the optimizer.
    """

    is_own: bool
    other_class: str = ""
    keeps_options: bool = False
    scheduled: bool = False


@dataclass
class Loaded:
    """What became of the slots of a file, by name."""

    taken: set[str] = field(default_factory=set)
    fresh: set[str] = field(default_factory=set)
    left: set[str] = field(default_factory=set)

    def sentence(self, owner: str, source: Source) -> str:
        """What a load has to say."""
        takes = f"{', '.join(sorted(self.taken)) or 'nothing'} taken"
        starts = f"; {', '.join(sorted(self.fresh))} starts fresh" if self.fresh else ""
        drops = f"; {', '.join(sorted(self.left))} of the checkpoint is left out" if self.left else ""
        words = "of torch.optim or another library"
        if source.is_own:
            words = "with other parameter groups" if source.keeps_options else "with other state"
        keeps = (
            "; options are those of this optimizer, as its parameter groups are others" if source.keeps_options else ""
        )
        if source.other_class:
            words = f"of {source.other_class}, which is another class"
            keeps = f"; lr and all other options are those of this {owner} and not of the checkpoint"
            if source.scheduled:
                keeps += (
                    ". A scheduler of torch.optim that is loaded too goes back to the lr of the checkpoint (a schedule "
                    "of a config does not): leave its state out, or set its base_lrs"
                )
        return f"{owner} loads a checkpoint {words}: {takes}{starts}{drops}{keeps}."


def page_of(cls: type[StateLayout]) -> str:
    """The name of the class whose mathematics a class runs: of itself, or of the page from which it derives.

    A subclass that only brings a constructor or a `step` of its own runs its parent's page, and reads its files.
    """
    parts = ("update", "scalars", "traits", "predict")
    for c in cls.__mro__:
        if inspect.get_annotations(c) or any(part in vars(c) for part in parts):
            return c.__name__
    return cls.__name__


def other_class(layout: StateLayout, state_dict: Mapping[str, Any]) -> str:
    """The class that wrote a file, if that is not the class of the optimizer, nor the same algorithm in torch.optim.

    Args:
        layout: The optimizer.
        state_dict: A state_dict of the right form.

    Returns:
        The name of the class, or of several that it may be; empty where it is the same or not known.
    """
    groups = state_dict["param_groups"]
    said = {group[CLASS_KEY] for group in groups if isinstance(group.get(CLASS_KEY), str)}
    if said:
        return "" if page_of(type(layout)) in said else " and ".join(sorted(said))
    keys = {key for group in groups for key in group}
    ours = "state_bits" in keys
    classes = dict(_options_of_pages()) if ours else _options_of_torch()
    fitting = {name: options for name, options in classes.items() if options and options <= keys}
    most = max(map(len, fitting.values()), default=0)
    names = [name for name, options in fitting.items() if len(options) == most]
    own = page_of(type(layout))
    if ours and len(names) > 1:  # some pages have the same options, but not the same slots
        held = _slots_of_file(state_dict)
        names = [name for name in names if held <= _slots_of_page(name)] or names
    if any(name.removeprefix("torch.optim.").lower() == own.lower() for name in names):
        return ""
    exact = not ours and most == len(keys - {*KNOWN_KEYS})  # all that this version of torch writes, and nothing else
    if names and (exact or not _fits(layout, state_dict, keys)):
        return " or ".join(names)
    return _by_slots(layout, state_dict)


def without_misfits(layout: StateLayout, state_dict: dict[str, Any], other: str) -> dict[str, Any]:
    """The state_dict of another class without slots of the same name that hold something else there.

    That is a mean of something else, one number and not one for each element, a mean of rows with and without an axis
    of size one, or the reverse.
    """
    names = {name.removeprefix("torch.optim.") for name in re.split(" and | or ", other)}
    pages = [cls for cls in subclasses(StateLayout) if cls.__name__ in names]
    order = [index for group in state_dict["param_groups"] for index in group["params"]]
    slots, state = layout.all_slots(), dict(state_dict["state"])
    for index, (i, p) in zip(order, layout.every_parameter(), strict=False):
        held = present(state.get(index))

        def misfits(name: str, value: Any, i: int = i, p: Any = p) -> bool:
            if name not in slots or not isinstance(value, torch.Tensor):
                return False
            if any(name in page.slots and page.slots[name].mean_of != slots[name].mean_of for page in pages):
                return True
            without, traits = slots[name].without, layout.traits_of(i, p)
            known = without is None or traits[without] is not None
            shape = layout.shape_of(slots[name], i, p) if known else value.shape
            return value.shape != shape and (value.shape == p.shape or value.dim() != len(shape))

        state[index] = {name: value for name, value in held.items() if not misfits(name, value)}
    return {**state_dict, "state": state}


def slots_elsewhere() -> set[str]:
    """Names of the slots of all optimizers and stages, and of torch.optim: what they keep is no other program's."""
    ours = {name for cls in (*subclasses(StateLayout), *subclasses(Stage)) for name in getattr(cls, "slots", ())}
    return ours | TORCH_SLOTS


TORCH_SLOTS = {
    *("acc_delta", "ax", "eta", "exp_avg", "exp_avg_sq", "exp_inf", "grad_avg", "max_exp_avg_sq", "momentum_buffer"),
    *("mu", "mu_product", "prev", "square_avg", "step_size", "sum"),
}


def _fits(layout: StateLayout, state_dict: Mapping[str, Any], keys: set[str]) -> bool:
    """Whether an earlier version of this class may have written the file: it may only lack an option."""
    every = set().union(*(options for _, options in _options_of_pages()))
    of_stages = {name for cls in subclasses(Stage) for name in cls.slots}
    if not (keys & every) <= layout.options.keys() or not _slots_of_file(state_dict) - of_stages <= layout.slots.keys():
        return False
    held = [present(state) for state in state_dict["state"].values() if isinstance(state, dict)]
    needed = {name for i, p in layout.every_parameter() for name in layout.slots_of(i, p)}
    needed -= {name for name in needed if layout.slots[name].per == "optimizer"}
    return not held or any(needed <= state.keys() for state in held)


def _by_slots(layout: StateLayout, state_dict: Mapping[str, Any]) -> str:
    """Words for another class where the file shares no slot with the optimizer."""
    held = _slots_of_file(state_dict)
    needed = {name for i, p in layout.every_parameter() for name in layout.slots_of(i, p)}
    strange = bool(held) and bool(needed) and not held & {*layout.all_slots()}
    return f"another optimizer with the slots {', '.join(sorted(held))}" if strange else ""


def _slots_of_file(state_dict: Mapping[str, Any]) -> set[str]:
    """Names of the slots of optimizers in a file, without what other programs keep there."""
    held = {name for state in state_dict["state"].values() if isinstance(state, dict) for name in present(state)}
    return held & slots_elsewhere()


def _slots_of_page(name: str) -> set[str]:
    return {slot for cls in subclasses(StateLayout) if cls.__name__ == name for slot in getattr(cls, "slots", ())}


def _options_of_pages() -> Iterator[tuple[str, set[str]]]:
    """The options of each page by which its files are known."""
    for cls in subclasses(StateLayout):
        if "options" in vars(cls) and page_of(cls) == cls.__name__:
            yield cls.__name__, {*cls.options} - {*WHOLE, *STORAGE_OPTIONS}


@functools.cache
def _options_of_torch() -> dict[str, set[str]]:
    """The keys of parameter groups of each class of torch.optim."""
    found: dict[str, set[str]] = {}
    for name, cls in vars(torch.optim).items():
        if inspect.isclass(cls) and issubclass(cls, torch.optim.Optimizer):
            try:
                make: Any = cls
                made = make([torch.nn.Parameter(torch.zeros(1, 1, dtype=torch.float32, device="cpu"))], lr=1e-3)
            except (TypeError, ValueError, NotImplementedError):  # the base class
                continue
            found[f"torch.optim.{name}"] = set(made.defaults)
    return found


def subclasses(cls: type[Any]) -> Iterable[type[Any]]:
    """All classes that derive from a class, at any distance."""
    for child in cls.__subclasses__():
        yield child
        yield from subclasses(child)
