"""Show how gradient norms depend on depth, before the first step and while training."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.progress import Progress
from torch import nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_optim import errors
from lightning_optim.analysis.blocks import Stack, find_stacks, named_stacks
from lightning_optim.analysis.depth_profile import DepthProfile
from lightning_optim.callbacks.fit_callback import FitCallback
from lightning_optim.distributed.fsdp1 import is_flat_parameter
from lightning_optim.distributed.placement import gradient_of, reshard
from lightning_optim.distributed.ranks import gathered
from lightning_optim.errors import OptionError, is_whole
from lightning_optim.reports import depth_profile as report
from lightning_optim.reports.figures import can_draw
from lightning_optim.training import extra_pass
from lightning_optim.training.block_norms import Look, first_look
from lightning_optim.training.lightning_names import is_a
from lightning_optim.training.without_trace import without_trace

MOST = 64  # profiles that are kept of each stack
SMALLER = 16.0  # by which a loss scale is divided after an overflow
NO_BLOCKS = (
    "GradientNormProfile has found no blocks: no transformer blocks, and no ModuleList or Sequential with two modules "
    "of one class in a row. Training goes on without it. Name them, e.g. blocks: encoder.layers, or blocks: MyBlock."
)


class GradientNormProfile(FitCallback):
    """Show the gradient norm of each block by depth, at initialization and over time, and say what it means.

    Before the first step `training_step` runs on a few batches, without a trace in training: gradient norms, and the
    mean square |x|²/d of what each block returns, are means over them. Later looks read the gradients that training
    computes in one step, averaged over ranks and accumulated batches, unscaled and not yet clipped.

    The verdict is that of Xiong et al. 2020: gradients that fall towards the output over a residual stream that grows
    are those of Pre-LN, which needs no warm-up of the learning rate; flat or rising gradients over a constant residual
    stream are those of Post-LN, which needs one. It is judged by the matrix with which the feed-forward branch ends, or
    by whole blocks where that is not known.

    It prints a table and the verdict, and logs `gradient_norm_profile/last_over_first`, `.../slope` (least squares, of
    the logarithm, per block), `.../residual_growth`, and for each block `.../block/0`, `.../feed_forward_output/0`,
    `.../attention_output/0` and `.../residual/0`; of several stacks each under its name.

    Source: Xiong et al. 2020, arXiv:2002.04745, section 3.3.

    Args:
        blocks: The name of a list of modules, a pattern of names (`layers.*`) or the name of a class, or a list of
            these, each for one stack. Default: all transformer blocks of torch and of this package that lie side by
            side, or else modules of one class in a row in a `ModuleList` or `Sequential`.
        every: Number of steps between looks while training. None: only at initialization.
        batches: Number of batches for the look at initialization. 0: the first step of training instead.
        table: Print the table.

    Attributes:
        profiles: The profiles of each stack by its name, oldest first; of a long run the first, and some of the others.

    Raises:
        OptionError: if an option is out of range; when training starts, if `blocks` matches nothing, if batches cannot
            be had twice, under FSDP1 with `use_orig_params=False`, or under DeepSpeed.

    Example:
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_optim.nn import TransformerBlock
        >>> import torch
        >>> class Model(BoringModel):
        ...     def __init__(self):
        ...         super().__init__()
        ...         blocks = [TransformerBlock(32, 4, norm="pre") for _ in range(8)]
        ...         self.layer = nn.Sequential(*blocks, nn.LayerNorm(32), nn.Linear(32, 2))
        >>> profile = GradientNormProfile(table=False)
        >>> options = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
        >>> Trainer(fast_dev_run=2, callbacks=[profile], **options).fit(Model())
        >>> [first] = profile.profiles["layer"]
        >>> first.pattern(), len(first.norms["feed_forward_output"])
        ('pre', 8)

        In a config:

        .. code-block:: yaml

            trainer:
              callbacks:
                - class_path: lightning_optim.callbacks.GradientNormProfile
                  init_args: {every: 50}
    """

    def __init__(
        self,
        blocks: str | Sequence[str] | None = None,
        every: int | None = 100,
        batches: int = 4,
        table: bool = True,
    ) -> None:
        super().__init__()
        check = functools.partial(errors.check, "GradientNormProfile")
        words = [blocks] if isinstance(blocks, str) else blocks
        listed = isinstance(words, list | tuple) and bool(words) and all(isinstance(w, str) and w for w in words)
        check("blocks", blocks, words is None or listed, "a name or pattern of modules, a list of them, or None")
        check("every", every, every is None or is_whole(every), "an integer of at least 1, or None")
        check("batches", batches, is_whole(batches, 0), "an integer of at least 0")
        check("table", table, isinstance(table, bool), "True or False")
        self.blocks = None if words is None else list(words)
        self.every, self.batches, self.table = None if every is None else int(every), int(batches), table

    @override
    def forget(self) -> None:
        self.profiles: dict[str, list[DepthProfile]] = {}
        self._stacks: list[Stack] = []
        self._next: float = math.inf  # the step at which to look again
        self._look: Look | None = None
        self._warned = False
        self._drawn: dict[str, int] = {}  # the step of the last picture of a stack

    @override
    def release(self) -> None:
        super().release()
        self._end_look()
        self._stacks = []

    # ------------------------------------------------------------------ hooks

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_a(trainer.strategy, DeepSpeedStrategy):
            raise OptionError(
                "GradientNormProfile: DeepSpeed keeps gradients to itself. Use FSDPStrategy or ModelParallelStrategy."
            )
        reshard(trainer.strategy.model)  # the sanity check leaves gathered parameters, which are not the optimizer's
        if any(is_flat_parameter(p) for p in pl_module.parameters()):
            raise OptionError(
                "GradientNormProfile: FSDP1 has joined the tensors of each unit in one flat parameter "
                "(use_orig_params=False), so blocks have no gradients of their own. Set use_orig_params=True."
            )
        by_name = self.blocks is not None
        stacks = named_stacks(pl_module, self.blocks or (), type(self).__name__) if by_name else find_stacks(pl_module)
        self._stacks = [stack for stack in stacks if any(stack.parameters("block"))]
        if not self._stacks:
            self._warn(NO_BLOCKS if not stacks else "GradientNormProfile: all parameters of the blocks are frozen.")
            return
        step = trainer.global_step
        if step == 0 and self.batches and pl_module.automatic_optimization:
            self._next = self._after(step) if self._look_first(trainer, pl_module) else step
        else:  # at this step too if it is a multiple, for what is saved after a step has not looked at the next one
            self._next = self._after(step - 1) if step else 0

    @override
    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._look is None and trainer.global_step >= self._next:
            self._look = Look(self._stacks, trainer.global_step)
            self._look.begin_pass()
            if not _is_compiled(pl_module):
                self._look.residuals.open()

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._look is not None:
            own = {p for group in optimizer.param_groups for p in group["params"]}
            params = [p for p in self._look.params if p in own]
            if params:
                self._look.read(params, map(gradient_of, params))

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._look is not None and self._look.has_gradients:
            look = self._end_look()
            if self._report(trainer, look.profiles()):
                self._next = self._after(look.step)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for name, own in self.profiles.items():
            if trainer.log_every_n_steps and self._drawn.get(name, own[-1].step) != own[-1].step:  # type: ignore[attr-defined]
                self._draw(trainer, own[-1])

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"profiles": {name: [p.as_plain() for p in own] for name, own in self.profiles.items()}}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        saved = state_dict["profiles"].items()
        self.profiles = {name: [DepthProfile.of_plain(p) for p in own] for name, own in saved}

    # ------------------------------------------------------------------ looks

    def _after(self, step: int) -> float:
        return math.inf if self.every is None else step - step % self.every + self.every

    def _end_look(self) -> Any:
        look, self._look = getattr(self, "_look", None), None
        if look is not None:
            look.residuals.close()
        return look

    def _look_first(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Look at the first batches without a step, and tell whether there was something to see.

        The loss scale is that of training, or smaller as long as it overflows.
        """
        batches = min(self.batches, int(vars(trainer).get("fast_dev_run") or self.batches))
        batches = int(min(batches, *gathered(trainer.num_training_batches)))
        extra_pass.check(
            trainer,
            pl_module,
            batches,
            type(self).__name__,
            "Or set batches: 0, which takes the first step of training.",
        )
        scaler = _scaler(trainer)
        scale = scaler.get_scale() if scaler is not None else 1.0
        while True:
            hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
            with (
                Progress(disable=hidden, transient=True) as bar,
                without_trace(trainer, pl_module),
            ):
                task = bar.add_task(type(self).__name__, total=batches)
                after = functools.partial(bar.advance, task)
                look = first_look(trainer, pl_module, self._stacks, batches, scale, after)
            profiles = look.profiles()
            if scale <= 1 or _finite(profiles):
                break
            scale /= SMALLER
        if not look.has_gradients:
            self._warn(
                "GradientNormProfile: training_step has returned no loss for the first batches. It looks again in the "
                "next steps."
            )
        return look.has_gradients and self._report(trainer, profiles)

    def _report(self, trainer: Trainer, profiles: Sequence[DepthProfile]) -> bool:
        """Keep, print and log what was seen, and tell whether it was finite."""
        if not _finite(profiles):
            if not _scaler(trainer):  # which finds its scale by overflows
                self._warn(
                    f"GradientNormProfile: gradients before step {profiles[0].step + 1} are zero or not finite. It "
                    "looks again in the next steps."
                )
            return False
        for profile in profiles:
            kept = self.profiles.setdefault(profile.stack, [])
            before = kept[-1].pattern() if kept else None
            kept.append(profile)
            if len(kept) > MOST:
                del kept[1:-1:2]
            if before is None and trainer.is_global_zero:
                if self.table:
                    Console().print(report.table(profile))
                rank_zero_info(_sentence(profile))
            if trainer.log_every_n_steps:  # type: ignore[attr-defined]
                self._log(trainer, profile, profile.pattern() not in (before, "unknown"))
        return True

    def _log(self, trainer: Trainer, profile: DepthProfile, new: bool) -> None:
        """Log scalars; the verdict where it is new; and the picture after 1, 2, 4, ... looks, for it takes 0.2 s."""
        loggers: list[Any] = trainer.loggers
        for logger in loggers:
            logger.log_metrics(report.metrics(profile), profile.step)
        looks = len(self.profiles[profile.stack])
        for board in _boards(trainer) if new else ():
            board.add_text(f"{_tag(profile)}/verdict", _sentence(profile), profile.step)
        if looks & (looks - 1) == 0:
            self._draw(trainer, profile)

    def _draw(self, trainer: Trainer, profile: DepthProfile) -> None:
        boards = _boards(trainer)
        for board in boards if boards and can_draw(type(self).__name__) else ():
            board.add_figure(f"{_tag(profile)}/by_depth", report.picture(self.profiles[profile.stack]), profile.step)
        self._drawn[profile.stack] = profile.step

    def _warn(self, message: str) -> None:
        if not self._warned:
            rank_zero_warn(message)
        self._warned = True


def _boards(trainer: Trainer) -> list[Any]:
    """The writers of TensorBoard, on rank 0."""
    loggers: list[Any] = trainer.loggers if trainer.is_global_zero else []
    return [logger.experiment for logger in loggers if is_a(logger, TensorBoardLogger)]


def _tag(profile: DepthProfile) -> str:
    return f"{report.PREFIX}/{profile.stack}".rstrip("/")


def _scaler(trainer: Trainer) -> Any:
    """The gradient scaler of float16, if there is one."""
    scaler: Any = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _sentence(profile: DepthProfile) -> str:
    stack = profile.stack or "the module"
    return f"GradientNormProfile, {stack}, {len(profile.names)} blocks, step {profile.step}: {profile.verdict()}"


def _finite(profiles: Sequence[DepthProfile]) -> bool:
    """Whether no norm is infinite, and some are above zero."""
    norms = [norm for profile in profiles for norm in profile.norms["block"] if not math.isnan(norm)]
    return any(norms) and all(map(math.isfinite, norms))


def _is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has a part in a module; compiled code does not call hooks that come later."""
    parts = list(module.modules())
    compiled = any(getattr(part, "_compiled_call_impl", None) is not None for part in parts)
    compiled = compiled or getattr(module, "_compiler_ctx", None) is not None
    return compiled or any(hasattr(part, "_orig_mod") for part in parts)
