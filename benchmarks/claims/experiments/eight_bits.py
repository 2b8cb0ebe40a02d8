"""Whether 8-bit state trains like 32-bit state in a quarter of its memory, and what the parts of the method do."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from benchmarks.claims.claim import Arm, Claim, Part
from benchmarks.claims.data import TOKENS, Text, source_text
from benchmarks.claims.finding import Finding, alike, higher, lower
from benchmarks.claims.models import Transformer, memory
from benchmarks.claims.plots import by_rate
from benchmarks.claims.results import Results
from benchmarks.claims.size import Size
from benchmarks.claims.training import DEVICE, cosine, evaluate, optimizer_of, outcome, spec_without, train, warm_up
from benchmarks.pictures import new_figure
from lightning_optim.nn import StableEmbedding
from lightning_optim.race.candidate import Candidate
from lightning_optim.race.outcome import Outcome
from lightning_optim.reports.memory import state_memory
from lightning_optim.storage import SMALLEST
from lightning_optim.storage.dynamic import Dynamic
from lightning_optim.storage.quantized import BLOCK

PAIRS = 512
FULL, LOG, DYNAMIC = "32 bits", "8 bits, log", "8 bits, dynamic"
WHOLE, LINEAR = "8 bits, one scale a tensor", "8 bits, linear code"
PLAIN_FULL, PLAIN = "32 bits, plain embedding", "8 bits, plain embedding"
EIGHT = {"state_bits": 8, "state_format": "dynamic"}
ARMS: dict[str, dict[str, Any]] = {
    FULL: {},
    LOG: {"state_bits": 8, "state_format": "log"},
    DYNAMIC: EIGHT,
    WHOLE: {"rounded": "whole"},
    LINEAR: {"rounded": "linear"},
    PLAIN_FULL: {"stable": False},
    PLAIN: {**EIGHT, "full_precision": ["bias", "norm"], "stable": False},
}
FACTORS = (0.5, 2.0, 8.0)
SEEDS = 5
MARGIN = 0.02  # nats of test loss, which is above 3
RATIO_MARGIN = 0.01


@functools.lru_cache
def pairs() -> tuple[Text, Text, Text]:
    """Source text in pairs of bytes: the `PAIRS` - 1 most frequent ones, and one token for all others."""
    texts = [text.tokens[: len(text.tokens) // 2 * 2].long().view(-1, 2) for text in source_text()]
    texts = [text[:, 0] * TOKENS + text[:, 1] for text in texts]
    order = texts[0].bincount(minlength=TOKENS**2).argsort(descending=True)
    token = torch.full((TOKENS**2,), PAIRS - 1).scatter(0, order[: PAIRS - 1], torch.arange(PAIRS - 1))
    return tuple(Text(token[text]) for text in texts)  # type: ignore[return-value]


@dataclass(frozen=True)
class OnPairs:
    """Trains a transformer on pairs of bytes with AdamW, whose 8-bit state a candidate's spec describes.

    Of the spec `stable` says which embedding there is. `rounded` keeps state in 32 bits and rounds it after each step,
    as no format of the package does: "whole" to dynamic codes with one scale for a tensor, "linear" to evenly spaced
    ones with a scale for each block.
    """

    width: int
    steps: int
    windows: int
    batch: int = 16
    length: int = 32

    def __call__(self, candidate: Candidate, seed: int, lr: float) -> Outcome:
        torch.manual_seed(seed)
        text, choose, test = pairs()
        spec = spec_without(candidate, "stable", "rounded")
        model = transformer(self.width, self.length, candidate.spec.get("stable", True)).to(DEVICE)
        optimizer = optimizer_of(model, {"name": "adamw", "weight_decay": 0.1, **spec}, lr)
        kind = candidate.spec.get("rounded")
        weights = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.numel() >= SMALLEST]

        def after(step: int) -> None:
            for weight in weights if kind else ():
                state = optimizer.state[weight]
                for slot, signed in (("exp_avg", True), ("exp_avg_sq", False)):
                    state[slot].copy_(rounded(state[slot], signed, kind))

        batches = text.batches(self.batch, self.length, seed)
        losses = train(model, optimizer, batches, self.steps, lr_at=warm_up(0.1, cosine), after=after)
        held, tested = (split.windows(self.windows, self.length) for split in (choose, test))
        entries = state_memory(optimizer)
        small = [entry for entry in entries if entry.bytes < entry.bytes_32]
        found = {"loss": evaluate(model, *held)[0], "test loss": evaluate(model, *tested)[0]}
        found["bytes"] = sum(entry.bytes for entry in entries) / sum(entry.bytes_32 for entry in entries)
        found["bytes of 8 bits"] = sum(e.bytes for e in small) / sum(e.bytes_32 for e in small) if small else 1.0
        return Outcome(metrics=outcome(losses, self.steps, **found).metrics)


def transformer(width: int, length: int, stable: bool) -> nn.Module:
    """A Pre-LN transformer of two blocks over pairs, with a stable or a plain embedding."""
    model = Transformer(width=width, length=length)
    model.tokens = (StableEmbedding if stable else nn.Embedding)(PAIRS, width)
    model.head = nn.Linear(width, PAIRS)
    return model


def rounded(x: Tensor, signed: bool, kind: str) -> Tensor:
    """A slot as 8-bit codes would give it back.

    Args:
        x: Its values.
        signed: Whether there are negative ones.
        kind: "whole" or "linear", as in `OnPairs`.
    """
    if kind == "whole":
        codes, scale = Dynamic(signed).quantize(x.view(1, -1), None, None)
        return Dynamic(signed).dequantize(codes, scale, None).view_as(x)
    blocks = pad(x.flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    step = blocks.abs().amax(1, keepdim=True) / (127 if signed else 255)
    codes = torch.where(step > 0, blocks / step, 0.0).round()
    return (codes * step).flatten()[: x.numel()].view_as(x)


def parts(size: Size) -> list[Part]:
    run = OnPairs(width=size.wide(64, 16), steps=size.long(300), windows=size.long(200))
    arms = [Arm(name, 3e-3, spec) for name, spec in ARMS.items()]
    activations = run.batch * run.length * (40 * run.width + 3 * PAIRS)
    needed = memory(lambda: transformer(run.width, run.length, True), activations)
    return [Part("text", run, arms, factors=size.some(FACTORS), seeds=size.seeds(SEEDS), bytes=needed)]


def judge(results: Results) -> list[Finding]:
    found = results["text"]
    best = {arm: found.values(arm, metric="test loss") for arm in (FULL, LOG, DYNAMIC)}
    mean = {arm: found.over_rates(arm, "test loss") for arm in ARMS}
    ratio = found.values(LOG, metric="bytes of 8 bits")

    def cost(bits: str, full: str) -> dict[int, float]:
        return {seed: loss - mean[full][seed] for seed, loss in mean[bits].items()}

    unit = "nats of test loss"
    same = "Each at its best learning rate, 8-bit state in the format {} reaches the test loss of 32-bit state."
    quarter = "State in 8 bits takes a quarter of the memory that it would take in 32."
    scale = "With one scale for a tensor instead of one for a block of 256, 8-bit state loses more, over all rates."
    code = "With evenly spaced codes instead of dynamic ones it loses more, over all rates."
    embed = "Without the stable embedding, 8-bit state costs more against 32 bits than with it, over all rates."
    return [
        alike(same.format("log"), best[LOG], best[FULL], MARGIN, unit, names=("8 bits", "32 bits")),
        alike(same.format("dynamic"), best[DYNAMIC], best[FULL], MARGIN, unit, names=("8 bits", "32 bits")),
        alike(quarter, ratio, 0.25, RATIO_MARGIN, "of 32 bits", names=("8 bits", "a quarter")),
        lower(scale, mean[DYNAMIC], mean[WHOLE], unit, names=("a block", "a tensor")),
        lower(code, mean[DYNAMIC], mean[LINEAR], unit, names=("dynamic", "even")),
        higher(embed, cost(PLAIN, PLAIN_FULL), cost(DYNAMIC, FULL), unit, names=("plain", "stable")),
    ]


def draw(results: Results) -> Any:
    found = results["text"]
    figure, axes = new_figure(1, 2, 7.2, 3.6)
    for axis, some in ((axes[0], (FULL, LOG, DYNAMIC, WHOLE, LINEAR)), (axes[1], (FULL, DYNAMIC, PLAIN_FULL, PLAIN))):
        for arm in some:
            by_rate(axis, found, arm, "test loss")
        axis.set(ylabel="test loss, nats")
        axis.legend(fontsize=7)
    axes[0].set(title="Codes and scales")
    axes[1].set(title="Embeddings")
    return figure


CLAIM = Claim(
    name="eight_bits",
    title="8-bit state matches 32 bits in a quarter of the memory, but not without blocks, codes and stable embedding.",
    papers="Dettmers et al. 2021, arXiv:2110.02861",
    setting=(
        "a transformer of two blocks of width 64 on pairs of bytes of source text, AdamW, 300 steps, warm-up and "
        "cosine; 3 learning rates from 0.0015 to 0.024, 5 seeds"
    ),
    parts=parts,
    judge=judge,
    draw=draw,
    gpu="`python -m benchmarks.claims eight_bits --size large`: width 512, 3000 steps",
)
