"""Extreme eigenvalues of a Hessian beside other packages: errors, CPU time of a product on one thread, and memory.

python -m benchmarks.curvature --out benchmarks/results/curvature.json

The other packages need not be dependencies: those that are not installed are left out. Each measurement is a process of
its own, so that the peak of its memory is its own; each is repeated, all in turn, and medians are kept.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian
from torch.nn.functional import cross_entropy

from benchmarks.records import machine
from lightning_optim.analysis import extreme_eigenvalues

WIDTHS = {"small": (8, 20, 3), "large": (256, 1024, 768, 10)}
PACKAGES = {"curvlinops": "curvlinops", "hessian-eigenthings": "hessian_eigenthings", "PyHessian": "pyhessian"}


class Problem:
    """A net with its batch; the same numbers in both dtypes."""

    def __init__(self, size: str, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        widths = WIDTHS[size]
        layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        net = nn.Sequential(*[part for layer in layers for part in (layer, nn.Tanh())][:-1])
        self.x, self.y = torch.randn(256, widths[0]).to(dtype), torch.arange(256) % widths[-1]
        self.net = net.to(dtype)
        self.params = list(net.parameters())
        self.calls = 0

    def loss(self) -> Tensor:
        self.calls += 1
        return cross_entropy(self.net(self.x), self.y)

    def exact(self) -> tuple[float, float]:
        """The ends of the spectrum of the whole matrix, in float64."""
        kept = {name: p.detach().double() for name, p in self.net.named_parameters()}
        x = self.x.double()

        def loss(flat: Tensor) -> Tensor:
            parts = torch.split(flat, [p.numel() for p in kept.values()])
            named = {name: part.view(p.shape) for (name, p), part in zip(kept.items(), parts, strict=True)}
            return cross_entropy(functional_call(self.net, named, x), self.y)

        values = torch.linalg.eigvalsh(hessian(loss)(torch.cat([p.reshape(-1) for p in kept.values()])))
        return float(values[-1]), float(values[0])


Found = tuple[float, float | None, int]  # largest, smallest, products


def ours(way: Any) -> Callable[[Problem, int, float], Found]:
    def run(problem: Problem, steps: int, tolerance: float) -> Found:
        found = extreme_eigenvalues(problem.loss, problem.params, steps=steps, products=way, tolerance=tolerance)
        return float(found.largest), float(found.smallest), steps

    return run


def curvlinops(problem: Problem, steps: int, tolerance: float) -> Found:
    """Its operator, with ARPACK of scipy."""
    linalg: Any = importlib.import_module("scipy.sparse.linalg")
    data = [(problem.x, problem.y)]
    operator = (
        importlib.import_module("curvlinops")
        .HessianLinearOperator(problem.net, nn.CrossEntropyLoss(), problem.params, data, check_deterministic=False)
        .to_scipy()
    )
    counted = [0]

    def times(v: Any) -> Any:
        counted[0] += 1
        return operator @ v

    wrapped = linalg.LinearOperator(operator.shape, matvec=times, dtype=operator.dtype)
    start = np.random.default_rng(0).standard_normal(operator.shape[0])
    tolerance = tolerance if operator.shape[0] < 1000 else 1e-3  # it has no limit on products
    values = linalg.eigsh(wrapped, k=2, which="BE", ncv=20, tol=tolerance, v0=start, return_eigenvectors=False)
    return float(max(values)), float(min(values)), counted[0]


def eigenthings(method: Any) -> Callable[[Problem, int, float], Found]:
    def run(problem: Problem, steps: int, tolerance: float) -> Found:
        theirs: Any = importlib.import_module("hessian_eigenthings")
        data = [(problem.x, problem.y)]
        loss = theirs.supervised_loss(nn.CrossEntropyLoss())
        operator = theirs.HessianOperator(problem.net, data, loss, method=method)
        ends = [
            float(
                theirs.lanczos(operator, k=1, max_iter=steps, which=which, seed=0, reorthogonalize=True).eigenvalues[0]
            )
            for which in ("LA", "SA")
        ]
        return ends[0], ends[1], 2 * steps

    return run


def pyhessian(problem: Problem, steps: int, tolerance: float) -> Found:
    """Power iteration: the eigenvalue of largest absolute value."""
    theirs: Any = importlib.import_module("pyhessian")
    made = theirs.hessian(problem.net, nn.CrossEntropyLoss(), data=(problem.x, problem.y), cuda=False)
    values, _ = made.eigenvalues(maxIter=steps, tol=tolerance, top_n=1)
    return float(values[0]), None, steps


CONTENDERS: dict[str, Callable[[Problem, int, float], Found]] = {
    "lightning-optim": ours("autograd"),
    "lightning-optim, differences": ours("differences"),
    "curvlinops": curvlinops,
    "hessian-eigenthings": eigenthings("autograd"),
    "hessian-eigenthings, differences": eigenthings("finite_difference"),
    "PyHessian": pyhessian,
}


def installed(name: str) -> bool:
    package = PACKAGES.get(name.split(",")[0])
    try:
        return package is None or bool(__import__(package))
    except ImportError:
        return False


def resident(field: str) -> int:
    """Bytes of this process: now (VmRSS), or at most since the mark was reset (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, size: str, dtype: str, steps: int, tolerance: float) -> dict[str, Any]:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    run = CONTENDERS[name]
    run(Problem("small", getattr(torch, dtype)), 25, 1e-3)  # imports, and what torch makes once
    problem = Problem(size, getattr(torch, dtype))
    exact = problem.exact() if size == "small" else None
    problem.loss().backward()  # type: ignore[no-untyped-call]
    for p in problem.params:
        p.grad = None
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = resident("VmRSS"), time.process_time()
    largest, smallest, products = run(problem, steps, tolerance)
    seconds = time.process_time() - begun
    numel = sum(p.numel() for p in problem.params)
    found = {
        "products": products,
        "cpu_ms_per_product": 1e3 * seconds / products,
        "vectors": (resident("VmHWM") - before) / (numel * problem.x.element_size()),
        "parameters": numel,
    }
    if exact is not None:
        found["error_largest"] = abs(largest - exact[0]) / exact[0]
        found["error_smallest"] = None if smallest is None else abs(smallest - exact[1]) / exact[0]
    return found


CASES = [
    *[("small", dtype, 60, 1e-9) for dtype in ("float64", "float32")],
    *[("large", "float32", steps, 1e-12) for steps in (30, 90)],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=5, help="a single measurement: name, size, dtype, steps, tolerance")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.one:
        name, size, dtype, steps, tolerance = asked.one
        print(json.dumps(measure(name, size, dtype, int(steps), float(tolerance))))
        return
    names = [name for name in CONTENDERS if installed(name)]
    results = []
    for size, dtype, steps, tolerance in CASES:
        if size == "large" and steps > 30:
            names = [name for name in names if name not in ("PyHessian", "curvlinops")]  # no new basis vectors
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        for _ in range(asked.rounds if size == "large" and steps == 30 else 1):
            for name in names:
                one = [name, size, dtype, str(steps), str(tolerance)]
                said = subprocess.run(
                    [sys.executable, "-m", "benchmarks.curvature", "--one", *one], capture_output=True, text=True
                )
                if said.returncode:
                    print(f"{name}: {said.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                found[name].append(json.loads(said.stdout.splitlines()[-1]))
        for name, rows in found.items():
            if rows:
                medians = {
                    key: None if rows[0][key] is None else statistics.median(row[key] for row in rows)
                    for key in rows[0]
                }
                results.append({"name": name, "size": size, "dtype": dtype, "steps": steps, **medians})
                print(json.dumps(results[-1]), flush=True)
    if asked.out:
        asked.out.write_text(json.dumps({"machine": machine(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
