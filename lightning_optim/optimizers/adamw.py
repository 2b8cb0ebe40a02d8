"""AdamW: Adam with decoupled weight decay.  Loshchilov & Hutter 2019, arXiv:1711.05101, Algorithm 2.

As in torch the decay is scaled by the learning rate; the paper scales it by the schedule's multiplier only,
so its weight_decay must be divided by its base learning rate to be used here. eps stands as in Adam, not as
in the authors' Lua program, which adds it to the root before the bias correction.
"""

from typing import Any, ClassVar

from lightning_optim.optimizers.adam import Adam


class AdamW(Adam):
    """Adam whose weight decay acts on the parameter, not through the gradient; equals `torch.optim.AdamW`.

    Args:
        params: Parameters or parameter groups.
        lr: Step size.
        betas: Decays of the mean gradient and of the mean squared gradient.
        eps: Added to the denominator, after the root and its bias correction.
        weight_decay: Share of the parameter, times lr, that is taken away before each step.
        amsgrad: Divide by the largest mean square so far (one more slot).
        decoupled_weight_decay: What makes this AdamW; False gives `Adam`'s L2 penalty.

    Note:
        The yardstick for every other optimizer here: their learning rates are given against it. Checkpoints
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
