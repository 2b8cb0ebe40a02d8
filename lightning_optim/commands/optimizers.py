"""`lightning-optim optimizers`."""

from lightning_optim.config.catalog import show as run

__all__ = ["run"]
