"""A running average of the weights in a loop of the user's own: plain torch, or Lightning Fabric."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, get_args

import torch
from torch import nn

from lightning_optim import errors
from lightning_optim.core.foreign_stages import attach
from lightning_optim.core.standalone_stages import OnWeights
from lightning_optim.core.swap import swap
from lightning_optim.core.wrapped import unwrapped
from lightning_optim.distributed.placement import reshard
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.stages.average import Average, Kind


class WeightAverage:
    """Average the weights over the steps of an optimizer, in a loop of your own.

    The average is one more slot of each parameter: sharded, saved and loaded with the optimizer. In a Trainer the
    callback `IterateAveraging` does all of this, and recomputes the statistics of batch normalization. Here these are
    yours: call `torch.optim.swa_utils.update_bn` inside of `applied` if the model has any.

    Args:
        optimizer: Any optimizer, of this package or of torch, or what Fabric's `setup` returned for it.
        kind: "mean" gives all collected weights the same weight. "ema" is an exponential moving average that starts
            as a copy of the first ones, "ema_debiased" one without the bias towards that copy.
        decay: Decay of an exponential average for one collection, in (0, 1).
        start: The first step to collect; the first step of training is 1.
        every: Steps between two collections, or None: on calls of `collect`, for instance at the end of an epoch.
        window: For "mean": average only the last `window` to 2 * `window` - 1 collections, in a second slot.
        ramp: For "ema": the decay grows with the number n of collections, as (1 + n) / (10 + n), up to `decay`.

    Raises:
        OptionError: if an option is out of range, if the optimizer has an average already, or averages by itself.

    Example:
        >>> from lightning_optim import AdamW
        >>> model = nn.Linear(2, 1)
        >>> optimizer = AdamW(model.parameters(), lr=0.1)
        >>> average = WeightAverage(optimizer, "ema", decay=0.9)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(4, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> last = model.weight.clone()
        >>> with average.applied(model):  # evaluate here, or save the model
        ...     print(average.count, torch.equal(model.weight, last))
        3 False
        >>> torch.equal(model.weight, last)
        True
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        kind: Kind = "mean",
        decay: float = 0.999,
        start: int = 0,
        every: int | None = 1,
        window: int | None = None,
        ramp: bool = False,
    ) -> None:
        check = functools.partial(errors.check, "WeightAverage")
        errors.check_choice("WeightAverage", "kind", kind, get_args(Kind))
        check("decay", decay, is_number(decay) and 0 < decay < 1, "in (0, 1)")
        check("start", start, is_whole(start, least=0), "an integer of at least 0")
        check("every", every, every is None or is_whole(every), "an integer of at least 1, or None")
        windowed = window is None or (kind == "mean" and is_whole(window))
        check("window", window, windowed, "an integer of at least 1, with kind='mean'")
        check("ramp", ramp, ramp is False or (ramp is True and kind == "ema"), "False, except with kind='ema'")
        self.optimizer = unwrapped(optimizer)
        if getattr(self.optimizer, "own_average", False):
            raise OptionError(
                f"{type(self.optimizer).__name__} averages its weights itself: call its eval() before you evaluate or "
                "save, and train() before the next step. Leave WeightAverage out."
            )
        self.stage = Average(kind, float(decay), start, every, window, ramp)
        self.swapped = False
        self._detach = attach(self.stage, self.optimizer)
        self._collector = OnWeights(self.stage, self.optimizer)

    @property
    def count(self) -> int:
        """How many times the weights were collected."""
        return self.stage.count

    def collect(self) -> None:
        """Take the weights in as they are now, where `every` is None."""
        self._collector.run(self.stage.collect())

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Let the model hold the average inside of a `with` block, where it is evaluated or saved.

        Parameters and slots exchange their values, so there is no copy of the model. Until something is collected the
        model stays as it is. Take no step inside.

        Args:
            model: The model, as it is called: wrapped by DDP, FSDP or Fabric if it is.
        """
        if self.swapped or not self.count:
            yield
            return
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        reshard(model)
        for state_of_one in self.optimizer.state.items():
            if "average" in state_of_one[1]:
                swap(*state_of_one, "average")
        reshard(model)
        self.swapped = not self.swapped

    def detach(self) -> None:
        """Stop averaging. The slots stay in the state of the optimizer."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """The counters, as plain values. The average is in the state of the optimizer."""
        stage = self.stage
        numbers = {name: getattr(stage, name) for name in COUNTERS}
        return {"kind": stage.kind, "window": stage.window, "swapped": self.swapped, **numbers}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on as `state_dict` says. Load it last: after the model and the optimizer.

        A file that was written inside of `applied` has the average as the model's weights. They change places.

        Raises:
            OptionError: where the file has an average of another kind or window.
        """
        for name in ("kind", "window"):
            if state_dict[name] != getattr(self.stage, name):
                raise OptionError(
                    f"WeightAverage: the file holds an average with {name}={state_dict[name]!r} and this one has "
                    f"{getattr(self.stage, name)!r}. Set {name} to the file's."
                )
        for name in COUNTERS:
            setattr(self.stage, name, int(state_dict[name]))
        self.swapped = False
        if state_dict["swapped"]:
            self._swap(nn.Module())
            self.swapped = False


COUNTERS = ("steps", "count", "members", "recent", "latest")
