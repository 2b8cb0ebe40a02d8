"""Files that earlier commits wrote load, without a word, and go on as those commits went on: bit for bit.

`files/make.py` says how they were made: `first` is the first form with 8 bits (2b0df1d), `houses` the last one before
modules moved (23efca8^), `before_class` the last one that did not write its class into the file (6bbf0d0).
"""

from __future__ import annotations

import copy
import gzip
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from lightning_optim import create_optimizer
from tests.core.files.make import SPECS, take_steps

FILES = Path(__file__).parent / "files"
MARKS = ("first", "houses", "before_class")


def read(name: str) -> Any:
    return torch.load(io.BytesIO(gzip.decompress((FILES / f"{name}.pt.gz").read_bytes())), weights_only=True)


def resumed(word: str, held: Any) -> tuple[Any, list[torch.Tensor]]:
    params: list[torch.Tensor] = [torch.nn.Parameter(p.clone()) for p in held["params"]]
    optimizer = create_optimizer({**SPECS[word], "lr": 0.5, "engine": "reference"}, params)
    optimizer.load_state_dict(held["optimizer"])
    return optimizer, params


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("word", SPECS)
def test_a_file_of_an_earlier_commit_goes_on_as_it_did(word: str, mark: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, params = resumed(word, read(f"{word}.{mark}"))
    take_steps(optimizer, params, 4, 3)
    after = read(f"{word}.{mark}.after")
    if word == "adan8":  # whose 8-bit codes have changed since: a tenth of a step
        assert all(float((p.detach() - q).abs().max()) < 0.001 for p, q in zip(params, after, strict=True))
    else:
        assert all(map(torch.equal, params, after))


@pytest.mark.parametrize("word", SPECS)
def test_a_file_with_a_flag_that_torch_wrote_into_a_group(word: str) -> None:
    """After a load and `add_param_group` early versions saved it; it is no sign of a file of torch."""
    held = read(f"{word}.before_class")
    group = held["optimizer"]["param_groups"][0]
    added = {**copy.deepcopy(group), "params": [1], "lr": 0.25, "differentiable": False}
    group["params"] = [0]
    held["optimizer"]["param_groups"].append(added)
    params = [torch.nn.Parameter(p.clone()) for p in held["params"]]
    optimizer = create_optimizer(SPECS[word], params[:1])
    optimizer.add_param_group({"params": params[1:], "lr": 7.0})
    optimizer.load_state_dict(held["optimizer"])
    assert [own["lr"] for own in optimizer.param_groups] == [group["lr"], 0.25]
    assert "differentiable" not in optimizer.param_groups[1]


def test_a_counter_that_was_kept_in_bfloat16() -> None:
    held = read("adamw.first")
    for slots in held["optimizer"]["state"].values():
        slots["step"] = slots["step"].bfloat16()
    optimizer, params = resumed("adamw", held)
    take_steps(optimizer, params, 4, 3)
    assert all(map(torch.equal, params, read("adamw.first.after")))
    assert optimizer.state[params[0]]["step"].dtype == torch.float32
