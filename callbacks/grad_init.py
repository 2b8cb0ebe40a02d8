"""Scale the initial weights before training, so that the first step lowers the loss most."""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.progress import track
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.closures import generators_kept
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.distributed.fsdp1 import is_flattened
from lightning_optim.distributed.placement import is_dtensor
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.reports import grad_init as report
from lightning_optim.training.dry_run import NoLoss, TrainingStep, differentiable, half_batches, optimizers_of
from lightning_optim.training.grad_init import Iteration, ScaleSearch
from lightning_optim.training.lightning_names import is_a
from lightning_optim.training.trial_step import ADVICE, DIRECTIONS, Norm, along, base_rates, norm_of, taken_by

LEAST = 0.01  # the least scale of a weight; that of a bias is 0
LR: dict[Norm, float] = {2: 1e-2, 1: 2.5e-3}
BETAS: dict[Norm, tuple[float, float]] = {2: (0.9, 0.999), 1: (0.9, 0.98)}
CLIP: dict[Norm, float] = {2: 1.0, 1: math.inf}
MAX_BATCHES_WITHOUT_LOSS = 100  # in a row


class GradInit(FitCallback):
    """Learn one scale for each parameter tensor before training, and multiply the initial weights by it.

    With these scales the first step of the optimizer lowers the loss as much as possible, while the norm of the
    gradient stays below a bound. Rank 0 runs the search, on batches of the training loader, before the strategy wraps
    or shards the model; then all ranks receive the scales. Except for the weights, training is the same as without
    the callback: random states, buffers, gradients and the loader are restored. A fit that resumes from a checkpoint is
    not changed, and neither is a second fit of the same module. Frozen parameters keep their values.

    Source: Zhu, Ni, Xu, Kong, Huang & Goldstein 2021, arXiv:2102.08098, Algorithm 1.

    Args:
        gamma: Upper bound of the gradient's norm, in units of the loss per unit of the parameters. Default: 1 for
            `norm=2`. It must be given for `norm=1`, which grows with the number of parameters: the paper took 1000
            for a transformer of about 40 million.
        iterations: Number of iterations. Default: 390, an epoch of CIFAR-10 at batch size 128. One iteration costs as
            much as 2 to 3 training steps.
        follow: The step to optimize for: "optimizer" is the first step of the optimizer that `configure_optimizers`
            returns, computed by its own code; "sgd", "normalized_sgd" (the gradient divided by its norm) and "adam"
            (the sign of the gradient) are those of the paper.
        eta: Learning rate of that step. Default: the optimizer's, without the factor of a scheduler; for the paper's
            steps 0.1, 0.1 and 1e-3.
        lr: Learning rate of Adam on the scales. Default: 1e-2 for `norm=2`, 2.5e-3 for `norm=1`.
        norm: The norm of the gradient to bound: 2 (Euclidean) or 1 (sum of absolute values). Default: 2 if the step
            is along the gradient, as that of SGD, and 1 if it is along its sign, as that of Adam.
        second_order: Also differentiate through the trial step, as the paper's formula does and its code does not.
            For the paper's steps only.
        table: Print the scales.

    Attributes:
        alphas: The scale of each tensor by parameter name; None before the search.
        history: The iterations of the search, on rank 0.

    Raises:
        OptionError: if an option is out of range. At the start of the fit: under manual optimization, with several
            optimizers, if parameters have no values yet, or if the optimizer cannot take a trial step.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> grad_init = GradInit(gamma=10.0, iterations=3, table=False)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(fast_dev_run=3, callbacks=[grad_init], **options)
        >>> trainer.fit(BoringModel())
        >>> len(grad_init.history)
        3
        >>> {name: scale != 1 for name, scale in grad_init.alphas.items()}
        {'layer.weight': True, 'layer.bias': True}

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.GradInit
                  init_args: {gamma: 1.0, iterations: 100}
    """

    _seen: weakref.ref[LightningModule] | None = None  # the module of the last fit

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
        super().__init__()
        check = functools.partial(errors.check, "GradInit")
        check("gamma", gamma, gamma is None or (is_number(gamma) and gamma > 0), "a number above 0")
        for name, value in (("eta", eta), ("lr", lr)):
            check(name, value, value is None or (is_number(value) and 0 < value < math.inf), "a number above 0")
        check("iterations", iterations, is_whole(iterations, 0), "an integer of at least 0")
        errors.check_choice("GradInit", "follow", follow, ["optimizer", *DIRECTIONS])
        check("norm", norm, norm is None or (is_whole(norm) and norm <= 2), "1, 2 or null")
        for name, flag in (("second_order", second_order), ("table", table)):
            check(name, flag, isinstance(flag, bool), "True or False")
        if second_order and follow == "optimizer":
            raise OptionError(f"GradInit: second_order=True needs a step that can be differentiated. {ADVICE}")
        self.iterations, self.follow = int(iterations), follow
        self.gamma, self.eta, self.lr = (None if value is None else float(value) for value in (gamma, eta, lr))
        self.norm: Norm | None = None if norm is None else int(norm)  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]
        self.second_order, self.table = second_order, table
        self.alphas: dict[str, float] | None = None
        self.history: list[Iteration] = []

    @override
    def forget(self) -> None:
        self._searched = False

    # ------------------------------------------------------------------ hooks

    @override
    def begin_run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage != "fit":
            return

        def search() -> None:
            if _is_resumed(trainer) or (self._seen is not None and self._seen() is pl_module):
                rank_zero_info("GradInit is skipped: the weights are scaled already, or come from a checkpoint.")
            else:
                self._scale(trainer, pl_module)
            self._seen = weakref.ref(pl_module)

        def after(setup: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            setup(*args, **kwargs)
            search()

        def before(setup: Callable[..., None], *args: Any, **kwargs: Any) -> None:
            search()
            setup(*args, **kwargs)

        if is_a(trainer.strategy, ModelParallelStrategy):  # before configure_model shards the parameters
            self.wrap(pl_module, "setup", after)
        else:  # once the module has its layers, in whichever hook they are made
            self.wrap(trainer.strategy, "setup", before)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._searched:
            return
        scales = self.alphas or {}
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            logger.log_metrics(report.metrics(scales, self.history), trainer.global_step)
            if is_a(logger, TensorBoardLogger) and trainer.is_global_zero:
                report.write_to_tensorboard(logger.experiment, scales, self.history)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"alphas": self.alphas}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.alphas = state_dict["alphas"]

    # ------------------------------------------------------------------ the search

    def _scale(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _check_module(trainer, pl_module)
        with generators_kept():
            optimizer = self._optimizer(trainer, pl_module)
            if trainer.is_global_zero:
                self.alphas = self._search(trainer, pl_module, optimizer)
            else:
                self.alphas = _receive(trainer)
        self._searched = True
        with torch.no_grad():
            for name, p in pl_module.named_parameters():
                if name in self.alphas:
                    p.mul_(self.alphas[name])
        if self.table and trainer.is_global_zero:
            Console().print(report.summary(self.history), report.table(pl_module, self.alphas), sep="\n")

    def _optimizer(self, trainer: Trainer, pl_module: LightningModule) -> torch.optim.Optimizer | None:
        """The optimizer whose first step counts; None for a step of the paper."""
        if self.follow != "optimizer":
            return None
        optimizers = optimizers_of(trainer, pl_module)
        if len(optimizers) != 1:
            raise OptionError(
                f"GradInit follows one optimizer; configure_optimizers returned {len(optimizers)}. {ADVICE}"
            )
        return optimizers[0]

    def _search(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer | None
    ) -> dict[str, float]:
        """Find the scales on rank 0. The other ranks get a message after each iteration, so that no wait times out."""
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
            direction = DIRECTIONS[self.follow]
            eta, norm = self.eta or direction.eta, self.norm or direction.norm
            step = along(self.follow, eta)
        else:
            rates = base_rates(optimizer, self.eta)
            eta = max(rates, default=1.0) or 1.0
            step = taken_by(optimizer, dict(pl_module.named_parameters()), rates)
            norm = self.norm or norm_of(step, params, type(optimizer).__name__)
        gamma = self.gamma or (1.0 if norm == 2 else None)
        if gamma is None:
            raise OptionError(
                "GradInit needs gamma, the bound on the gradient's norm: the step is along the sign of the gradient, "
                "and the sum of absolute values grows with the number of parameters. The paper took 1000 for about 40 "
                "million. A run with gamma=.inf prints the norms, which help to choose."
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
    """An iteration on the next batches for which `training_step` returns a loss."""
    for _ in range(MAX_BATCHES_WITHOUT_LOSS):
        with contextlib.suppress(NoLoss):
            return search.iterate(halves)
    return search.iterate(halves)


def _receive(trainer: Trainer) -> dict[str, float]:
    """The scales, on ranks other than 0."""
    nothing: dict[str, Any] = {}
    while not (message := trainer.strategy.broadcast(nothing)):
        pass
    if "error" in message:
        raise OptionError(f"GradInit failed on rank 0: {message['error']}")
    scales: dict[str, float] = message["scales"]
    return scales


def _check_module(trainer: Trainer, pl_module: LightningModule) -> None:
    if not pl_module.automatic_optimization:
        raise OptionError(
            "GradInit needs a training_step that returns the loss; under manual optimization "
            "(automatic_optimization=False) training_step takes the optimizer steps itself. Remove the callback."
        )
    params = [p for p in pl_module.parameters() if p.requires_grad]
    if not params:
        raise OptionError(
            f"GradInit found no parameter to scale in {type(pl_module).__name__} before "
            f"{type(trainer.strategy).__name__} shards the model. Make the layers in __init__ or setup, and only shard "
            "them in configure_model."
        )
    for p in params:
        if is_lazy(p) or p.is_meta:
            raise OptionError(
                "GradInit scales values, and some parameters have none: they are lazy or on the meta device. Make the "
                "model with values (empty_init=False), and call it once if its layers are lazy."
            )
        if is_dtensor(p) or is_flattened(p):
            raise OptionError(
                "GradInit came too late: configure_model has sharded the parameters already. Under FSDPStrategy leave "
                "that to the strategy (auto_wrap_policy)."
            )


def _is_resumed(trainer: Trainer) -> bool:
    """Whether the fit resumes from a checkpoint.

    Most strategies have loaded it at this point, and the Trainer has its path. Sharded strategies load it later; until
    then only a local variable of `Trainer._run` has the path. If that variable should be renamed one day, the search
    runs for nothing and the checkpoint replaces its result.
    """
    if not trainer.strategy.restore_checkpoint_after_setup:
        return trainer.ckpt_path is not None
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not type(trainer)._run.__code__:
        frame = frame.f_back
    return frame is not None and frame.f_locals.get("ckpt_path") is not None
