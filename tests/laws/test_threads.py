"""Models that are trained in several threads end as they do one after the other, bit for bit.

Each thread makes, trains, saves and loads optimizers of its own. Programs, kernels and buffers are made in them at the
same time.
"""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_optim import AdamW
from lightning_optim.callbacks import IterateAveraging, NonFiniteGuard
from lightning_optim.core.optimizer import Optimizer
from lightning_optim.distributed.global_index import global_indices
from lightning_optim.distributed.ranks import alone, is_alone
from lightning_optim.engines.cpp import compiler
from lightning_optim.stages import Average, Lookahead, Noise
from tests.harness import problems
from tests.harness.data import seeded_samples
from tests.harness.engines import differences, quantizes, serving
from tests.harness.modules import Made, vector
from tests.harness.nets import seeded_net
from tests.harness.problems import NAMES, apply, make_params
from tests.harness.trainers import trainer

THREADS = 3
SHAPES = ((), (5,), (70, 61), (40_000,))  # packed, with codes, and of several tiles and blocks
FEW = ((5,), (3, 4))  # for Triton's interpreter
pytestmark = pytest.mark.usefixtures("quiet_interpreter")
Run = tuple[Optimizer, list[Tensor]]


def at_once(function: Callable[[int], Any]) -> list[Any]:
    """What a function of the number of a thread returns in each of some threads that begin together."""
    found: list[Any] = [None] * THREADS
    barrier = threading.Barrier(THREADS)

    def work(i: int) -> None:
        torch.set_num_threads(1)  # a new thread has its own number, on which the order of sums depends
        barrier.wait()
        try:
            found[i] = function(i)
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in found:
        if isinstance(result, BaseException):
            raise result
    return found


def train(name: str, seed: int, **options: Any) -> Run:
    """A run that saves and loads in its middle, with gradients that its seed decides."""
    shapes = FEW if options["engine"] == "triton" else SHAPES
    params = make_params(shapes, torch.float32)
    optimizer = problems.build(name, params, **options)
    noise = Noise(global_indices([], optimizer), seed=seed)
    for stage in (noise, Lookahead(k=2), Average()) if options["state_bits"] == 8 else ():
        optimizer.append(stage)
    for step, grads in enumerate(problems.gradients(4, shapes, torch.float32, seed=seed)):
        apply(optimizer, params, grads, step)
        if step == 1:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer, params


@pytest.mark.parametrize(("name", "engine"), serving(NAMES))
@pytest.mark.parametrize("state_bits", [32, 8])
def test_threads_equal_one_after_the_other(name: str, engine: str, state_bits: int) -> None:
    if state_bits == 8 and not quantizes(name):
        pytest.skip("it has no state to keep in 8 bits, and says so")
    compiler._found.clear()  # so that all of them come to the first use of a kernel

    def run(seed: int) -> Run:
        return train(name, seed, engine=engine, state_bits=state_bits)

    together = at_once(run)
    for seed in range(THREADS):
        assert differences(*run(seed), *together[seed]) == []


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
def test_trainers_in_threads_equal_one_after_the_other(tmp_path: Path) -> None:
    def modules() -> list[Made]:
        return [Made(functools.partial(AdamW, lr=0.01 * (i + 1)), seeded_net) for i in range(THREADS)]

    def fit(i: int, module: Made) -> Tensor:
        given = {"devices": 1, "max_epochs": 2, "default_root_dir": tmp_path / str(i)}
        trainer(IterateAveraging(), NonFiniteGuard(), **given).fit(module, DataLoader(seeded_samples(), batch_size=8))
        return vector(module)

    alike, expected = modules(), modules()
    together = at_once(lambda i: fit(i, alike[i]))
    for i, module in enumerate(expected):
        assert torch.equal(fit(i, module), together[i])


def test_alone_is_alone_in_one_thread() -> None:
    """What another thread asks of its ranks goes to them."""

    def look(i: int) -> bool:
        if i:
            return is_alone()
        with alone():
            return is_alone()

    assert at_once(look) == [True, False, False]
