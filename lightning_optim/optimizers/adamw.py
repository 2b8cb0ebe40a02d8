"""AdamW: Adam with decoupled weight decay.  Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.

Differences from the paper, the same as in torch: the decay is scaled by the learning rate, where the paper
scales it by the factor of the schedule only. Divide the paper's weight_decay by its base learning rate to use
it here. eps stands as in Adam; the authors' Lua program adds it to the root before the bias correction.
"""

from typing import Any, ClassVar

from lightning_optim.optimizers.adam import Adam


class AdamW(Adam):
    """Adam with weight decay that acts on the parameter and not through the gradient; equals `torch.optim.AdamW`.

    Formula:
        mₜ = β₁·mₜ₋₁ + (1 − β₁)·gₜ
        vₜ = β₂·vₜ₋₁ + (1 − β₂)·gₜ²
        θₜ = θₜ₋₁·(1 − α·λ) − α·mₜ / ((1 − β₁ᵗ)·(√(vₜ / (1 − β₂ᵗ)) + ε))
        with α = lr, β₁, β₂ = betas, ε = eps, λ = weight_decay

    Args:
        params: Parameters, named parameters or parameter groups to optimize.
        lr: Step size.
        betas: Decay rates of the first moment (mean gradient) and of the second (mean squared gradient), each
            in [0, 1).
        eps: Added to the denominator, outside the root, after the bias correction.
        weight_decay: Decoupled weight decay: before each step the parameter loses the share `lr * weight_decay`
            of itself.
        amsgrad: Divide by the largest second moment so far instead of the current one, which costs one more
            slot.
        decoupled_weight_decay: What makes this AdamW; False gives the L2 penalty of `Adam`.

    Note:
        The reference for every other optimizer here: their learning rates are given relative to it. Checkpoints
        of `torch.optim.AdamW` load.

    Example:
        >>> import torch
        >>> layer = torch.nn.Linear(2, 1)
        >>> optimizer = AdamW(layer.parameters(), lr=1e-2, amsgrad=True)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> list(optimizer.state[layer.weight])
        ['step', 'exp_avg', 'exp_avg_sq', 'max_exp_avg_sq']
    """

    title = "AdamW"
    paper = "Loshchilov & Hutter 2019, arXiv:1711.05101"
    advice = "The safe start: lr 1e-3 for small models, 1e-4 for fine-tuning, with warm-up for transformers."
    recommended: ClassVar[dict[str, Any]] = {"lr": 1e-2}

    weight_decay: float = 1e-2
    decoupled_weight_decay: bool = True
