"""Let loggers tell the story of a run: what matters first, the applied learning rates, settings beside results."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.callbacks.raw_evaluation import SUFFIX
from lightning_optim.reports.settings import schedule_of, settings
from lightning_optim.training.lightning_names import is_a

FIRST = "Overview"  # TensorBoard sorts groups by name, capitals first, and opens the first two
RATE = "learning_rate"


class Dashboard(FitCallback):
    """Log the learning rates that are applied, and let TensorBoard show first what matters.

    Every logger gets `learning_rate/<schedule>/<group>`, the rate of each parameter group in a step, with the factors
    of all callbacks: `learning_rate/cosine/main`. The schedule is the word of the config, the class of a scheduler, or
    `constant`; callbacks that change rates follow, as in `cosine-WarmupFreeSchedule`.

    TensorBoard also gets a first group, `Overview`, with the metrics that matter and the learning rate, from the same
    values. Where `IterateAveraging` has `evaluate_raw`, the weights of training are a second line in the same chart, as
    a run `raw`. In HPARAMS stand the optimizer's word, its settings and other hyper-parameters in plain words, beside
    the last value of each metric. They replace what Lightning writes there, `hp_metric` too. Lightning's `epoch`, which
    it logs with everything, is left out.

    Args:
        metrics: The metrics that matter, the most important first. Default: those in the progress bar and, in HPARAMS,
            those of the first validation.

    Raises:
        OptionError: if `metrics` is no list of names.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(max_steps=2, logger=False, callbacks=[Dashboard()], log_every_n_steps=1, **options)
        >>> trainer.fit(BoringModel())
        >>> [name for name in trainer.logged_metrics if name.startswith("learning_rate")]
        ['learning_rate/StepLR']

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.Dashboard
                  init_args: {metrics: [train/loss, val/accuracy]}
    """

    def __init__(self, metrics: Sequence[str] | None = None) -> None:
        super().__init__()
        given = isinstance(metrics, list | tuple) and all(isinstance(name, str) for name in metrics)
        errors.check("Dashboard", "metrics", metrics, metrics is None or given, "a list of names of metrics")
        self.metrics = None if metrics is None else list(metrics)

    @override
    def forget(self) -> None:
        self._raw: dict[str, Any] = {}  # writers of the run `raw`, by folder
        self._told = False  # HPARAMS

    @override
    def release(self) -> None:
        super().release()
        for writer in vars(self).get("_raw", {}).values():
            writer.close()
        self._raw = {}

    @override
    def begin_run(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for board in _boards(trainer):
            self.wrap(board, "log_metrics", functools.partial(self._log, trainer, board))
            self.wrap(board, "log_hyperparams", _without_default)

    # ------------------------------------------------------------------ learning rates

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if not trainer._logger_connector.should_update_logs:
            return
        groups = optimizer.param_groups
        prefix = f"{RATE}/{trainer.optimizers.index(optimizer)}" if len(trainer.optimizers) > 1 else RATE
        prefix += f"/{schedule_of(trainer, pl_module, optimizer)}"
        for i, group in enumerate(groups):
            name = f"{prefix}/{group.get('name', i)}" if len(groups) > 1 else prefix
            pl_module.log(name, float(group["lr"]), on_step=True, on_epoch=False)

    # ------------------------------------------------------------------ TensorBoard

    def _log(
        self,
        trainer: Trainer,
        board: Any,
        log: Callable[..., None],
        metrics: Mapping[str, Any],
        step: int | None = None,
    ) -> None:
        """Log metrics without `epoch`, and those that matter in the first group too."""
        values = {name: value for name, value in metrics.items() if name != "epoch"}
        if trainer.state.fn == "fit" and trainer.is_global_zero:
            matter = [name for name in self._matter(trainer) if name.removesuffix(SUFFIX) == name]
            first = {f"{FIRST}/{name}": values[name] for name in matter if name in values}
            if rate := next((name for name in values if name.startswith(f"{RATE}/")), ""):
                first[f"{FIRST}/lr/{rate.split('/')[2 if len(trainer.optimizers) > 1 else 1]}"] = values[rate]
            for name in matter:
                if name + SUFFIX in values:
                    self._writer(board).add_scalar(f"{FIRST}/{name}", values[name + SUFFIX], step)
            values |= first
        if values:
            log(values, step)

    def _matter(self, trainer: Trainer) -> list[str]:
        # Not its property, which would compute metrics, with collectives, on the rank that logs.
        return self.metrics or list(trainer._logger_connector._progress_bar_metrics)

    def _writer(self, board: Any) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.path.join(board.log_dir, SUFFIX.strip("_"))
        if folder not in self._raw:
            self._raw[folder] = SummaryWriter(folder)
        return self._raw[folder]

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.metrics is not None:
            self._tell_settings(trainer, pl_module, self.metrics)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._tell_settings(trainer, pl_module)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._tell_settings(trainer, pl_module)

    def _tell_settings(self, trainer: Trainer, module: LightningModule, metrics: Sequence[str] | None = None) -> None:
        """Write the hyper-parameters and the names of metrics, once in a run, for TensorBoard keeps the first."""
        if self._told or not trainer.is_global_zero or importlib.util.find_spec("tensorboard") is None:
            return
        from torch.utils.tensorboard.summary import hparams

        self._told = True
        logged = [name for name in trainer._logger_connector._logged_metrics if not name.startswith(f"{RATE}/")]
        names = [*self._matter(trainer), *logged] if metrics is None else metrics
        for board in _boards(trainer):
            for summary in hparams(settings(trainer, module), dict.fromkeys(names, 0.0)):  # type: ignore[no-untyped-call]
                board.experiment._get_file_writer().add_summary(summary)


def _boards(trainer: Trainer) -> list[Any]:
    loggers: list[Any] = trainer.loggers
    return [logger for logger in loggers if is_a(logger, TensorBoardLogger)]


def _without_default(log: Callable[..., None], params: Any, metrics: Any = None, step: int | None = None) -> None:
    """Log hyper-parameters, for hparams.yaml, without `hp_metric`, which Lightning adds where no metric is given."""
    log(params, {} if metrics is None else metrics, step)
