"""Scale the initial weights before training, so that the first step helps most."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.training.dry_run import NoLoss, TrainingStep, differentiable, half_batches, optimizers_of
from lightning_optim.training.grad_init import (
    DIRECTIONS,
    Iteration,
    Norm,
    ScaleSearch,
    along,
    norm_of,
    rates_of,
    taken_by,
)

KEY = "grad_init"
LEAST = 0.01  # of the scale of what is no bias; that of a bias may become 0
ETA = {"sgd": 0.1, "normalized_sgd": 0.1, "adam": 1e-3}  # the paper's, for its own steps
LR: dict[Norm, float] = {2: 1e-2, 1: 2.5e-3}
BETAS: dict[Norm, tuple[float, float]] = {2: (0.9, 0.999), 1: (0.9, 0.98)}
CLIP: dict[Norm, float] = {2: 1.0, 1: math.inf}
SKIPS = 100  # batches without a loss in a row, before that is an error
PAPERS = "Let it follow a step of the paper instead: follow='sgd', 'normalized_sgd' or 'adam'."


class GradInit(Callback):
    """Learns one scale for each parameter tensor before the strategy wraps the model, and multiplies them in.

    After it the first step of the optimizer lowers the loss as much as scales can make it, while the gradient stays
    bounded. Rank 0 searches, on batches of the training loader, and all ranks receive the scales. The run that
    follows is the run without it, but for the weights: random states, buffers, gradients and the loader are as they
    were. A fit that loads a checkpoint is left alone, and so is a second fit. Frozen parameters keep their values.

    Args:
        gamma: Bound on the gradient's norm, in units of the loss per unit of the parameters; by default 1 under norm
            2, and to be given under norm 1, which grows with the number of parameters (the paper took 1000 for a
            transformer of about 40 million).
        iterations: How many; by default 390, an epoch of CIFAR-10 at batches of 128. One costs 2 to 3 training steps.
        follow: Whose first step: "optimizer" is the one of configure_optimizers, by its own code; the paper's are
            "sgd", "normalized_sgd" (the gradient divided by its norm) and "adam" (the sign of the gradient).
        eta: Learning rate of that step; by default the optimizer's own, as it is without a schedule's warm-up, and
            for the paper's steps 0.1, 0.1 and 1e-3.
        lr: How far a scale moves in one iteration; by default 1e-2 under norm 2 and 2.5e-3 under norm 1.
        norm: Which norm of the gradient is bounded: 2 (Euclidean) or 1 (sum of absolute values). By default 2 where
            the step goes along the gradient, as SGD's, and 1 where it goes along its sign, as Adam's.
        second_order: Differentiate through the trial step too, as the paper's formula says and its program does not;
            for the paper's steps only.
        table: Print the scales.

    Attributes:
        alphas: The scale of each tensor by the parameter's name, or None before the search.
        history: What each iteration of the search found, on rank 0.

    Raises:
        OptionError: for an option out of range; when the fit starts, under manual optimization, with several
            optimizers, where the parameters have no values yet, or where the optimizer cannot be followed.
    """

    def __init__(
        self,
        gamma: float | None = None,
        iterations: int = 390,
        follow: Literal["optimizer", "sgd", "normalized_sgd", "adam"] = "optimizer",
        eta: float | None = None,
        lr: float | None = None,
        norm: Literal[1, 2] | None = None,
        second_order: bool = False,
        table: bool = True,
    ) -> None:
        check = functools.partial(errors.check, "GradInit")
        check("gamma", gamma, gamma is None or (is_number(gamma) and gamma > 0), "a number above 0")
        for name, value in (("eta", eta), ("lr", lr)):
            check(name, value, value is None or (is_number(value) and 0 < value < math.inf), "a number above 0")
        check("iterations", iterations, is_whole(iterations, 0), "an integer of at least 0")
        words = ["optimizer", *DIRECTIONS]
        check("follow", follow, follow in words, f"one of {', '.join(words)}")
        check("norm", norm, norm is None or (is_whole(norm) and norm <= 2), "1, 2 or null")
        for name, flag in (("second_order", second_order), ("table", table)):
            check(name, flag, isinstance(flag, bool), "True or False")
        if second_order and follow == "optimizer":
            raise OptionError(f"GradInit: second_order=True needs a step that can be differentiated. {PAPERS}")
        self.gamma, self.iterations, self.follow, self.eta, self.lr = gamma, iterations, follow, eta, lr
        self.norm, self.second_order, self.table = norm, second_order, table
        self.alphas: dict[str, float] | None = None
        self.history: list[Iteration] = []
        self._fresh = False  # the scales are of this fit
        self._undo: Callable[[], None] | None = None

    # ------------------------------------------------------------------ when

    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._fresh = False
        if stage != "fit":
            return

        def search() -> None:
            if self.alphas is None and not _is_resumed(trainer):
                self._scale(trainer, pl_module)
            else:
                rank_zero_info("GradInit is skipped: the weights are scaled already, or come from a checkpoint.")

        if isinstance(trainer.strategy, ModelParallelStrategy):  # its configure_model divides the parameters
            self._undo = _wrap(pl_module, "setup", search, first=False)
        else:  # when the module has its layers, wherever they are made
            self._undo = _wrap(trainer.strategy, "setup", search, first=True)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._fresh:
            _log(trainer, self.alphas or {}, self.history)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"alphas": self.alphas}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alphas = state_dict["alphas"]

    # ------------------------------------------------------------------ what

    def _scale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _refuse(trainer, pl_module)
        with isolate_rng():
            optimizer = self._followed(trainer, pl_module)
            if trainer.is_global_zero:
                self.alphas = self._search(trainer, pl_module, optimizer)
            else:
                self.alphas = _heard(trainer)
        self._fresh = True
        with torch.no_grad():
            for name, p in pl_module.named_parameters():
                if name in self.alphas:
                    p.mul_(self.alphas[name])
        if self.table and trainer.is_global_zero:
            Console().print(_summary(self.history), _table(pl_module, self.alphas), sep="\n")

    def _followed(self, trainer: Trainer, pl_module: LightningModule) -> torch.optim.Optimizer | None:
        if self.follow != "optimizer":
            return None
        found = optimizers_of(trainer, pl_module)
        if len(found) != 1:
            raise OptionError(f"GradInit follows one optimizer; configure_optimizers returned {len(found)}. {PAPERS}")
        return found[0]

    def _search(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, float]:
        """The scales, on rank 0. The others hear of each iteration, so that no wait is longer than one."""
        send = trainer.strategy.broadcast
        steps = min(self.iterations, int(vars(trainer).get("fast_dev_run") or self.iterations))
        self.history = []
        try:
            search, halves = self._prepare(trainer, pl_module, optimizer), half_batches(trainer, pl_module)
            for _ in track(range(steps), "GradInit", disable=trainer.progress_bar_callback is None):
                with differentiable(pl_module):
                    self.history.append(_iterate(search, halves))
                send({})
        except BaseException as error:
            send({"error": str(error)})
            raise
        send({"scales": search.scales})
        return search.scales

    def _prepare(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer | None
    ) -> ScaleSearch:
        training_step = TrainingStep(trainer, pl_module)
        params = training_step.parameters_by_name()
        if optimizer is None:
            eta = self.eta or ETA[self.follow]
            step, norm = along(self.follow, eta), self.norm or DIRECTIONS[self.follow]
        else:
            rates = rates_of(optimizer, self.eta)
            eta = max(rates, default=1.0) or 1.0
            step = taken_by(optimizer, dict(pl_module.named_parameters()), rates)
            norm = self.norm or norm_of(step, params, type(optimizer).__name__)
        gamma = self.gamma or (1.0 if norm == 2 else None)
        if gamma is None:
            raise OptionError(
                "GradInit needs gamma, the bound on the gradient's norm: the step goes along the sign of the gradient, "
                "and the sum of absolute values grows with the number of parameters. The paper took 1000 for about 40 "
                "million; the norms that a run with gamma=.inf prints help to choose."
            )
        return ScaleSearch(
            params,
            training_step.loss,
            step,
            eta=eta,
            gamma=gamma,
            norm=norm,
            lr=self.lr or LR[norm],
            betas=BETAS[norm],
            clip=CLIP[norm],
            least={name: 0.0 if "bias" in name.split(".")[-1].split("_") else LEAST for name in params},
            second_order=self.second_order,
        )


def _iterate(search: ScaleSearch, halves: Iterator[Any]) -> Iteration:
    """An iteration on the next batches that have a loss."""
    for _ in range(SKIPS):
        with contextlib.suppress(NoLoss):
            return search.iterate(halves)
    return search.iterate(halves)


def _heard(trainer: Trainer) -> dict[str, float]:
    """What rank 0 found, on the other ranks."""
    nothing: dict[str, Any] = {}
    while not (message := trainer.strategy.broadcast(nothing)):
        pass
    if "error" in message:
        raise OptionError(f"GradInit failed on rank 0: {message['error']}")
    found: dict[str, float] = message["scales"]
    return found


def _refuse(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise OptionError(
            "GradInit needs a training_step that returns the loss, and under manual optimization "
            "(automatic_optimization=False) it takes the steps itself. Remove the callback."
        )
    params = [p for p in pl_module.parameters() if p.requires_grad]
    if not params:
        raise OptionError(
            f"GradInit found no parameter to scale in {type(pl_module).__name__} before "
            f"{type(trainer.strategy).__name__} divides the model. Make the layers in __init__ or setup, and let "
            "configure_model only divide them."
        )
    for p in params:
        if is_lazy(p) or p.is_meta:
            raise OptionError(
                "GradInit scales values, and there are parameters without any: they are lazy or on the meta device. "
                "Make the model with values (empty_init=False), and call it once where its layers are lazy."
            )
        if is_dtensor(p) or is_flattened(p):
            raise OptionError(
                "GradInit came too late: configure_model has divided the parameters already. Under FSDPStrategy leave "
                "that to the strategy (auto_wrap_policy)."
            )


def _is_resumed(trainer: Trainer) -> bool:
    """Whether the fit loads a checkpoint.

    Most strategies have loaded it by now, and the Trainer says so. Of those that load it after they have divided the
    model only Trainer._run knows; should that hide it one day, a search is in vain there, and the checkpoint comes over
    what it found.
    """
    if not trainer.strategy.restore_checkpoint_after_setup:
        return trainer.ckpt_path is not None
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not Trainer._run.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals.get("ckpt_path") is not None


def _wrap(owner: Any, name: str, action: Callable[[], None], first: bool) -> Callable[[], None]:
    """Let `action` come once, before or after a method of one object; returns what takes that away again."""
    method, had = getattr(owner, name), vars(owner).get(name)

    @functools.wraps(method)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        undo()
        if first:
            action()
        found = method(*args, **kwargs)
        if not first:
            action()
        return found

    def undo() -> None:
        if had is None:
            vars(owner).pop(name, None)
        else:
            vars(owner)[name] = had

    vars(owner)[name] = wrapped
    return undo


# ---------------------------------------------------------------------- what one sees


def _table(module: torch.nn.Module, scales: Mapping[str, float]) -> Table:
    table = Table()
    table.add_column("block", overflow="fold")
    table.add_column("values", justify="right")
    table.add_column("scale", justify="right")
    for name, p in module.named_parameters():
        if name in scales:
            table.add_row(name, f"{p.numel():,}", f"{scales[name]:.4f}")
    return table


def _summary(history: Sequence[Iteration]) -> str:
    if not history:
        return "GradInit: no iteration"
    bounded = sum(found.branch == "constraint" for found in history)
    loss, norm = (f"{getattr(history[0], x):.4g} to {getattr(history[-1], x):.4g}" for x in ("loss", "norm"))
    return f"GradInit: {len(history)} iterations, {bounded} for the bound, loss {loss}, gradient norm {norm}"


def _log(trainer: Trainer, scales: Mapping[str, float], history: Sequence[Iteration]) -> None:
    """Summaries for every logger; TensorBoard also gets the scales as a table and a histogram, and the search."""
    values = {"iterations": float(len(history))}
    if history:
        values |= {"loss": history[-1].loss, "gradient_norm": history[-1].norm}
    if scales:
        values |= {"smallest_scale": min(scales.values()), "largest_scale": max(scales.values())}
    for logger in trainer.loggers:
        logger.log_metrics({f"{KEY}/{name}": value for name, value in values.items()}, trainer.global_step)
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            _draw(logger.experiment, scales, history)


def _draw(board: Any, scales: Mapping[str, float], history: Sequence[Iteration]) -> None:
    rows = ["| block | scale |", "| --- | ---: |", *(f"| `{name}` | {scale:.4f} |" for name, scale in scales.items())]
    board.add_text(f"{KEY}/scales", "\n".join(rows), 0)
    if scales:
        board.add_histogram(f"{KEY}/scales", torch.tensor(list(scales.values())), 0)
    for i, found in enumerate(history):
        curves = {"loss": found.loss, "gradient_norm": found.norm, "loss_after_step": found.loss_after}
        for name, value in curves.items():
            if value is not None:
                board.add_scalar(f"{KEY}/search/{name}", value, i)
