"""TransformerBlock against worked numbers and torch's own layer, and what users do with a module."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_optim import OptionError, create_optimizer
from lightning_optim.config.groups import named_roles
from lightning_optim.nn import TransformerBlock

Norm = Literal["pre", "post"]
NORMS: tuple[Norm, Norm] = ("pre", "post")


def fill(shape: tuple[int, int], a: float, b: float, scale: float) -> Tensor:
    return (scale * torch.sin(a * torch.arange(math.prod(shape), dtype=torch.float64) + b)).view(shape)


# Loss, and the norms of the gradients of the feed-forward output and of the values in each block.
WORKED: list[tuple[Norm, float, list[float], list[float]]] = [
    ("post", 1.365703066943, [0.494022072335, 0.394883108657], [0.330054685583, 1.400634307174]),
    (
        "post",
        1.565200442092,
        [0.372844641263, 0.275073610994, 0.725393953866, 0.056997198303],
        [0.212907393143, 1.104458172445, 0.228246397991, 0.081963703512],
    ),
    ("pre", 1.359063061224, [0.803774819874, 0.532892302463], [0.440121012583, 1.680804584604]),
    (
        "pre",
        1.542313040093,
        [0.648524287025, 0.489430770773, 0.853711990786, 0.125456991942],
        [0.209712953719, 1.030798178040, 0.237141237899, 0.171077897181],
    ),
]


@pytest.mark.parametrize(("norm", "loss", "outputs", "values"), WORKED)
def test_worked_numbers(norm: Norm, loss: float, outputs: list[float], values: list[float]) -> None:
    """d = 4, one head, ReLU, neither biases nor affine norms; Pre-LN has a norm after the last block."""
    blocks = [
        TransformerBlock(4, 1, norm, mlp_ratio=1, activation="relu", bias=False, norm_affine=False, dtype=torch.float64)
        for _ in outputs
    ]
    x = fill((3, 4), 0.9, 0.2, 1.0)
    for level, block in enumerate(blocks):
        for j, p in enumerate(block.parameters()):
            p.data = fill((4, 4), 1.1 + 0.13 * level + 0.01 * j, 0.3 + 0.2 * level + j, 0.5)
        x = block(x)
    if norm == "pre":
        x = functional.layer_norm(x, (4,))
    found = functional.cross_entropy(x @ fill((3, 4), 0.6, 0.5, 0.7).T, torch.arange(3))
    found.backward()  # type: ignore[no-untyped-call]

    def norms(matrices: list[nn.Linear]) -> list[float]:
        return [float(matrix.weight.grad.norm()) for matrix in matrices if matrix.weight.grad is not None]

    assert found.item() == pytest.approx(loss, abs=1e-11)
    assert norms([block.feed_forward.output for block in blocks]) == pytest.approx(outputs, abs=1e-11)
    assert norms([block.attention.value for block in blocks]) == pytest.approx(values, abs=1e-11)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("mask", [None, "padding", "added"])
@pytest.mark.parametrize("causal", [False, True])
def test_it_computes_what_the_layer_of_torch_does(norm: Norm, mask: str | None, causal: bool) -> None:
    torch.manual_seed(0)
    block = TransformerBlock(8, 2, norm, mlp_ratio=3, causal=causal, dtype=torch.float64)
    peer = nn.TransformerEncoderLayer(
        8, 2, 24, 0.0, "gelu", batch_first=True, norm_first=norm == "pre", dtype=torch.float64
    )
    own, other = block.attention, peer.self_attn
    for part in block.modules():  # also where they start at zero or one
        for p in part.parameters(recurse=False):
            p.data += 0.3 * torch.randn_like(p)
    assert other.in_proj_weight is not None
    other.in_proj_weight.data = torch.cat([layer.weight for layer in (own.query, own.key, own.value)])
    other.in_proj_bias.data = torch.cat([layer.bias for layer in (own.query, own.key, own.value)])
    copies = [
        (other.out_proj, own.output),
        (peer.linear1, block.feed_forward.inner),
        (peer.linear2, block.feed_forward.output),
        (peer.norm1, block.attention_norm),
        (peer.norm2, block.feed_forward_norm),
    ]
    for theirs, ours in copies:
        theirs.load_state_dict(ours.state_dict())
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    keep = torch.tensor([[True] * 5, [True] * 4 + [False], [True] * 3 + [False] * 2])
    bias = torch.randn(5, 5, dtype=torch.float64)
    later = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1) if causal else torch.zeros(5, 5).double()
    allowed = {
        None: later.expand(3, 5, 5),
        "padding": later + torch.zeros(3, 5, 5).double().masked_fill(~keep[:, None], -math.inf),
        "added": (later + bias).expand(3, 5, 5),
    }[mask]
    masks = {None: None, "padding": keep[:, None, None], "added": bias}
    expected = peer(x, src_mask=allowed.repeat_interleave(2, 0))
    torch.testing.assert_close(block(x, masks[mask]), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(block(x[0], None if mask != "added" else bias), block(x, masks[mask])[0])


@pytest.mark.parametrize("causal", [False, True])
def test_masks_as_users_write_them(causal: bool) -> None:
    """Of one axis, of another floating point dtype, of integers, and one that leaves a token nothing to look at."""
    torch.manual_seed(0)
    block, x = TransformerBlock(8, 2, causal=causal), torch.randn(2, 5, 8)
    keep = torch.tensor([True, True, False, True, False])
    expected = block(x, keep.expand(2, 1, 5, 5))
    assert torch.equal(block(x, keep), expected)
    score = torch.zeros(5).masked_fill(~keep, -math.inf)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        torch.testing.assert_close(block(x, score.to(dtype)), expected)
    with pytest.raises(OptionError, match=r"mask is of torch.int64 and must be a tensor of bool.*give mask.bool"):
        block(x, keep.long())
    nothing = block(x, torch.zeros(5, 5, dtype=torch.bool))
    torch.testing.assert_close(nothing, x + block.feed_forward(block.feed_forward_norm(x)))


@pytest.mark.parametrize("norm", NORMS)
def test_initial_sizes_are_those_of_the_theory(norm: Norm) -> None:
    """Equations 4.8 and 4.9: 1 after a Post-LN block, between 1 + l/2 and 1 + 3l/2 after l blocks of Pre-LN."""
    torch.manual_seed(0)
    x = functional.layer_norm(torch.randn(4, 16, 256), (256,))
    for level in range(1, 9):
        x = TransformerBlock(256, 4, norm, mlp_ratio=1, activation="relu")(x)
        size = float(x.detach().square().mean())
        assert abs(size - 1) < 1e-3 if norm == "post" else 1 + level / 2 < size < 1 + 3 * level / 2


@pytest.mark.parametrize("norm", NORMS)
def test_copies_files_and_dtypes(norm: Norm) -> None:
    torch.manual_seed(0)
    block, x = TransformerBlock(8, 2, norm, causal=True, activation=torch.tanh), torch.randn(2, 5, 8)
    expected = block(x)
    other = TransformerBlock(8, 2, norm, causal=True, activation=torch.tanh)
    other.load_state_dict(block.state_dict())
    for one in (copy.deepcopy(block), other):
        assert torch.equal(one(x), expected)
    compiled: Any = torch.compile(block, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x).float(), expected, rtol=0.1, atol=0.1)
    half = copy.deepcopy(block).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), expected, rtol=0.1, atol=0.1)


def test_a_block_without_values_is_initialized_as_one_with_values() -> None:
    """As FSDP materializes modules: each is emptied, and resets its own parameters."""
    block = TransformerBlock(64, 2, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    for part in block.modules():
        if isinstance(part, nn.Linear | nn.LayerNorm):
            part.reset_parameters()
    inner = block.feed_forward.inner
    assert float(inner.weight.detach().std()) == pytest.approx(math.sqrt(2 / (64 + 256)), rel=0.05)
    assert not inner.bias.any()


def test_dropout_acts_on_branches_in_training_alone() -> None:
    torch.manual_seed(0)
    block, x = TransformerBlock(8, 2, dropout=0.5), torch.randn(4, 5, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_roles_and_matrices_of_muon() -> None:
    net = nn.ModuleDict({
        "embedding": nn.Embedding(10, 8), "blocks": nn.Sequential(TransformerBlock(8, 2), TransformerBlock(8, 2)),
        "norm": nn.LayerNorm(8), "head": nn.Linear(8, 10),
    })  # fmt: skip
    roles = {name: role for name, (_, role) in named_roles(net).items()}
    assert roles["blocks.0.attention_norm.weight"] == roles["blocks.0.feed_forward_norm.bias"] == "norm"
    assert roles["blocks.1.attention.query.bias"] == "bias"
    optimizer = create_optimizer("muon", net)
    names = {p: name for name, p in net.named_parameters()}
    matrices = {
        names[p]
        for group in optimizer.param_groups
        for p in group["params"]
        if p.dim() == 2 and group.get("matrix", True) is not False
    }
    layers = [f"attention.{name}" for name in ("query", "key", "value", "output")]
    layers += [f"feed_forward.{name}" for name in ("inner", "output")]
    assert matrices == {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in layers}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "both"}, "norm='both' must be 'pre' or 'post'"),
        ({"heads": 3}, "width=8 cannot be divided among heads=3"),
        ({"heads": 0}, "heads=0 must be an integer of at least 1"),
        ({"mlp_ratio": 0}, "mlp_ratio=0 must be a number above 0"),
        ({"dropout": 1.0}, r"dropout=1.0 must be in \[0, 1\)"),
        ({"activation": "swish"}, "activation='swish' must be 'gelu', 'relu' or 'silu'"),
        ({"activation": nn.ReLU}, r"activation=ReLU is a class. Give a function or a module, such as ReLU\(\)"),
        ({"dtype": "float32"}, "dtype='float32' must be a floating point dtype of torch"),
        ({"causal": "yes"}, "causal='yes' must be True or False"),
        ({"eps": -1}, "eps=-1 must be a number above 0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=f"TransformerBlock: {message}"):
        TransformerBlock(**{"width": 8, "heads": 2, **options})
