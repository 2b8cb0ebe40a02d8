"""Check a wheel before it is released: its version, what it holds, and that it works where nothing else is installed.

    python tools/check_wheel.py dist --tag v1.2.0 --install

The first argument is a wheel, or a folder that holds exactly one. `--tag` compares the version with a tag of git;
`--install` makes a new environment, installs the wheel with what it depends on, and takes one step there.
"""

from __future__ import annotations

import argparse
import email
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path, PurePosixPath

PACKAGE = "lightning_optim"
REQUIRED = (
    "__init__.py",
    "callbacks/__init__.py",  # reached by a link, which a build may lose
    "cli.py",
    "engines/compiled/codes.h",  # no Python, and read at run time
    "optimizers/__init__.py",
    "py.typed",
)
SUFFIXES = (".h", ".py", ".typed")
FOREIGN = {"tests", "benchmarks", "examples", "docs", "tools", "__pycache__"}

STEP = f"""
import pathlib, sys
import torch
import {PACKAGE}, {PACKAGE}.callbacks, {PACKAGE}.cli

home = pathlib.Path({PACKAGE}.__file__).resolve()
assert home.is_relative_to(pathlib.Path(sys.prefix).resolve()), f"{{home}} is not the installed package"
model = torch.nn.Linear(2, 1)
before = model.weight.detach().clone()
optimizer = {PACKAGE}.create_optimizer({{"name": "adan", "lr": 1e-2}}, model)
model(torch.ones(1, 2)).sum().backward()
optimizer.step()
assert torch.isfinite(model.weight).all() and not torch.equal(model.weight, before), "the step changed nothing"
{PACKAGE}.callbacks.IterateAveraging("ema")
print(f"version {{{PACKAGE}.__version__}} takes a step with torch {{torch.__version__}}")
"""


def problems(wheel: Path, tag: str | None = None) -> list[str]:
    """What is wrong with the content of a wheel, one sentence each; empty where all is well."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if not name.endswith("/")]
        by_end = {
            end: [n for n in names if n.endswith(f".dist-info/{end}")] for end in ("METADATA", "entry_points.txt")
        }
        texts = {end: archive.read(found[0]).decode() if found else "" for end, found in by_end.items()}
    metadata = email.message_from_string(texts["METADATA"])
    version = metadata["Version"]
    found = [f"{PACKAGE}/{name} is missing." for name in REQUIRED if f"{PACKAGE}/{name}" not in names]
    for path in map(PurePosixPath, names):
        if path.parts[0] == f"{PACKAGE}-{version}.dist-info":
            continue
        if path.parts[0] != PACKAGE:
            found.append(f"{path} is outside of {PACKAGE}.")
        elif FOREIGN.intersection(path.parts) or path.suffix not in SUFFIXES:
            found.append(f"{path} does not belong there.")
    if metadata["Name"] != PACKAGE.replace("_", "-"):
        found.append(f"The name in its metadata is {metadata['Name']}.")
    if tag is not None and tag != f"v{version}":
        found.append(f"The tag is {tag}, and the version is {version}.")
    if f"{PACKAGE}.cli:main" not in texts.get("entry_points.txt", ""):
        found.append("It installs no command.")
    return found


def install_and_step(wheel: Path) -> None:
    """Install the wheel in an environment of its own, in a folder that is not the checkout, and take one step."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "environment")
        venv.create(place, with_pip=True)
        programs = place / ("Scripts" if sys.platform == "win32" else "bin")
        for command in (
            (programs / "python", "-m", "pip", "install", "--quiet", wheel.resolve()),
            (programs / "python", "-W", "ignore", "-c", STEP),
            (programs / PACKAGE.replace("_", "-"), "optimizers", "adan"),
        ):
            subprocess.run(command, check=True, cwd=folder)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a wheel before it is released.")
    parser.add_argument("wheel", type=Path, help="a wheel, or a folder that holds exactly one")
    parser.add_argument("--tag", help="the tag of this release, such as v1.2.0")
    parser.add_argument("--install", action="store_true", help="install it in a new environment and take a step")
    given = parser.parse_args(arguments)
    wheels = sorted(given.wheel.glob("*.whl")) if given.wheel.is_dir() else [given.wheel]
    if len(wheels) != 1:
        print(f"{given.wheel} holds {len(wheels)} wheels, not one.", file=sys.stderr)
        return 1
    if found := problems(wheels[0], given.tag):
        print(f"{wheels[0].name}:", *found, sep="\n  ", file=sys.stderr)
        return 1
    print(f"{wheels[0].name} holds what it must, and nothing else.")
    if given.install:
        install_and_step(wheels[0])
    return 0


if __name__ == "__main__":
    sys.exit(main())
