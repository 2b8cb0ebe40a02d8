"""The blocks of networks as users write them, and the matrices with which their branches end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from lightning_optim import OptionError
from lightning_optim.analysis.blocks import find_stacks, named_stacks
from lightning_optim.nn import TransformerBlock

Names = dict[str, tuple[str, ...]]


def encoder(depth: int = 3) -> nn.TransformerEncoder:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), depth, enable_nested_tensor=False)


class Residual(nn.Module):
    """Of one class, the first with a parameter more, as in residual networks."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 4, 1) if first else nn.Identity()


class Bare(nn.Module):
    """Blocks as attributes, in no list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = TransformerBlock(8, 2), TransformerBlock(8, 2)


CASES: dict[str, tuple[Callable[[], nn.Module], Names]] = {
    "ours in a sequence": (
        lambda: nn.Sequential(nn.Linear(4, 8), TransformerBlock(8, 2), TransformerBlock(8, 2), nn.LayerNorm(8)),
        {"": ("1", "2")},
    ),
    "as attributes": (Bare, {"": ("first", "second")}),
    "encoder": (lambda: nn.ModuleDict({"net": encoder()}), {"net.layers": tuple(f"net.layers.{i}" for i in range(3))}),
    "encoder and decoder": (
        lambda: nn.Transformer(8, 2, 2, 3, 16, batch_first=True),
        {
            "encoder.layers": tuple(f"encoder.layers.{i}" for i in range(2)),
            "decoder.layers": tuple(f"decoder.layers.{i}" for i in range(3)),
        },
    ),
    "residual network": (
        lambda: nn.ModuleList([nn.Sequential(Residual(True), Residual()), nn.Conv2d(1, 1, 1)]),
        {"0": ("0.0", "0.1")},
    ),
    "layers of equal shape": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)),
        {"": ("1", "2")},
    ),
    "nothing in a row": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()), {}),
    "no parameters": (lambda: nn.Sequential(nn.Tanh(), nn.Tanh()), {}),
    "one block": (lambda: nn.Sequential(TransformerBlock(8, 2), nn.LayerNorm(8)), {}),
    "heads inside of blocks": (
        lambda: nn.ModuleList(nn.ModuleList(nn.Linear(4, 4) for _ in range(3)) for _ in range(2)),
        {"": ("0", "1")},
    ),
    "checkpointed and compiled": (
        lambda: nn.ModuleDict({"blocks": nn.ModuleList([
            checkpoint_wrapper(TransformerBlock(8, 2)), torch.compile(TransformerBlock(8, 2)),  # type: ignore
        ])}),
        {"blocks": ("blocks.0", "blocks.1")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_found(case: str) -> None:
    make, expected = CASES[case]
    stacks = find_stacks(make())
    assert {stack.name: stack.names for stack in stacks} == expected
    assert all(type(block).__name__ != "CheckpointWrapper" for stack in stacks for block in stack.blocks)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("encoder.layers", ("encoder.layers.0", "encoder.layers.1")),
        ("decoder.layers.*", tuple(f"decoder.layers.{i}" for i in range(3))),
        ("*.layers.0", ("encoder.layers.0", "decoder.layers.0")),
        ("TransformerDecoderLayer", tuple(f"decoder.layers.{i}" for i in range(3))),
        ("encoder.layers.?.self_attn", ("encoder.layers.0.self_attn", "encoder.layers.1.self_attn")),
    ],
)
def test_blocks_by_name(pattern: str, names: tuple[str, ...]) -> None:
    net = nn.Transformer(8, 2, 2, 3, 16, batch_first=True)
    [stack] = named_stacks(net, [pattern], "Owner")
    assert (stack.name, stack.names) == (pattern, names)
    assert list(stack.blocks) == [net.get_submodule(name) for name in names]


@pytest.mark.parametrize("pattern", ["encoder.layer", "nothing.*", "encoder.layers.*.dropout", "Layer"])
def test_a_name_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(OptionError, match=rf"Owner: blocks='{pattern.replace('*', '.')}' matches no module with"):
        named_stacks(nn.Transformer(8, 2, 2, 3, 16, batch_first=True), [pattern], "Owner")


def gpt2() -> nn.Module:
    return nn.ModuleDict({
        "ln_1": nn.LayerNorm(8), "attn": nn.ModuleDict({"c_attn": nn.Linear(8, 24), "c_proj": nn.Linear(8, 8)}),
        "mlp": nn.ModuleDict({"c_fc": nn.Linear(8, 32), "c_proj": nn.Linear(32, 8)}),
    })  # fmt: skip


def bert() -> nn.Module:
    return nn.ModuleDict({
        "attention": nn.ModuleDict({
            "self": nn.ModuleDict({"query": nn.Linear(8, 8), "key": nn.Linear(8, 8), "value": nn.Linear(8, 8)}),
            "output": nn.ModuleDict({"dense": nn.Linear(8, 8)}),
        }),
        "intermediate": nn.ModuleDict({"dense": nn.Linear(8, 32)}),
        "output": nn.ModuleDict({"dense": nn.Linear(32, 8)}),
    })  # fmt: skip


def llama() -> nn.Module:
    return nn.ModuleDict({
        "self_attn": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}),
        "mlp": nn.ModuleDict({name: nn.Linear(8, 8) for name in ("gate_proj", "up_proj", "down_proj")}),
    })  # fmt: skip


def plain() -> nn.Module:
    return nn.ModuleDict({
        "attn": nn.MultiheadAttention(8, 2), "ff": nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 8)),
    })  # fmt: skip


@pytest.mark.parametrize(
    ("make", "attention", "feed_forward"),
    [
        (lambda: TransformerBlock(8, 2), "attention.output", "feed_forward.output"),
        (lambda: nn.TransformerEncoderLayer(8, 2, 16), "self_attn.out_proj", "linear2"),
        (lambda: nn.TransformerDecoderLayer(8, 2, 16), "self_attn.out_proj", "linear2"),
        (gpt2, "attn.c_proj", "mlp.c_proj"),
        (bert, "attention.output.dense", "output.dense"),
        (llama, "self_attn.o_proj", "mlp.down_proj"),
        (plain, "attn.out_proj", "ff.2"),
    ],
)
def test_the_matrices_with_which_branches_end(make: Any, attention: str, feed_forward: str) -> None:
    net = nn.ModuleList([make(), make()])
    [stack] = named_stacks(net, ["?"], "Owner")
    for part, name in (("attention_output", attention), ("feed_forward_output", feed_forward)):
        for i, params in enumerate(stack.parameters(part)):
            assert [p.shape for p in params]
            assert params[0] is net[i].get_parameter(f"{name}.weight")
    net[0].requires_grad_(False)
    assert stack.parameters("block")[0] == stack.parameters("attention_output")[0] == []
