"""An embedding that trains with state in 8 bits.  Dettmers, Lewis, Shleifer & Zettlemoyer 2021, arXiv:2110.02861.

Rows of an embedding see gradients of very different sizes, and most see none in most steps, so its updates are the
extreme ones. Three measures keep them in bounds: first weights that are uniform, without the rare large values of a
normal distribution; layer normalisation after the lookup; and state in 32 bits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class StableEmbedding(nn.Embedding):
    """`torch.nn.Embedding` with Xavier-uniform first weights and layer normalisation after the lookup (section 2.3).

    The normalisation stands before positions are added. Do not scale the result by the root of its width as well. A
    padding row is zero and gets no gradient; what comes out for it is the bias of the normalisation.

    State in 32 bits is not a matter of this module: like every embedding it has the role "embedding", which
    `full_precision` of an optimizer's config keeps at 32 bits by default. An optimizer that is given bare parameters
    knows no roles.

    Args:
        num_embeddings: Number of rows.
        embedding_dim: Width of a row.
        padding_idx: The row that stays zero, if any.
        max_norm: Rows with a larger norm are scaled down to it when they are looked up; off by default.
        norm_type: The p of that norm, 2 by default.
        scale_grad_by_freq: Divide a row's gradient by how often it occurs in the batch.
        sparse: Make sparse gradients, which the optimizers here refuse.
        device: Where the weights are made.
        dtype: Their type. Statistics of the normalisation are taken in float32 whatever it is.

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
        """Draw the weights anew, uniform in ±sqrt(6 / (rows + width)); the padding row is zero."""
        nn.init.xavier_uniform_(self.weight)
        self._fill_padding_idx_with_zero()

    def forward(self, input: Tensor) -> Tensor:
        """The normalised rows of these indices."""
        rows: Tensor = self.norm(super().forward(input))
        return rows
