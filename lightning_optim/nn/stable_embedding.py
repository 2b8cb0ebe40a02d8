"""An embedding that trains stably with 8-bit optimizer state.  Dettmers et al. 2021, arXiv:2110.02861.

The gradients of the rows of an embedding differ widely in size, and most are zero in most steps. So its updates are the
most extreme ones of a model. Three measures reduce them (section 2.3): uniform initial weights, without the outliers of
a normal distribution; layer normalization after the lookup; and optimizer state in 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """`torch.nn.Embedding` with Xavier-uniform initial weights and layer normalization after the lookup.

    Source: Dettmers, Lewis, Shleifer & Zettlemoyer 2021, arXiv:2110.02861, section 2.3.

    The input is a tensor of indices of any shape (*), the output has the shape (*, embedding_dim). Add positions after
    the normalization, and do not multiply the output by sqrt(embedding_dim). A padding row is zero and gets no
    gradient; the output for it is the bias of the normalization.

    The optimizer keeps the state in 32 bits, by the role "embedding" in `full_precision` of its config. An optimizer
    that is constructed from bare parameters does not know roles.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Width of a row.
        padding_idx: Index of a row that stays zero. Default: none.
        max_norm: Rows with a larger norm are scaled down to it at the lookup. Default: no limit.
        norm_type: The p of that norm.
        scale_grad_by_freq: Divide the gradient of a row by its number of occurrences in the batch.
        sparse: Create sparse gradients, which the optimizers of this package refuse.
        device: Device of the weights.
        dtype: Dtype of the weights. The statistics of the normalization are computed in float32.

    Example:
        >>> embed = StableEmbedding(100, 16, padding_idx=0)
        >>> embed(torch.tensor([[1, 2, 0]])).shape
        torch.Size([1, 3, 16])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2.0,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
        _weight: Tensor | None = None,
        _freeze: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            padding_idx,
            max_norm,
            norm_type,
            scale_grad_by_freq,
            sparse,
            _weight,
            _freeze,
            device,
            dtype,
        )
        self.norm = nn.LayerNorm(embedding_dim, device=self.weight.device, dtype=self.weight.dtype)

    def reset_parameters(self) -> None:
        """Initialize rows uniformly in ±sqrt(6 / (num_embeddings + embedding_dim)), the padding row with 0."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """The normalized rows for a tensor of indices."""
        rows: Tensor = self.norm(super().forward(input))
        return rows
