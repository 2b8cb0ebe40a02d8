"""Gradient norms and residual norms of blocks: of the passes of training, or of extra passes before the first step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from lightning_optim.analysis.blocks import PARTS, Stack
from lightning_optim.analysis.depth_profile import DepthProfile
from lightning_optim.distributed.norms import squared_norms
from lightning_optim.distributed.placement import drop_gradients, gradient_of, is_sharded
from lightning_optim.distributed.ranks import mean_over_ranks
from lightning_optim.training import extra_pass
from lightning_optim.training.without_trace import nesting

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class Residuals:
    """The mean square of an element of what each block returns, over the batches that pass between `open` and `close`.

    A block returns a tensor, or a collection whose first tensor is the residual stream. Passes without gradients
    (validation, text that a callback generates) and those of other looks do not count.

    Args:
        blocks: The blocks.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = blocks
        self._sums: list[Tensor | float] = [0.0] * len(blocks)
        self._counts = [0] * len(blocks)
        self._handles: list[Any] = []

    def open(self) -> None:
        """Register the hooks."""
        self._nesting = nesting()
        self._handles = [block.register_forward_hook(self._hook(i)) for i, block in enumerate(self._blocks)]

    def close(self) -> None:
        """Remove the hooks."""
        while self._handles:
            self._handles.pop().remove()

    def _hook(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        def see(block: nn.Module, inputs: Any, output: Any) -> None:
            if not torch.is_grad_enabled() or nesting() != self._nesting:
                return
            tensors = [x for x in tree_flatten(output)[0] if isinstance(x, Tensor) and x.is_floating_point()]
            if tensors and tensors[0].numel():
                with torch.no_grad():
                    size = torch.linalg.vector_norm(tensors[0], dtype=torch.float64).square() / tensors[0].numel()
                self._sums[i] = self._sums[i] + size
                self._counts[i] += 1

        return see

    def means(self) -> list[float]:
        """The mean of each block over batches and ranks; NaN where a block was not seen. All ranks must call it."""
        here = [float(x) / n if n else math.nan for x, n in zip(self._sums, self._counts, strict=True)]
        device = next((x.device for x in self._sums if isinstance(x, Tensor)), torch.device("cpu"))
        means: list[float] = mean_over_ranks(torch.tensor(here, dtype=torch.float64, device=device)).tolist()
        return means


class Look:
    """One look at stacks of blocks: gradient norms of one or several passes, and residual norms.

    Args:
        stacks: The stacks.
        step: The number of optimizer steps before it.
    """

    def __init__(self, stacks: Sequence[Stack], step: int) -> None:
        self.stacks, self.step = stacks, step
        self.residuals = Residuals([block for stack in stacks for block in stack.blocks])
        blocks = [block for stack in stacks for block in stack.parameters("block")]
        self.params = list(dict.fromkeys(p for block in blocks for p in block))
        self._passes: list[dict[nn.Parameter, float]] = []

    @property
    def has_gradients(self) -> bool:
        """Whether a gradient has been read."""
        return any(self._passes)

    def begin_pass(self) -> None:
        """Read what follows as the gradients of one more pass. Norms are means over passes."""
        self._passes.append({})

    def read(self, params: Sequence[nn.Parameter], gradients: Iterable[Tensor | None], scale: float = 1.0) -> None:
        """Take the norms of gradients, in place of those of the same parameters in this pass. All ranks must call it.

        Args:
            params: The parameters.
            gradients: The gradient of each, or its shard.
            scale: By how much they are too large.
        """
        squares = squared_norms(gradients, params) / scale**2
        self._passes[-1].update(zip(params, squares.tolist(), strict=True))

    def profiles(self) -> list[DepthProfile]:
        """What was seen of each stack. All ranks must call it."""
        found, sizes = [], self.residuals.means()
        for stack in self.stacks:
            norms = {part: tuple(map(self._norm, stack.parameters(part))) for part in PARTS}
            norms = {part: own for part, own in norms.items() if part == "block" or not all(map(math.isnan, own))}
            own, sizes = tuple(sizes[: len(stack.blocks)]), sizes[len(stack.blocks) :]
            found.append(DepthProfile(self.step, stack.name, stack.names, norms, own))
        return found

    def _norm(self, params: Sequence[nn.Parameter]) -> float:
        passes = [[squares[p] for p in params if p in squares] for squares in self._passes]
        norms = [math.sqrt(sum(squares)) for squares in passes if squares]
        return sum(norms) / len(norms) if norms else math.nan


def first_look(
    trainer: Trainer,
    module: LightningModule,
    stacks: Sequence[Stack],
    batches: int,
    scale: float = 1.0,
    after: Callable[[], None] = lambda: None,
) -> Look:
    """Look at the gradients of the first batches of an epoch, without a step. Under DDP they are means over ranks.

    Args:
        trainer: The Trainer, when training starts. Use `without_trace` around this.
        module: Its module.
        stacks: The stacks.
        batches: The number of batches.
        scale: A factor on the loss in the backward pass, which is taken out again: float16 needs it.
        after: Called after each batch.
    """
    look = Look(stacks, trainer.global_step)

    def each(output: Any) -> None:
        loss = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(loss, Tensor) and loss.requires_grad:
            look.begin_pass()
            _differentiate(module, loss * scale, look, scale)
        after()

    look.residuals.open()
    try:
        extra_pass.run(trainer, module, batches, each=each)
    finally:
        look.residuals.close()
    return look


def _differentiate(module: LightningModule, loss: Tensor, look: Look, scale: float) -> None:
    """Read the gradients of a loss. FSDP leaves them, sharded, in `.grad`; others come past DDP, of this rank alone."""
    if any(map(is_sharded, look.params)):
        loss.backward()  # type: ignore[no-untyped-call]
        look.read(look.params, map(gradient_of, look.params), scale)
        drop_gradients(module.parameters())
        return
    gradients = torch.autograd.grad(loss, look.params, allow_unused=True)
    whole = (torch.zeros_like(p) if g is None else g for p, g in zip(look.params, gradients, strict=True))
    look.read(look.params, map(mean_over_ranks, whole), scale)
