"""Learning rates by group and by depth, and what modules say of weight decay, against numbers by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lightning_optim import OptimizerStrategy, OptionError, create_optimizer
from lightning_optim.distributed.names import plain_name
from tests.harness.data import batches
from tests.harness.modules import Configured, vector
from tests.harness.rates import Applied
from tests.harness.trainers import trainer

LR = 0.5


def rates(module: nn.Module, **spec: Any) -> dict[str, float]:
    """The learning rate of each parameter by its plain name, relative to that of the optimizer."""
    optimizer = create_optimizer({"name": "adamw", "lr": LR, **spec}, module)
    names = {p: plain_name(name, module) for name, p in module.named_parameters()}
    return {names[p]: group["lr"] / LR for group in optimizer.param_groups for p in group["params"]}


def decays(module: nn.Module, **spec: Any) -> dict[str, float]:
    optimizer = create_optimizer({"name": "adamw", "weight_decay": 0.1, **spec}, module)
    names = {p: name for name, p in module.named_parameters()}
    return {names[p]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


class Block(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)


class Net(nn.Module):
    """As vision transformers are built: parameters of its own, a stem, blocks, a norm, a head."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 4))
        self.stem = nn.Conv2d(3, 4, 2)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x + self.pos_embed[0, 0])
        every: Any = self.blocks
        for block in every:
            x = x + block.linear(block.norm(x))
        return self.head(x)  # type: ignore[no-any-return]


class OfTimm(Net):
    """With the methods of timm's models; here the norm has a layer of its own, which the last block joins."""

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        assert not coarse
        return {
            "stem": r"^pos_embed|stem",
            "blocks": [(r"^blocks\.(0|1)", None), (r"^blocks\.2", (99999,)), (r"^norm", (2,))],
        }

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token"}


def by_layer(found: dict[str, float]) -> dict[str, float]:
    """Of each module or parameter at the top its rate, which is one for all in it; of each block too."""
    parts: dict[str, set[float]] = {}
    for name, rate in found.items():
        words = name.removeprefix("net.").split(".")
        parts.setdefault(".".join(words[: 2 if words[0] == "blocks" else 1]), set()).add(rate)
    assert all(len(values) == 1 for values in parts.values())
    return {part: values.pop() for part, values in parts.items()}


STACK = {"pos_embed": 1 / 16, "stem": 1 / 16, "blocks.0": 1 / 8, "blocks.1": 1 / 4, "blocks.2": 1 / 2, "norm": 1 / 2}


def test_rates_fall_from_the_head_to_the_stem() -> None:
    assert by_layer(rates(Net(), layer_decay=0.5)) == {**STACK, "head": 1}
    assert by_layer(rates(nn.ModuleDict({"net": Net()}), layer_decay=0.5)) == {**STACK, "head": 1}


def test_wrapped_modules_have_the_same_rates() -> None:
    wrapped = nn.ModuleDict({"net": nn.ModuleDict({"_orig_mod": Net()})})  # as torch.compile names it
    assert by_layer(rates(wrapped, layer_decay=0.5)) == {**STACK, "head": 1}
    net: Any = Net()
    net.blocks[1].linear = weight_norm(net.blocks[1].linear)
    found = rates(net, layer_decay=0.5)
    assert found["blocks.1.linear.weight.original0"] == found["blocks.1.linear.weight.original1"] == 1 / 4


def test_a_module_of_timm_says_which_layers_it_has() -> None:
    expected = {"pos_embed": 1 / 16, "stem": 1 / 16, "blocks.0": 1 / 8, "blocks.1": 1 / 4, "blocks.2": 1 / 2}
    expected |= {"norm": 1 / 2, "head": 1}
    for module in (OfTimm(), nn.ModuleDict({"net": OfTimm()})):
        assert by_layer(rates(module, layer_decay=0.5)) == pytest.approx(expected)


def test_a_tied_head_is_an_embedding() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 7, bias=False)
            self.embed = nn.Embedding(7, 4)
            self.head.weight = self.embed.weight
            self.blocks = nn.ModuleList(Block() for _ in range(2))
            self.position = nn.Embedding(5, 4)

    found = rates(Language(), layer_decay=0.5)
    assert found["head.weight"] == found["position.weight"] == 1 / 4
    assert found["blocks.1.linear.weight"] == 1


def test_stages_of_blocks_and_layers_without_blocks() -> None:
    stages = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(Block(), Block()), nn.Sequential(Block(6), Block(6)),
        nn.Linear(4, 2),
    )  # fmt: skip
    found = rates(stages, layer_decay=0.5)
    expected = {"0": 1 / 32, "1": 1 / 32, "2.0": 1 / 16, "2.1": 1 / 8, "3.0": 1 / 4, "3.1": 1 / 2, "4": 1}
    assert {name: found[f"{name}.{'linear.' if name[0] in '23' else ''}weight"] for name in expected} == expected
    plain = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 5), nn.Linear(5, 2))
    found = rates(plain, layer_decay=0.5)
    assert [found[f"{i}.weight"] for i in (0, 1, 3, 4)] == [1 / 4, 1 / 4, 1 / 2, 1]


def test_blocks_by_name_and_what_is_refused() -> None:
    spec = {"decay": 0.5, "blocks": ["blocks.0", "blocks.2"]}
    found = by_layer(rates(Net(), layer_decay=spec))
    assert found == {"pos_embed": 1 / 8, "stem": 1 / 8, "blocks.0": 1 / 4, "blocks.1": 1 / 4, "blocks.2": 1 / 2} | {
        "norm": 1 / 2,
        "head": 1,
    }
    for module, value, words in (
        (Net(), {"decay": 0.5, "blocks": "layers.*"}, r"layer_decay: blocks='layers.\*' matches no module"),
        (nn.Linear(2, 2), 0.5, "layer_decay=0.5 finds one layer only in Linear. Name its blocks"),
        (Net(), 0, r"layer_decay=0 must be in \(0, 1\], such as 0.75"),
        (Net(), {"blocks": "blocks"}, r"layer_decay=None must be in \(0, 1\]"),
        (Net(), {"decay": 0.5, "blocks": 5}, "layer_decay: blocks=5 must be a name or pattern"),
        (Net(), {"decya": 0.5}, "layer_decay has no option 'decya'. Did you mean decay"),
    ):
        with pytest.raises(OptionError, match=words):
            create_optimizer({"name": "adamw", "layer_decay": value}, module)
    with pytest.raises(OptionError, match=r"got parameters, and layer_decay=0.5 is by their names"):
        create_optimizer({"name": "adamw", "layer_decay": 0.5}, Net().parameters())


def test_names_are_readable_and_different() -> None:
    optimizer = create_optimizer({"name": "adamw", "layer_decay": 0.5, "state_bits": 8}, Net())
    names = [group["name"] for group in optimizer.param_groups]
    assert len({*names}) == len(names) == 10
    assert {"layer0", "no_decay+full_precision+layer0", "layer4"} <= {*names}


# ---------------------------------------------------------------- multipliers


def test_multipliers_follow_the_rate_of_the_optimizer() -> None:
    groups = [
        {"params": "head.*", "lr_multiplier": 10},
        {"params": "stem.*", "lr": 0.25},
        {"params": "norm", "eps": 1e-3},
    ]
    expected = {"pos_embed": 1, "stem": 0.5, "blocks.0": 1, "blocks.1": 1, "blocks.2": 1, "norm": 1, "head": 10}
    strategy = OptimizerStrategy.parse({"name": "adamw", "lr": LR, "groups": groups})
    assert by_layer(rates(Net(), groups=groups)) == expected
    assert by_layer(rates(Net(), groups=groups, layer_decay=0.5)) == {**STACK, "stem": 0.5, "head": 10}
    later = OptimizerStrategy.parse(strategy, lr=2.0).create(Net())
    assert {group["lr"] for group in later.param_groups} == {2.0, 20.0, 0.25}
    default = OptimizerStrategy.parse({"name": "adan", "groups": groups[:1]}).create(Net())
    assert {group["lr"] for group in default.param_groups} == {1e-3, 1e-2}
    other = create_optimizer({"name": "torch.optim.SGD", "lr": 0.1, "groups": groups[:1], "layer_decay": 0.5}, Net())
    assert sorted({group["lr"] for group in other.param_groups}) == [0.00625, 0.0125, 0.025, 0.05, 1.0]


@pytest.mark.parametrize(
    ("group", "words"),
    [
        ({"lr": 1.0, "lr_multiplier": 2}, r"group 'head.\*' has lr=1.0 and lr_multiplier=2. Give one of the two"),
        ({"lr_multiplier": -1}, r"group 'head.\*': lr_multiplier=-1 must be a number of at least 0"),
        ({"lr_multiplier": "fast"}, "lr_multiplier='fast' must be a number of at least 0"),
        ({"lr_multiplier": None}, "lr_multiplier=None must be a number of at least 0"),
        ({"lr_multiplyer": 3}, r"no option 'lr_multiplyer'. Did you mean lr_multiplier"),
    ],
)
def test_wrong_multipliers(group: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        OptimizerStrategy.parse({"name": "adamw", "groups": [{"params": "head.*", **group}]})


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to")
def test_rates_by_depth_follow_a_schedule_and_resume(tmp_path: Path) -> None:
    spec = {"name": "adamw", "lr": LR, "layer_decay": 0.5, "schedule": {"name": "cosine", "warmup": 0.25}}
    spec["groups"] = [{"params": "net.head.*", "lr_multiplier": 4}]

    def run(*callbacks: Any, **options: Any) -> tuple[list[list[float]], Configured]:
        torch.manual_seed(0)
        applied, module = Applied(), Configured(spec, Net)
        trainer(applied, *callbacks, max_epochs=2).fit(module, batches(), **options)
        return applied.rates[0], module

    found, whole = run(ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_epochs=1))
    for step in found:
        assert [rate / max(step) for rate in step] == pytest.approx([rate / max(found[0]) for rate in found[0]])
    assert max(map(max, found)) == 4 * LR
    rest, module = run(ckpt_path=tmp_path / "step=4.ckpt")
    assert rest == found[4:]
    assert torch.equal(vector(module), vector(whole))


# ---------------------------------------------------------------- no_weight_decay()


class Windows(nn.Module):
    """As Swin says it, and a module inside says more."""

    def __init__(self) -> None:
        super().__init__()
        self.net = OfTimm()
        self.relative_position_table = nn.Parameter(torch.zeros(3, 4))

    def no_weight_decay_keywords(self) -> set[str]:
        return {"relative_position"}


def test_what_a_module_says_is_honoured() -> None:
    said = {"net.pos_embed", "relative_position_table"}

    def none(**spec: Any) -> set[str]:
        return {name for name, decay in decays(Windows(), **spec).items() if not decay}

    usual = none(no_weight_decay=False)
    assert not said & usual
    assert none() == usual | said
    assert none(no_decay=[]) == said
    assert none(no_decay=["net.head.*"]) == said | {"net.head.weight", "net.head.bias"}
    assert none(name="torch.optim.AdamW") == usual | said
    with pytest.raises(OptionError, match=r"no_weight_decay='no' must be true or false"):
        none(no_weight_decay="no")


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
def test_rates_by_depth_follow_the_rate_that_a_finder_has_found(tmp_path: Path) -> None:
    spec = {"name": "adamw", "lr": LR, "layer_decay": 0.5, "schedule": {"name": "linear", "warmup": 0.25}}
    applied, module = Applied(), Configured(spec, Net)
    finder = LearningRateFinder(1e-4, 1e-2, num_training_steps=20, early_stop_threshold=None)
    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    trainer(finder, ModelCheckpoint(tmp_path), applied, max_epochs=1, **options).fit(module, batches(batch_size=1))
    found = module.lr
    assert 1e-4 <= found < LR
    factors = [*((step + 1) / 8 for step in range(8)), *(1 - step / 24 for step in range(24))]
    for step, factor in zip(applied.rates[0][-32:], factors, strict=True):
        assert step[-1] == pytest.approx(found * factor)
        assert step == pytest.approx([found * factor * 2.0**-layer for layer in (4, 4, 3, 3, 2, 2, 1, 1, 0, 0)])
