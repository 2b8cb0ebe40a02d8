"""What users install is what stands in git: sdist and wheel lose nothing and add nothing."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import lightning_optim

ROOT = Path(__file__).parents[2]
LINK = "lightning_optim/callbacks"  # the real folder is callbacks/

IMPORT_ALL = """
import importlib, importlib.metadata, pathlib, sys
site = pathlib.Path(sys.argv[1])
sys.path.insert(0, str(site))
files = [file.relative_to(site).with_suffix("") for file in site.glob("lightning_optim/**/*.py")]
for name in sorted(".".join(file.parts).removesuffix(".__init__") for file in files):
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to(site), f"{name} is not the wheel's: {module.__file__}"
    print(name)
[script] = importlib.metadata.Distribution.at(next(site.glob("*.dist-info"))).entry_points
assert script.name == "lightning-optim" and callable(script.load())
"""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sources() -> set[str]:
    """The modules of the working tree by their import path, tracked or about to be."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "--", "lightning_optim", "callbacks")
    files = {line for line in listed.splitlines() if line.endswith(".py") and (ROOT / line).exists()}
    return {file.replace("callbacks", LINK, 1) if file.startswith("callbacks/") else file for file in files}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel that was built from it."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> Path:
    [wheel] = built.glob("*.whl")
    return wheel


def test_callbacks_are_linked_not_copied() -> None:
    assert (ROOT / LINK).is_symlink()
    assert (ROOT / LINK).resolve() == ROOT / "callbacks"


def test_the_sdist_holds_the_callbacks_and_the_tests(built: Path, sources: set[str]) -> None:
    [sdist] = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {name for name in names if re.match(r"lightning_optim/.*\.py$", name)} == sources
    assert {"LICENSE", "README.md", "pyproject.toml", "tests/project/test_packaging.py"} <= names


def test_the_wheel_holds_exactly_the_modules_in_git(wheel: Path, sources: set[str]) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.endswith(".py")} == sources
    assert any(name.startswith(f"{LINK}/") for name in names)


def test_the_wheel_is_typed_and_adds_nothing_else_to_site_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    metadata = f"lightning_optim-{lightning_optim.__version__}.dist-info"
    assert "lightning_optim/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"lightning_optim", metadata}


def test_metadata(wheel: Path) -> None:
    [path] = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    metadata = email.message_from_bytes(zipfile.ZipFile(wheel).read(path))
    assert metadata["Name"] == "lightning-optim"
    assert metadata["Version"] == lightning_optim.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata.get_payload(), "the README is the description"


def test_every_module_of_the_wheel_imports(wheel: Path, sources: set[str], tmp_path: Path) -> None:
    """From a folder of its own, ahead of the checkout; torch and the like come from this environment."""
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        tmp_path,
        wheel,
    )
    imported = run(sys.executable, "-I", "-c", IMPORT_ALL, tmp_path).split()
    assert len(imported) == len(sources)
    assert "lightning_optim.callbacks" in imported


def test_the_changelog_is_about_this_version() -> None:
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] in {"Unreleased", lightning_optim.__version__}
