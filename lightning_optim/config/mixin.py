"""A mixin that configures the optimizer of a LightningModule from `self.hparams.optimizer`."""

from __future__ import annotations

import weakref
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from lightning_optim.config import freezing
from lightning_optim.config.learning_rate import LearningRate
from lightning_optim.config.strategy import OptimizerStrategy, plain_spec
from lightning_optim.errors import OptionError
from lightning_optim.training.clipping import GradientClipping

if TYPE_CHECKING:
    from lightning.pytorch import Callback


class ConfiguredOptimizer(GradientClipping):
    """Implements `configure_optimizers` and `configure_callbacks` from `hparams.optimizer`.

    List it before `LightningModule`, annotate the argument with `OptimizerSpec`, and save the hyper-parameters:

        class Classifier(ConfiguredOptimizer, LightningModule):
            def __init__(self, optimizer: OptimizerSpec = "adan"):
                super().__init__()
                self.save_hyperparameters()

    A companion callback is not added if the Trainer has one of its type already, so that of the user is kept.

    Args:
        optimizer: A name, such as adan, or a mapping with name and options, such as {name: adan, lr: 0.002}. The
            command `lightning-optim optimizers` lists names and options. On a command line, `.lr=1e-3` behind the name
            of this argument changes one option.

    Attributes:
        checkpoint_integrity: Whether to add `CheckpointIntegrity`, which writes checkpoints atomically and refuses
            damaged ones before anything is loaded. Set it to False in the class to leave it out.
        lr: The learning rate of `hparams.optimizer`, to read and to set, so that Lightning's `Tuner.lr_find` and
            `LearningRateFinder` work. A module with an `lr` or `learning_rate` of its own keeps that.

    Raises:
        OptionError: where a class lists `LightningModule` before it.
    """

    checkpoint_integrity: bool = True
    lr = LearningRate()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(ConfiguredOptimizer)]
        if any(base.__name__ == "LightningModule" and "configure_optimizers" in vars(base) for base in before):
            raise OptionError(
                f"class {cls.__name__}: LightningModule comes before ConfiguredOptimizer in its base classes, and "
                f"hides its configure_optimizers. Turn the order around: class {cls.__name__}(ConfiguredOptimizer, "
                "LightningModule)."
            )

    def optimizer_strategy(self) -> OptimizerStrategy:
        """The strategy for `hparams.optimizer`.

        Raises:
            OptionError: if `hparams.optimizer` is missing or invalid.
        """
        if "optimizer" not in self.hparams:
            raise OptionError(
                f"{type(self).__name__} has no hparams.optimizer. Give its __init__ an argument "
                "`optimizer: OptimizerSpec` and call self.save_hyperparameters() there."
            )
        return OptimizerStrategy.parse(self.hparams["optimizer"])

    def _set_hparams(self, hp: Any) -> None:
        """As Lightning's, with the optimizer in plain values: no checkpoint and no hparams.yaml needs pickle."""
        super()._set_hparams(hp)
        with suppress(OptionError):  # of a wrong spec, which is refused when the Trainer has the module
            self.optimizer_strategy()
            self.hparams["optimizer"] = plain_spec(self.hparams["optimizer"])

    def configure_optimizers(self) -> Any:
        return self.optimizer_strategy().configure(self)

    def configure_callbacks(self) -> list[Callback]:
        from lightning_optim.callbacks import CheckpointIntegrity

        strategy = self.optimizer_strategy()
        freezing.freeze_before_wrapping(self, strategy.freeze)
        companions: list[Any] = strategy.callbacks()
        if self.checkpoint_integrity and CheckpointIntegrity.serves(self.trainer.strategy):
            companions.append(CheckpointIntegrity())
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]  # set by a connector
        kinds = {type(companion) for companion in companions}
        present = [one for one in callbacks if self._stays(one, kinds)]
        self.trainer.callbacks = present  # type: ignore[attr-defined]
        missing = [one for one in companions if not any(isinstance(other, type(one)) for other in present)]
        for companion in missing:
            companion.brought_by = weakref.ref(self)
        return missing

    def _stays(self, callback: Any, kinds: set[type]) -> bool:
        """Whether a callback is the user's, or a companion that an earlier run of this module has brought along."""
        by = getattr(callback, "brought_by", None)
        return by is None or (by() is self and type(callback) in kinds)
