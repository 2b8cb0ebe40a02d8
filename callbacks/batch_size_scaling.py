"""Learning rates for the batch size that a run really has.

Granziol, Zohren & Roberts 2022, "Learning rates as a function of batch size", JMLR 23(173), arXiv:2006.09092.
"""

from __future__ import annotations

import functools
import math
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn
from rich.console import Console
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.errors import OptionError, is_number, is_whole
from lightning_optim.training.batch_scaling import RULES, Rule, rule_of, scale
from lightning_optim.training.learning_rates import LearningRates, held

NAME = "BatchSizeScaling"


class BatchSizeScaling(Callback):
    """Multiplies learning rates by what the global batch asks for, given the batch they were found at.

    The global batch is the loader's batch times accumulated batches times data-parallel ranks (devices and nodes). It
    is printed and logged with the factor when training starts, and again when accumulation changes. Schedulers keep
    their own rates: what is applied is their rate times the factor, all along. A checkpoint holds rates without the
    factor, so a resumed run has it once, and the right one if it has another number of ranks.

    Args:
        reference_batch: The global batch, in samples, for which the configured learning rate is right.
        rule: "sqrt" for adaptive methods, "linear" for kinds of SGD; "auto" chooses by the optimizer's class.
        batch_size: Samples in a batch of one rank, where the loader does not say.
        max_factor: The largest factor: beyond the batch at which noise stops to dominate the curvature, a larger batch
            allows no larger rate. No bound by default.

    Raises:
        OptionError: where an option is out of range, "auto" does not know the optimizer, or the batch size is unknown.
    """

    def __init__(
        self,
        reference_batch: int,
        rule: Literal["sqrt", "linear", "auto"] = "auto",
        batch_size: int | None = None,
        max_factor: float | None = None,
    ) -> None:
        check = functools.partial(errors.check, NAME)
        check("reference_batch", reference_batch, is_whole(reference_batch), "an integer of at least 1")
        check("rule", rule, rule in [*RULES, "auto"], "'sqrt', 'linear' or 'auto'")
        check("batch_size", batch_size, batch_size is None or is_whole(batch_size), "an integer of at least 1")
        bound = is_number(max_factor) and 0 < max_factor < math.inf
        check("max_factor", max_factor, max_factor is None or bound, "above 0")
        self.reference_batch, self.rule, self.batch_size = reference_batch, rule, batch_size
        self.max_factor = math.inf if max_factor is None else float(max_factor)
        self.global_batch = 0
        self._rules: list[Rule] = []
        self._rates: list[LearningRates] = []
        self._loaded = 0  # the global batch of the run that is resumed

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._rules = [self._rule(optimizer) for optimizer in trainer.optimizers]

    def _rule(self, optimizer: Any) -> Rule:
        if self.rule != "auto":
            return self.rule
        found = rule_of(optimizer)
        if found is None:
            raise OptionError(
                f"{NAME}: rule='auto' knows no rule for {type(optimizer).__name__}. Set rule='sqrt' if it divides by a "
                "root of squared gradients, or rule='linear' if its step grows with the gradient as that of SGD does."
            )
        return found

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Not before: now the states of a checkpoint are in place, whatever the strategy, and the loader is made.
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        self._rates = [held(optimizer, schedulers) for optimizer in trainer.optimizers]
        self.global_batch = 0
        self._update(trainer)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._update(trainer)  # accumulation may change here

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._update(trainer)  # or a moment later, by a callback that comes after this one
        for rates in self._rates:
            rates.check()
        if self._loaded not in (0, self.global_batch):
            rank_zero_warn(
                f"{NAME}: this run resumes one with a global batch of {self._loaded}; now it is {self.global_batch}, "
                "and so the learning rates change."
            )
        self._loaded = 0

    def _update(self, trainer: Trainer) -> None:
        """Apply the factor, where the global batch is another than it was."""
        local, parts = self._local_batch(trainer), trainer.accumulate_grad_batches
        ranks = int((trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1))
        if local * parts * ranks == self.global_batch:
            return
        self.global_batch = local * parts * ranks
        factors = [scale(self.global_batch, self.reference_batch, rule, self.max_factor) for rule in self._rules]
        for rates, factor in zip(self._rates, factors, strict=True):
            rates.scale(NAME, [factor] * len(rates.scheduled))
        self._report(trainer, f"{local} (loader) × {parts} (accumulation) × {ranks} (ranks)", factors)

    def _local_batch(self, trainer: Trainer) -> int:
        if self.batch_size is not None:
            return self.batch_size
        loader = trainer.train_dataloader
        found: Any = getattr(loader, "batch_size", None)
        if not is_whole(found):
            raise OptionError(
                f"{NAME}: the training loader ({type(loader).__name__}) does not say how many samples a batch has: "
                "there are several loaders, or batches come from a batch_sampler or from the dataset itself. Set "
                "batch_size=... to the samples in a batch of one rank."
            )
        return int(found)

    def _report(self, trainer: Trainer, product: str, factors: list[float]) -> None:
        values = {"global_batch": float(self.global_batch)}
        for i, (optimizer, rule, factor) in enumerate(zip(trainer.optimizers, self._rules, factors, strict=True)):
            _say(
                f"{NAME}: global batch {self.global_batch} = {product}; learning rates of {type(optimizer).__name__} "
                f"× {factor:.6g} ({rule} rule, reference batch {self.reference_batch})"
            )
            values["factor" if len(factors) == 1 else f"factor/{i}"] = factor
        for logger in trainer.loggers:
            logger.log_metrics({f"batch_size_scaling/{k}": v for k, v in values.items()}, trainer.global_step)

    @override
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._release()

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._release()

    def _release(self) -> None:
        while self._rates:
            self._rates.pop().release(NAME)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"global_batch": self.global_batch}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = int(state_dict["global_batch"])


@rank_zero_only
def _say(line: str) -> None:
    Console(soft_wrap=True).print(line, highlight=False)
