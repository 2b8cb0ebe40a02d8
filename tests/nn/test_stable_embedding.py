"""StableEmbedding: its arithmetic, its first weights, and how optimizers treat it."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from lightning_optim import OptimizerStrategy, create_optimizer
from lightning_optim.config.groups import named_roles
from lightning_optim.nn import StableEmbedding
from lightning_optim.storage import Quantized
from tests.harness.modules import Configured
from tests.harness.trainers import trainer

ROWS, WIDTH = 300, 16


def test_signature_is_that_of_torch() -> None:
    ours, torchs = (inspect.signature(cls).parameters for cls in (StableEmbedding, nn.Embedding))
    assert list(ours) == list(torchs)
    assert [p.default for p in ours.values()] == [p.default for p in torchs.values()]


def test_forward_is_the_formula() -> None:
    torch.manual_seed(0)
    embed = StableEmbedding(ROWS, WIDTH)
    nn.init.normal_(embed.norm.weight)
    nn.init.normal_(embed.norm.bias)
    index = np.array([[3, 0, 299], [7, 7, 1]])
    table, scale, shift = (p.detach().double().numpy() for p in (embed.weight, embed.norm.weight, embed.norm.bias))
    x = table[index]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    expected = (x - mean) / np.sqrt(variance + 1e-5) * scale + shift
    np.testing.assert_allclose(embed(torch.from_numpy(index)).detach().numpy(), expected, rtol=2e-5, atol=1e-6)


def test_first_weights_are_uniform_and_padding_is_zero() -> None:
    torch.manual_seed(0)
    embed = StableEmbedding(ROWS, WIDTH, padding_idx=5)
    bound = math.sqrt(6 / (ROWS + WIDTH))
    drawn = embed.weight.detach()[torch.arange(ROWS) != 5]
    assert drawn.abs().max() <= bound
    assert drawn.abs().max() > 0.99 * bound
    # The standard deviation of a uniform distribution is bound / sqrt(3); 4784 values give it to one percent or so.
    assert drawn.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03)
    assert not embed.weight[5].any()
    embed(torch.tensor([5, 6])).square().sum().backward()
    assert embed.weight.grad is not None
    assert not embed.weight.grad[5].any()


def test_given_weights_stay() -> None:
    given = torch.randn(7, 4)
    embed = StableEmbedding.from_pretrained(given, freeze=False)  # type: ignore[no-untyped-call]
    assert isinstance(embed, StableEmbedding)
    assert torch.equal(embed.weight, given)
    assert StableEmbedding(7, 4, dtype=torch.float64).norm.weight.dtype == torch.float64
    assert StableEmbedding(7, 4, device="meta").norm.weight.device.type == "meta"


def test_state_stays_in_32_bits_by_role() -> None:
    """And goes into 8 where the config says that only norms and biases are kept exact."""
    index = torch.arange(ROWS)
    for words, quantized in (({}, False), ({"full_precision": ["norm", "bias"]}, True)):
        embed, head = StableEmbedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)
        net = nn.Sequential(embed, head)
        roles = {name: role for name, (_, role) in named_roles(net).items()}
        assert roles["0.weight"] == "embedding"
        assert roles["0.norm.weight"] == roles["0.norm.bias"] == "norm"
        optimizer = create_optimizer({"name": "adamw", "state_bits": 8, **words}, net)
        net(index).square().mean().backward()
        optimizer.step()
        assert isinstance(optimizer.state[embed.weight]["exp_avg"], Quantized) == quantized
        assert isinstance(optimizer.state[head.weight]["exp_avg"], Quantized)
        decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        assert decays[id(embed.weight)] > 0
        assert decays[id(embed.norm.weight)] == 0


def test_the_page_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "stable_embedding.md").read_text()
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "stable_embedding.md", "exec"), {})
    for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL):
        spec = yaml.safe_load(block)["model"]["optimizer"]
        assert OptimizerStrategy.parse(spec).full_precision == ("bias", "norm")


class Copier(Configured):
    """Learns to say the token that it sees."""

    def __init__(self) -> None:
        super().__init__(
            {"name": "adamw", "lr": 1e-2, "state_bits": 8},
            lambda: nn.Sequential(StableEmbedding(ROWS, WIDTH), nn.Linear(WIDTH, ROWS)),
        )
        self.kinds: set[torch.dtype] = set()

    def loss(self, batch: Sequence[Tensor]) -> Tensor:
        rows = self.net[0](batch[0])  # type: ignore[index]
        self.kinds.add(rows.dtype)
        return cross_entropy(self.net[1](rows), batch[0])  # type: ignore[index]


@pytest.mark.parametrize(
    ("precision", "kind"), [("bf16-mixed", torch.float32), ("bf16-true", torch.bfloat16), ("32-true", torch.float32)]
)
def test_trains_in_a_trainer(precision: str, kind: torch.dtype) -> None:
    torch.manual_seed(0)
    model = Copier()
    data = DataLoader(TensorDataset(torch.randint(ROWS, (512,))), batch_size=64)
    trainer(max_epochs=12, precision=precision).fit(model, data)
    assert model.kinds == {kind}
    assert sum(model.losses[-8:]) < 0.7 * sum(model.losses[:8])
    assert model.net.get_submodule("0").weight.dtype == (torch.bfloat16 if precision == "bf16-true" else torch.float32)
