"""Modules that train stably with 8-bit optimizer state."""

from lightning_optim.nn.stable_embedding import StableEmbedding

__all__ = ["StableEmbedding"]
