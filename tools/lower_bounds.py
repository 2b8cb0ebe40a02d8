"""Run tests with the lowest versions that pyproject.toml allows, and write down what came of it.

    python tools/lower_bounds.py --python python3.10

makes an environment with exactly these versions, a few gigabytes on Linux, and takes some minutes. Tools of the tests
are the newest. `tools/lower_bounds.json` is its result; `tests/project/test_lower_bounds.py` compares it with the
bounds, so that neither can be changed without the other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "tools" / "lower_bounds.json"

# What is not declared as a dependency, but decides whether what is declared works.
BESIDE = ["numpy==1.26.0"]
TOOLS = ["expecttest", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "scipy", "tensorboard", "scikit-learn"]
TOOLS += ["adabelief-pytorch==0.2.1", "lion-pytorch==0.2.5", "torch-optimizer==0.3.0", "pytorch_optimizer==4.1.0"]
TOOLS += ["matplotlib", "setuptools<81"]

TESTS = ["tests/config/test_cli.py", "tests/config/test_recipes.py", "tests/nn"]
TESTS += [f"tests/callbacks/test_{name}.py" for name in ("iterate_averaging", "checkpoint_integrity")]
TESTS += [f"tests/checkpoints/test_{name}.py" for name in ("damage", "safety")]
# What is compared with torch, or needs it, and torch 2.6 does not have.
LEFT_OUT = {
    "fsdp2": "torch 2.6 runs FSDP2 on GPUs alone, and these tests run on CPUs",
    "triton": "the interpreter of Triton 3.2, in which these tests run kernels, lacks what later ones have",
}


def lowest(pyproject: str) -> dict[str, str]:
    """The declared dependencies and the lowest version of each.

    Example:
        >>> lowest('dependencies = [\\n    "jsonargparse[signatures]>=4.39",\\n    "torch>=2.6",\\n]\\n')
        {'jsonargparse[signatures]': '4.39', 'torch': '2.6'}
    """
    (declared,) = re.findall(r"^dependencies = \[\n(.*?)^\]", pyproject, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r'"([\w.\[\]-]+)>=([\w.]+)', declared))


def run(python: str, environment: Path, workers: str) -> dict[str, Any]:
    """Make the environment, run the tests in it, and count."""
    bounds = lowest((ROOT / "pyproject.toml").read_text())
    made = environment.exists()
    if not made:
        subprocess.run([python, "-m", "venv", environment], check=True)
    there = f"{environment / 'bin' / 'python'}"
    exact = [f"{name}=={version}" for name, version in bounds.items()]
    install = [there, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1", "PIP_CONSTRAINT": ""}
    if not made:
        subprocess.run([*install, *exact, *BESIDE, *TOOLS], check=True, env=variables)
    report = environment / "report.xml"
    select = ["-m", "not full and not engines and not gpu", "-k", " and ".join(f"not {word}" for word in LEFT_OUT)]
    # Warnings of others about others are not errors here: old versions have many.
    options = [
        "-o",
        "filterwarnings=default",
        "-p",
        "no:cacheprovider",
        "-q",
        "-n",
        workers,
        f"--junitxml={report}",
        "-rf",
    ]
    subprocess.run([there, "-m", "pytest", *options, *select, *TESTS], cwd=ROOT, env=variables, check=False)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    names = ["torch", "lightning", "numpy", "jsonargparse", "rich", "torchmetrics", "typing_extensions"]
    ask = f"import json, sys, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {names}}}))"
    versions = json.loads(subprocess.check_output([there, "-c", ask], text=True))
    version = subprocess.check_output([there, "-c", "import platform; print(platform.python_version())"], text=True)
    return {
        "declared": bounds,
        "installed": {"python": version.strip(), **versions},
        "tests": TESTS,
        "left out": LEFT_OUT,
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Run tests with the lowest versions that pyproject.toml allows.")
    parser.add_argument("--python", default=sys.executable, help="the oldest Python that is supported")
    parser.add_argument("--environment", type=Path, help="where to make the environment and leave it, or one to use")
    parser.add_argument("--workers", default="2", help="processes of pytest")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = run(given.python, given.environment or Path(temporary) / "environment", given.workers)
    RESULT.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))
    return int(found["failed"] > 0)


if __name__ == "__main__":
    sys.exit(main())
