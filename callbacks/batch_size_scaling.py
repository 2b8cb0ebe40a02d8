"""Scale learning rates to the global batch size of a run.

Granziol, Zohren & Roberts 2022, "Learning rates as a function of batch size", JMLR 23(173), arXiv:2006.09092.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.batch_size import learning_rate_factor
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.training.batch_scaling import RULES, Rule, rule_of
from lightning_optim.training.learning_rates import LearningRates, learning_rates_of

NAME = "BatchSizeScaling"


class BatchSizeScaling(FitCallback):
    """Multiply learning rates by a factor for the global batch size, given the batch size they were tuned at.

    The global batch size is the batch size of the loader, times accumulated batches, times data-parallel ranks. It is
    printed and logged with the factor when training starts, and when accumulation changes. Schedulers do not see the
    factor: the rate of a step is the scheduler's rate times the factor. Checkpoints have rates without the factor. So
    a resumed run applies it once, and with the right value on another number of ranks.

    Source: Granziol, Zohren & Roberts 2022, JMLR 23(173), arXiv:2006.09092.

    Args:
        reference_batch: The global batch size, in samples, for which the configured learning rate is right.
        rule: "linear" multiplies by batch / reference_batch, for SGD and its relatives; "sqrt" by its root, for
            adaptive methods; "auto" chooses by the optimizer.
        batch_size: Number of samples in a batch of one rank. Default: that of the loader.
        max_factor: Upper bound of the factor, above 0. The rules hold while noise dominates the curvature; for larger
            batches the best learning rate stays the same. Default: no bound.

    Attributes:
        global_batch: The global batch size, in samples; 0 before training starts.

    Raises:
        OptionError: if an option is out of range. At the start of training: if "auto" has no rule for the optimizer, or
            if the batch size is unknown. During training: if something else changes the learning rates.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> trainer = Trainer(fast_dev_run=1, callbacks=[BatchSizeScaling(reference_batch=4)], **options)
        >>> trainer.fit(BoringModel())  # SGD with batches of one sample
        BatchSizeScaling: global batch 1 = 1 (loader) × 1 (accumulation) × 1 (ranks); learning rates of SGD × 0.25
        (linear rule, reference batch 4)

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.BatchSizeScaling
                  init_args: {reference_batch: 256, max_factor: 16.0}
    """

    def __init__(
        self,
        reference_batch: int,
        rule: Literal["sqrt", "linear", "auto"] = "auto",
        batch_size: int | None = None,
        max_factor: float | None = None,
    ) -> None:
        super().__init__()
        check = functools.partial(errors.check, NAME)
        check("reference_batch", reference_batch, is_whole(reference_batch), "an integer of at least 1")
        errors.check_choice(NAME, "rule", rule, [*RULES, "auto"])
        check("batch_size", batch_size, batch_size is None or is_whole(batch_size), "an integer of at least 1")
        bound = is_number(max_factor) and 0 < max_factor < math.inf
        check("max_factor", max_factor, max_factor is None or bound, "above 0")
        self.reference_batch, self.batch_size = int(reference_batch), None if batch_size is None else int(batch_size)
        self.rule: Rule | Literal["auto"] = rule
        self.max_factor = math.inf if max_factor is None else float(max_factor)

    @override
    def forget(self) -> None:
        self.global_batch = 0
        self._rules: list[Rule] = []
        self._rates: list[LearningRates] = []
        self._loaded = 0  # global batch size of the run that is resumed

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rules = [self._rule(optimizer) for optimizer in trainer.optimizers]

    def _rule(self, optimizer: Any) -> Rule:
        if self.rule != "auto":
            return self.rule
        rule = rule_of(optimizer)
        if rule is None:
            raise OptionError(
                f"{NAME}: rule='auto' knows no rule for {type(optimizer).__name__}. Set rule='sqrt' if it divides by a "
                "root of squared gradients, or rule='linear' if its step is proportional to the gradient as in SGD."
            )
        return rule

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # In this hook, since now the loader exists and the states of a checkpoint are loaded under every strategy.
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._rates = [learning_rates_of(optimizer, schedulers) for optimizer in trainer.optimizers]
        self.undo += [functools.partial(rates.release, NAME) for rates in self._rates]
        self.global_batch = 0
        self._update(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(trainer)  # accumulation may have changed

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._update(trainer)  # or a callback after this one has changed it
        for rates in self._rates:
            rates.check()
        if self._loaded not in (0, self.global_batch):
            rank_zero_warn(
                f"{NAME}: this run resumes one with a global batch of {self._loaded}; now it is {self.global_batch}, "
                "so the learning rates change."
            )
        self._loaded = 0

    def _update(self, trainer: Trainer) -> None:
        """Apply the factor, if the global batch size has changed."""
        local, accumulated = self._local_batch(trainer), trainer.accumulate_grad_batches
        ranks = int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))
        if local * accumulated * ranks == self.global_batch:
            return
        self.global_batch = local * accumulated * ranks
        factors = [
            learning_rate_factor(self.global_batch, self.reference_batch, rule, self.max_factor) for rule in self._rules
        ]
        for rates, factor in zip(self._rates, factors, strict=True):
            rates.scale(NAME, [factor] * len(rates.scheduled))
        self._report(trainer, f"{local} (loader) × {accumulated} (accumulation) × {ranks} (ranks)", factors)

    def _local_batch(self, trainer: Trainer) -> int:
        if self.batch_size is not None:
            return self.batch_size
        loader = trainer.train_dataloader
        size: Any = getattr(loader, "batch_size", None)
        if not is_whole(size):
            raise OptionError(
                f"{NAME}: the training loader ({type(loader).__name__}) does not say how many samples a batch has: "
                "there are several loaders, or batches come from a batch_sampler or from the dataset itself. Set "
                "batch_size=... to the number of samples in a batch of one rank."
            )
        return int(size)

    def _report(self, trainer: Trainer, product: str, factors: list[float]) -> None:
        values = {"global_batch": float(self.global_batch)}
        for i, (optimizer, rule, factor) in enumerate(zip(trainer.optimizers, self._rules, factors, strict=True)):
            _print(
                f"{NAME}: global batch {self.global_batch} = {product}; learning rates of {type(optimizer).__name__} "
                f"× {factor:.6g} ({rule} rule, reference batch {self.reference_batch})"
            )
            values["factor" if len(factors) == 1 else f"factor/{i}"] = factor
        for logger in trainer.loggers:
            logger.log_metrics({f"batch_size_scaling/{k}": v for k, v in values.items()}, trainer.global_step)

    @override
    def release(self) -> None:
        super().release()
        self._rates = []

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"global_batch": self._loaded or self.global_batch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = 0 if self._rates else int(state_dict["global_batch"])  # not in the middle of a fit


@rank_zero_only
def _print(line: str) -> None:
    Console(soft_wrap=True).print(line, highlight=False)
