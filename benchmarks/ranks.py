"""Runs a function on several processes of this machine, and returns what the first one found."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def on_ranks(ranks: int, function: Callable[..., T], *args: Any) -> T:
    """What `function(*args)` returns on rank 0; every rank finds `RANK`, `MASTER_PORT` and so on, as under torchrun."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    results = torch.multiprocessing.get_context("spawn").SimpleQueue()
    torch.multiprocessing.spawn(_work, args=(ranks, port, results, function, args), nprocs=ranks)
    found: T = results.get()
    return found


def _work(rank: int, ranks: int, port: int, results: Any, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "NODE_RANK": 0, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    found = function(*args)
    if rank == 0:
        results.put(found)
