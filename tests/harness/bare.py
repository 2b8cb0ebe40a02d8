"""Python without some of the installed packages: their files and metadata are not on its path."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_without(packages: set[str], folder: Path, script: str) -> str:
    """What a script prints in a process that has this project and every installed distribution but some.

    Args:
        packages: The names of distributions, in lower case, and with `-`.
        folder: Where to build its path, of links, and where the script runs.
        script: Python.
    """
    site = folder / "site"
    site.mkdir()
    hidden = {"__pycache__"}
    for found in distributions():
        if re.sub("[-_.]+", "-", found.name).lower() in packages:
            hidden |= {file.parts[0] for file in found.files or ()}
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if entry.name not in hidden and entry.suffix != ".pth":
                (site / entry.name).symlink_to(entry)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(ROOT), str(site)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-S", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
