"""Run tests with the lowest and the newest versions that pyproject.toml allows, and write down what came of it.

    python tools/versions.py                  # every setting: some gigabytes each, one at a time, and an hour or two
    python tools/versions.py newest lowest    # these

Each setting is a Python and versions of torch and Lightning, in an environment of its own, which is removed after its
tests. A Python that is not on this machine is left out and named. `tools/versions.json` is the result, of which `make
docs` writes docs/versions.md; `tests/project/test_versions.py` compares it with pyproject.toml, so that neither can be
changed without the other.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
RESULT = ROOT / "tools" / "versions.json"


class Setting(NamedTuple):
    """What is installed: "lowest" is the bound of pyproject.toml, "newest" what pip finds for this Python."""

    python: str
    torch: str
    lightning: str
    others: str


SETTINGS = {
    "lowest": Setting("3.10", "lowest", "lowest", "lowest"),
    "lowest Python": Setting("3.10", "newest", "newest", "newest"),
    "lowest torch": Setting("3.11", "lowest", "newest", "newest"),
    "lowest Lightning": Setting("3.12", "newest", "lowest", "newest"),
    "newest": Setting("3.13", "newest", "newest", "newest"),
}

# What is not declared as a dependency, but decides whether what is declared works: torch 2.6 came with numpy 1.
NUMPY = {"lowest": "numpy==1.26.0", "newest": "numpy"}
TOOLS = ["expecttest", "hypothesis", "pytest", "pytest-timeout", "pytest-xdist", "scipy", "tensorboard", "scikit-learn"]
TOOLS += ["adabelief-pytorch==0.2.1", "lion-pytorch==0.2.5", "torch-optimizer==0.3.0", "pytorch_optimizer==4.1.0"]
TOOLS += ["matplotlib", "setuptools<81"]

# What meets torch and Lightning most: commands, configs, hooks, strategies and ranks, files.
TESTS = ["tests/config/test_cli.py", "tests/config/test_recipes.py", "tests/commands/test_project.py", "tests/nn"]
TESTS += [f"tests/callbacks/test_{name}.py" for name in ("iterate_averaging", "checkpoint_integrity")]
TESTS += [f"tests/checkpoints/test_{name}.py" for name in ("damage", "safety")]
# With torch 2.6:
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


def requirements(setting: Setting, bounds: dict[str, str]) -> list[str]:
    """What pip is told to install.

    Example:
        >>> setting = Setting("3.11", torch="lowest", lightning="newest", others="newest")
        >>> requirements(setting, {"torch": "2.6", "lightning": "2.5", "rich": "13"})
        ['torch==2.6', 'lightning', 'rich', 'numpy']
    """
    which = {"torch": setting.torch, "lightning": setting.lightning}
    names = [name + f"=={low}" * (which.get(name, setting.others) == "lowest") for name, low in bounds.items()]
    return [*names, NUMPY[setting.others]]


def find_python(version: str) -> str | None:
    """A Python of this version: one that pyenv has, or one on the path. (What pyenv puts on the path may not run.)"""
    pyenv = sorted(Path("~/.pyenv/versions").expanduser().glob(f"{version}.*/bin/python"))
    return f"{pyenv[-1]}" if pyenv else shutil.which(f"python{version}")


def run(setting: Setting, python: str, environment: Path, workers: str) -> dict[str, Any]:
    """Make the environment, unless it is there, run the tests in it, and count."""
    bounds = lowest((ROOT / "pyproject.toml").read_text())
    there = f"{environment / 'bin' / 'python'}"
    # No constraints of the machine, of whoever set them: versions are those of the setting.
    variables = {**os.environ, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1", "PIP_CONSTRAINT": os.devnull}
    install = [there, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    if not environment.exists():
        subprocess.run([python, "-m", "venv", environment], check=True)
        subprocess.run([*install, *requirements(setting, bounds), *TOOLS], check=True, env=variables)
    subprocess.run([*install, "--no-deps", "--editable", ROOT], check=True, env=variables)
    report = environment / "report.xml"
    left_out = LEFT_OUT if setting.torch == "lowest" else {}
    select = ["-m", "not full and not engines and not gpu"]
    select += ["-k", " and ".join(f"not {word}" for word in left_out)] if left_out else []
    # Warnings of others about others are not errors here: old versions have many.
    options = ["-o", "filterwarnings=default", "-p", "no:cacheprovider", "-q", "-n", workers, "-rf"]
    options += ["--disable-warnings", f"--junitxml={report}"]
    subprocess.run([there, "-m", "pytest", *options, *select, *TESTS], cwd=ROOT, env=variables, check=False)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    counts = {key: int(suite.attrib[key]) for key in ("tests", "failures", "errors", "skipped")}
    names = ["torch", "lightning", "numpy", "jsonargparse", "rich", "torchmetrics", "typing_extensions"]
    ask = "import json, platform, importlib.metadata as m; "
    ask += f"print(json.dumps({{'python': platform.python_version(), **{{n: m.version(n) for n in {names}}}}}))"
    return {
        "installed": json.loads(subprocess.check_output([there, "-c", ask], text=True)),
        "left out": left_out,
        "passed": counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"],
        "failed": counts["failures"] + counts["errors"],
        "skipped": counts["skipped"],
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Run tests with the lowest and newest versions that are allowed.")
    parser.add_argument("settings", nargs="*", help=f"{', '.join(SETTINGS)}; all by default")
    parser.add_argument("--environments", type=Path, help="a folder in which to leave environments, or find them")
    parser.add_argument("--workers", default="2", help="processes of pytest")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.settings if name not in SETTINGS]:
        parser.error(f"there is no setting {unknown[0]!r}. Settings are {', '.join(SETTINGS)}.")
    failed = False
    for name in given.settings or SETTINGS:
        setting = SETTINGS[name]
        if (python := find_python(setting.python)) is None:
            print(f"{name}: there is no Python {setting.python} here, so nothing was run.", file=sys.stderr)
            failed = True
            continue
        with tempfile.TemporaryDirectory() as temporary:
            found = run(
                setting, python, (given.environments or Path(temporary)) / name.replace(" ", "_"), given.workers
            )
        write(name, found)
        print(json.dumps({name: found}, indent=2), flush=True)
        failed |= found["failed"] > 0
    return int(failed)


def write(name: str, found: dict[str, Any]) -> None:
    """Put the result of one setting into the file, beside those of the others."""
    kept = json.loads(RESULT.read_text())["settings"] if RESULT.exists() else {}
    results = {**kept, name: found}
    declared = lowest((ROOT / "pyproject.toml").read_text())
    ordered = {name: results[name] for name in SETTINGS if name in results}
    RESULT.write_text(json.dumps({"declared": declared, "tests": TESTS, "settings": ordered}, indent=2) + "\n")


def page() -> str:
    """docs/versions.md."""
    found = json.loads(RESULT.read_text())
    lines = [
        "# Versions",
        "",
        "`make versions` installs each of these settings in an environment of its own, and runs the tests that meet",
        "torch and Lightning most. `make docs` writes this page. `make test` runs all tests with the versions in",
        "[constraints.txt](../constraints.txt).",
        "",
        "| setting | Python | torch | Lightning | jsonargparse | numpy | tests passed | failed | skipped |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, run in found["settings"].items():
        versions = [run["installed"][key] for key in ("python", "torch", "lightning", "jsonargparse", "numpy")]
        cells = [name, *(version.split("+")[0] for version in versions)]
        lines.append(f"| {' | '.join([*cells, *(str(run[key]) for key in ('passed', 'failed', 'skipped'))])} |")
    if missing := [f"{name} (Python {SETTINGS[name].python})" for name in SETTINGS if name not in found["settings"]]:
        lines += ["", f"Not run yet: {', '.join(missing)}."]
    lines += ["", "With torch 2.6 two kinds of tests are left out:", ""]
    lines += [f"- `{word}`: {reason}." for word, reason in LEFT_OUT.items()]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
