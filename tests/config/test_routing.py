"""Which parameters Muon takes for matrices, what it says of it, and that a Trainer sees one optimizer."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import AdamW, Muon, OptimizerStrategy, OptionError, create_optimizer
from lightning_optim.config.command_line import read
from lightning_optim.core.routing import routes
from tests.harness.data import batches
from tests.harness.modules import Configured, vector
from tests.harness.trainers import Walk, trainer


class Everything(nn.Module):
    """One layer of each kind."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.token = nn.Parameter(torch.zeros(1, 1, 16))
        self.attention = nn.MultiheadAttention(16, 4)
        self.lstm, self.gru = nn.LSTM(16, 8), nn.GRU(16, 8)
        self.depthwise, self.grouped = nn.Conv1d(16, 16, 3, groups=16), nn.Conv2d(8, 8, 3, groups=2)
        self.norm, self.inner = nn.LayerNorm(16), nn.Linear(16, 32)
        self.last = nn.Linear(16, 50, bias=False)
        if tied:
            self.last.weight = self.embed.weight


class Net(nn.Module):
    """Two matrices, of which the second is the head."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last(torch.tanh(self.inner(x)))
        return found


def reasons(optimizer: Any, least: int = 2) -> dict[str, tuple[str, str]]:
    """Rule and reason of the tensors of so many axes, by name."""
    return {route.name: (route.rule, route.reason) for route in routes(optimizer) if len(route.shape) >= least}


def test_roles_and_types_of_modules_decide() -> None:
    optimizer = create_optimizer("muon", Everything())
    assert reasons(optimizer) == {
        "embed.weight": ("adamw", "role embedding"),
        "token": ("adamw", "1 row"),
        "attention.in_proj_weight": ("muon", "weight, 3 matrices of 16 x 16"),
        "attention.out_proj.weight": ("muon", "weight"),
        "lstm.weight_ih_l0": ("muon", "weight, 4 matrices of 8 x 16"),
        "lstm.weight_hh_l0": ("muon", "weight, 4 matrices of 8 x 8"),
        "gru.weight_ih_l0": ("muon", "weight, 3 matrices of 8 x 16"),
        "gru.weight_hh_l0": ("muon", "weight, 3 matrices of 8 x 8"),
        "depthwise.weight": ("adamw", "a depthwise convolution"),
        "grouped.weight": ("muon", "weight, 2 matrices of 4 x 36"),
        "inner.weight": ("muon", "weight"),
        "last.weight": ("adamw", "head"),
    }
    assert all(rule == "adamw" for name, (rule, _) in reasons(optimizer, 0).items() if name.endswith("bias"))
    said = repr(optimizer)
    assert "last.weight [50, 16]: head" in said
    assert "depthwise.weight [16, 1, 3]: a depthwise convolution" in said


def test_a_head_that_is_tied_to_an_embedding_is_an_embedding() -> None:
    found = reasons(create_optimizer("muon", Everything(tied=True)))
    assert found["embed.weight"] == ("adamw", "role embedding")
    assert found["inner.weight"] == ("muon", "weight")


def test_words_and_groups_change_it() -> None:
    spec: dict[str, Any] = {
        "name": "muon",
        "adamw": ["bias", "norm", "inner.*"],
        "groups": [
            {"params": "attention.in_proj_weight", "heads": 4},
            {"params": "grouped.weight", "matrix": False},
            {"params": "depthwise.weight", "matrix": True},
        ],
    }
    found = reasons(create_optimizer(spec, Everything()))
    assert found["embed.weight"] == ("muon", "weight")
    assert found["last.weight"] == ("muon", "weight")
    assert found["inner.weight"] == ("adamw", "adamw: inner.*")
    assert found["attention.in_proj_weight"] == ("muon", "weight, 4 matrices of 12 x 16")
    assert found["grouped.weight"] == ("adamw", "group 'grouped.weight'")
    assert found["depthwise.weight"] == ("muon", "matrix=True")


def test_head_is_a_role_for_every_optimizer() -> None:
    optimizer = create_optimizer({"name": "adamw", "groups": [{"params": "head", "lr": 0.5}]}, Net())
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert sorted(rates.values()) == [1e-3, 1e-3, 1e-3, 0.5]
    weights = create_optimizer({"name": "adamw", "groups": [{"params": "weight", "lr": 0.5}]}, Net())
    assert sum(len(group["params"]) for group in weights.param_groups if group["lr"] == 0.5) == 2, "a head is a weight"


def test_settings_of_adamw_stand_under_one_key() -> None:
    own = {"betas": [0.8, 0.9], "eps": 1e-6, "scale": 0.1}
    group = create_optimizer({"name": "muon", "adamw": own}, Net()).param_groups[0]
    assert (group["betas"], group["adamw_eps"], group["adamw_scale"]) == ((0.8, 0.9), 1e-6, 0.1)
    strategy = OptimizerStrategy("muon", adamw=own)
    assert OptimizerStrategy.parse(strategy.as_config()) == strategy
    assert OptimizerStrategy.parse(strategy, lr=0.5).options["adamw_eps"] == 1e-6
    assert read({"name": "muon", "adamw": ["bias"]}).adamw == ("bias",)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"name": "adan", "adamw": []}, "'adan' has no key 'adamw'"),
        ({"name": "muon", "adamw": 3}, "adamw=3 must be a list of roles"),
        ({"name": "muon", "adamw": {"lr": 0.1}}, "no lr of its own"),
        ({"name": "muon", "adamw": {"epss": 0.1}}, "Did you mean eps"),
        ({"name": "muon", "adamw": {"eps": "small"}}, "must be a number"),
        ({"name": "muon", "betas": [0.9, 0.9], "adamw": {"betas": [0.9, 0.9]}}, "betas and adamw.betas are the same"),
        ({"name": "muon", "adamw": ["heads.*"]}, r"no parameter matches 'heads.\*'"),
        ({"name": "muon", "groups": [{"params": "w[123]", "matrix": True}]}, "no parameter matches"),
        (
            {"name": "muon", "groups": [{"params": "inner.weight", "blocks": 4}]},
            "inner.weight: blocks=4 does not divide",
        ),
        ({"name": "muon", "groups": [{"params": "inner.weight", "heads": 5}]}, "inner.weight: heads=5 does not divide"),
        ({"name": "muon", "groups": [{"params": "inner.*", "matrix": True}]}, "inner.bias: matrix=True"),
        ({"name": "muon", "adamw": ["weight"]}, "no matrix in Net"),
        ({"name": "muon", "momentun": 0.9}, "Did you mean momentum"),
        ({"name": "adamw", "nesterov": True}, "'adamw' has no option 'nesterov'"),
        ({"name": "muon", "amsgrad": True}, "'muon' has no option 'amsgrad'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_with_a_name(spec: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        create_optimizer(spec, Net())


def fitted(optimizer: Any, batch_size: int = 4, **options: Any) -> tuple[list[torch.Tensor], Configured]:
    torch.manual_seed(0)
    module, walk = Configured(optimizer, Net), Walk()
    trainer(walk, max_epochs=1, **options).fit(module, batches(batch_size=batch_size))
    return walk.weights, module


SPEC: dict[str, Any] = {"name": "muon", "lr": 0.01}


def test_a_fit_says_once_who_gets_what(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fitted(SPEC)
    assert len([record for record in caplog.records if "last.weight [2, 6]: head" in record.getMessage()]) == 1


def test_gradients_are_clipped_and_not_the_orthogonal_step() -> None:
    """A matrix does not see the size of its gradient (T1)."""
    clipped, module = fitted(SPEC, gradient_clip_val=1e-3)
    free, _ = fitted(SPEC)
    size = module.net.inner.weight.numel()  # type: ignore[union-attr, operator]
    torch.testing.assert_close(clipped[0][:size], free[0][:size], rtol=1e-5, atol=1e-7)


def test_accumulated_batches_are_one_step() -> None:
    """The momentum advances once in a step, and not once in a batch (T6)."""
    whole, _ = fitted(SPEC, batch_size=8)
    halves, _ = fitted(SPEC, batch_size=4, accumulate_grad_batches=2)
    assert len(whole) == len(halves)
    torch.testing.assert_close(torch.stack(halves), torch.stack(whole), rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------ files of torch


def trained(optimizers: Any, net: nn.Module, steps: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        net(x).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()


def test_the_pair_of_torch_goes_on() -> None:
    torchs = getattr(torch.optim, "Muon", None)
    if torchs is None:
        pytest.skip("this torch has no Muon")
    torch.manual_seed(0)
    net, other = Net().double(), Net().double()
    matrices = [net.inner.weight]
    rest = [p for p in net.parameters() if p is not net.inner.weight]
    pair = torchs(matrices, lr=0.01), torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1)
    trained(pair, net, 3, seed=1)
    other.load_state_dict(net.state_dict())
    spec = {"name": "muon", "lr": 0.01, "no_decay": [], "coefficients": "classic", "adjust": "original", "eps": 1e-7}
    optimizer: Any = create_optimizer({**spec, "compute": "bfloat16"}, other)
    optimizer.load_state_dict([one.state_dict() for one in pair])
    state = pair[0].state[net.inner.weight]["momentum_buffer"]
    assert torch.equal(optimizer.state[other.inner.weight]["exp_avg"], state)
    trained(pair, net, 1, seed=2)
    trained([optimizer], other, 1, seed=2)
    torch.testing.assert_close(vector(other), vector(net), rtol=0, atol=1e-3)
    for p, q in zip(other.parameters(), net.parameters(), strict=True):
        if q is not net.inner.weight:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)
    of_sgd = torch.optim.SGD(rest).state_dict()
    for wrong in ([pair[0].state_dict()], [pair[1].state_dict()] * 2, [pair[0].state_dict(), of_sgd]):
        with pytest.raises(OptionError, match="a list of two"):
            optimizer.load_state_dict(wrong)
    with pytest.raises(OptionError, match=r"torch.optim.Muon had 1 of the \d+ parameters. Give a list of two"):
        optimizer.load_state_dict(pair[0].state_dict())


def test_a_file_of_torchs_muon_loads_with_its_options() -> None:
    torchs = getattr(torch.optim, "Muon", None)
    if torchs is None:
        pytest.skip("this torch has no Muon")
    p = nn.Parameter(torch.ones(3, 4))
    theirs = torchs([p], lr=0.25, momentum=0.8, ns_steps=3, adjust_lr_fn="match_rms_adamw")
    p.grad = torch.ones(3, 4)
    theirs.step()
    optimizer = Muon([nn.Parameter(torch.ones(3, 4))])
    optimizer.load_state_dict(theirs.state_dict())
    group = optimizer.param_groups[0]
    assert [group[key] for key in ("lr", "momentum", "steps", "adjust", "coefficients", "eps")] == [
        *(0.25, 0.8, 3, "match_rms_adamw", "classic", 1e-7)
    ]
    assert torch.equal(optimizer.state[group["params"][0]]["exp_avg"], theirs.state[p]["momentum_buffer"])
    for wrong in ((1.0, 1.0, 1.0), None):
        saved = theirs.state_dict()
        saved["param_groups"][0]["ns_coefficients"] = wrong
        with pytest.raises(OptionError, match="ns_coefficients"):
            optimizer.load_state_dict(saved)
    for key in ("ns_coefficients", "adjust_lr_fn"):  # as an early version may have written it
        saved = theirs.state_dict()
        del saved["param_groups"][0][key]
        optimizer.load_state_dict(saved)
    assert (optimizer.param_groups[0]["adjust"], optimizer.param_groups[0]["coefficients"]) == ("original", "classic")


def test_a_tensor_that_changes_its_rule() -> None:
    """From AdamW to Muon the first moment stays; the other way all begins anew, the counter too."""
    p = nn.Parameter(torch.ones(3, 4))

    def made(matrix: bool) -> Muon:
        return Muon([{"params": [p], "matrix": matrix}])

    for before in (False, True):
        optimizer, other = made(before), made(not before)
        p.grad = torch.ones(3, 4)
        optimizer.step()
        with pytest.warns(UserWarning, match="left out"):
            other.load_state_dict(optimizer.state_dict())
        assert other.param_groups[0]["matrix"] is (not before)
        state = other.state[p]
        assert list(state) == (["step", "exp_avg", "exp_avg_sq"] if before else ["step", "exp_avg"])
        assert float(state["step"]) == (0 if before else 1)
        assert bool(state["exp_avg"].any()) is not before
        other.step()


def test_a_run_of_adamw_goes_on_with_muon() -> None:
    net = Net()
    first = create_optimizer("adamw", net, lr=0.01)
    net(torch.ones(3, 4)).sum().backward()
    first.step()
    state = AdamW(net.parameters())
    net(torch.ones(3, 4)).sum().backward()
    state.step()
    second = Muon([{"params": list(net.parameters()), "matrix": None}])
    with pytest.warns(UserWarning, match="another class"):
        second.load_state_dict(state.state_dict())
    second.step()
