"""A transformer block whose layer norms stand before or after its branches.  Xiong et al. 2020, arXiv:2002.04745.

A block has two branches, attention A and feed-forward F, and two layer norms N. Where they stand decides how gradients
depend on depth at initialization, and so whether training needs a warm-up of the learning rate.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_optim import errors
from lightning_optim.errors import OptionError, is_number, is_whole

Activation = Callable[[Tensor], Tensor]
ACTIVATIONS: dict[str, Activation] = {"gelu": functional.gelu, "relu": functional.relu, "silu": functional.silu}


class Dense(nn.Linear):
    """`torch.nn.Linear` with Xavier-normal weights and biases of zero, as in the analysis of the paper."""

    def reset_parameters(self) -> None:
        """Initialize weights with variance 2 / (in_features + out_features), and the bias with 0."""
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class SelfAttention(nn.Module):
    """Multi-head self-attention by `scaled_dot_product_attention`; each of its four matrices is a layer."""

    def __init__(self, width: int, heads: int, causal: bool, bias: bool, **where: torch.device | torch.dtype | None):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query = Dense(width, width, bias, **where)
        self.key = Dense(width, width, bias, **where)
        self.value = Dense(width, width, bias, **where)
        self.output = Dense(width, width, bias, **where)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attention of each token to those that `mask` and `causal` allow; see `TransformerBlock.forward`."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3) for layer in (self.query, self.key, self.value)
        )
        if mask is not None:
            mask = _checked(mask, q.dtype)
        if mask is not None and self.causal:
            later = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device).triu(1)
            mask = mask.masked_fill(later, False if mask.dtype == torch.bool else float("-inf"))
        y = functional.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        return self.output(y.transpose(-2, -3).flatten(-2))  # type: ignore[no-any-return]


class FeedForward(nn.Module):
    """Two layers with an activation between them, applied to each token."""

    def __init__(
        self, width: int, inner: int, activation: Activation, bias: bool, **where: torch.device | torch.dtype | None
    ):
        super().__init__()
        self.activation = activation
        self.inner = Dense(width, inner, bias, **where)
        self.output = Dense(inner, width, bias, **where)

    def forward(self, x: Tensor) -> Tensor:
        """The output for each token."""
        return self.output(self.activation(self.inner(x)))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """A block of a transformer, with layer norms before ("pre") or after ("post") its branches.

    With attention A, feed-forward F and layer norms N₁ and N₂, a block computes

    - pre: x ← x + A(N₁(x)); x ← x + F(N₂(x)). The stack of blocks needs **one more norm after the last block**.
    - post: x ← N₁(x + A(x)); x ← N₂(x + F(x)), as in the first transformers. There is no norm after the last block.

    At initialization the gradient of the last blocks falls with the depth L as 1/√L under "pre", and does not fall
    under "post", which therefore needs a warm-up of the learning rate. `GradientNormProfile` measures it.

    Source: Xiong, Yang, He, Zheng, Zheng, Xing, Zhang, Lan, Wang & Liu 2020, arXiv:2002.04745, section 3, figure 1.

    Weights are Xavier-normal and biases zero. Query, key, value and both outputs are layers of their own
    (`attention.query`, `attention.output`, `feed_forward.inner`, ...), so Muon takes each for a matrix, and role and
    name patterns of a config find them.

    Args:
        width: Size of a token's vector.
        heads: Number of attention heads; it divides `width`.
        norm: "pre" or "post".
        mlp_ratio: The inner size of the feed-forward branch is `mlp_ratio * width`, rounded.
        dropout: Probability with which an element of the output of a branch is zero, before it is added.
        causal: Whether a token attends to earlier tokens and itself only.
        activation: "gelu", "relu", "silu", or a function of a tensor.
        bias: Whether layers and norms have biases.
        norm_affine: Whether norms have a weight, and a bias if `bias`.
        eps: What norms add to the variance.
        device: Device of the weights.
        dtype: Dtype of the weights.

    Raises:
        OptionError: if an option is out of range.

    Example:
        >>> stack = nn.Sequential(*(TransformerBlock(16, heads=2, norm="pre") for _ in range(3)), nn.LayerNorm(16))
        >>> stack(torch.zeros(8, 10, 16)).shape  # (batch, tokens, width)
        torch.Size([8, 10, 16])
    """

    def __init__(
        self,
        width: int,
        heads: int,
        norm: Literal["pre", "post"] = "pre",
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        causal: bool = False,
        activation: str | Activation = "gelu",
        bias: bool = True,
        norm_affine: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check(width, heads, norm, mlp_ratio, dropout, eps)
        for name, flag in (("causal", causal), ("bias", bias), ("norm_affine", norm_affine)):
            errors.check("TransformerBlock", name, flag, isinstance(flag, bool), "True or False")
        if isinstance(activation, type):
            raise OptionError(
                f"TransformerBlock: activation={activation.__name__} is a class. Give a function or a module, such as "
                f"{activation.__name__}()."
            )
        if not callable(activation):
            errors.check_choice("TransformerBlock", "activation", activation, list(ACTIVATIONS))
        floating = dtype is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point)
        errors.check("TransformerBlock", "dtype", dtype, floating, "a floating point dtype of torch")
        function = ACTIVATIONS[activation] if isinstance(activation, str) else activation
        where = {"device": None if device is None else torch.device(device), "dtype": dtype}
        self.norm: Literal["pre", "post"] = norm
        self.attention = SelfAttention(width, heads, causal, bias, **where)
        self.feed_forward = FeedForward(width, max(1, round(mlp_ratio * width)), function, bias, **where)
        self.attention_norm = nn.LayerNorm(width, eps, norm_affine, bias, **where)
        self.feed_forward_norm = nn.LayerNorm(width, eps, norm_affine, bias, **where)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The tokens after the block.

        Args:
            x: Tokens, (..., tokens, width).
            mask: Which tokens (last axis) a token (axis before it) attends to: True or a number to add to the score.
                It broadcasts to (..., heads, tokens, tokens); a mask of padding is (batch, 1, 1, tokens). A token
                that attends to none gets zeros from the attention.

        Returns:
            A tensor of the shape of `x`.

        Raises:
            OptionError: if `mask` is neither a bool nor a floating point tensor.
        """
        if self.norm == "pre":
            x = x + self.dropout(self.attention(self.attention_norm(x), mask))
            return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))  # type: ignore[no-any-return]
        x = self.attention_norm(x + self.dropout(self.attention(x, mask)))
        return self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        """The choices that the submodules do not show."""
        return f"norm={self.norm!r}, heads={self.attention.heads}, causal={self.attention.causal}"


def _checked(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as torch's attention takes it. Integers are refused: 1 may be meant as True or as a number to add."""
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise OptionError(
            f"TransformerBlock: mask is of {kind} and must be a tensor of bool, True where a token may look, or of "
            "floating point numbers, which are added to the scores. Of ones and zeros give mask.bool()."
        )
    mask = mask if mask.dim() > 1 else mask[None]
    return mask if mask.dtype in (torch.bool, torch.float32) else mask.to(dtype)


def _check(width: int, heads: int, norm: str, mlp_ratio: float, dropout: float, eps: float) -> None:
    errors.check_choice("TransformerBlock", "norm", norm, ["pre", "post"])
    for name, value in (("width", width), ("heads", heads)):
        errors.check("TransformerBlock", name, value, is_whole(value), "an integer of at least 1")
    if width % heads:
        raise OptionError(
            f"TransformerBlock: width={width} cannot be divided among heads={heads}. Choose a multiple of {heads}, or "
            "another number of heads."
        )
    for name, number in (("mlp_ratio", mlp_ratio), ("eps", eps)):
        errors.check("TransformerBlock", name, number, is_number(number) and 0 < number < 1e6, "a number above 0")
    errors.check("TransformerBlock", "dropout", dropout, is_number(dropout) and 0 <= dropout < 1, "in [0, 1)")
