"""Modules that make training easier on optimizers."""

from lightning_optim.nn.stable_embedding import StableEmbedding

__all__ = ["StableEmbedding"]
