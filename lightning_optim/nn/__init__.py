"""Modules whose training is easier on the optimizer."""

from lightning_optim.nn.stable_embedding import StableEmbedding

__all__ = ["StableEmbedding"]
