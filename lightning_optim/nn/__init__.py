"""Modules that train stably: an embedding for 8-bit state, and a transformer block with a choice of norm."""

from lightning_optim.nn.stable_embedding import StableEmbedding
from lightning_optim.nn.transformer_block import TransformerBlock

__all__ = ["StableEmbedding", "TransformerBlock"]
