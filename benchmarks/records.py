"""Records of a measurement: the machine, the versions of packages, and the commit of the code."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.pages import ROOT
from benchmarks.peers import PACKAGES

Record = dict[str, Any]


def machine() -> Record:
    """The processor, the threads in use, and versions."""
    return {
        "device": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "last_level_cache_bytes": last_level_cache(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": importlib.metadata.version("lightning"),
        "peers": _versions(),
    }


def commit() -> str:
    """The last commit that changed the package, with a plus where it has been changed since."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words, "--", "lightning_optim", "callbacks"], cwd=ROOT, capture_output=True)
        return done.stdout.decode().strip()

    return f"{git('log', '-1', '--format=%h')}{'+' if git('status', '--porcelain') else ''}" or "unknown"


def load(path: Path, about: Record) -> Record:
    """What was measured before; raises where that was elsewhere or with other versions."""
    if not path.exists():
        return {"about": about}
    found: Record = json.loads(path.read_text())
    if found["about"] != about:
        different = [key for key in about if found["about"].get(key) != about[key]]
        raise SystemExit(f"{path} was measured with another {', '.join(different)}; give another --out or move it away")
    return found


def save(path: Path, found: Record) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(found, indent=1) + "\n")
    temporary.replace(path)


def describe(about: Record) -> str:
    """Where it was measured, in one sentence."""
    words = [f"{about['device']}, {about['threads']} of {about['cores']} cores"]
    if about["last_level_cache_bytes"]:
        words.append(f"last-level cache {about['last_level_cache_bytes'] / 2**20:.0f} MiB")
    words += [f"torch {about['torch']}", f"Python {about['python']}", f"lightning {about['lightning']}"]
    return ", ".join([*words, *(f"{name} {version}" for name, version in about["peers"].items())]) + "."


def _versions() -> dict[str, str]:
    found = {}
    for name in (*PACKAGES.values(), "pytorch_optimizer"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def last_level_cache() -> int | None:
    """Bytes of the largest cache that a core sees, where the system says so."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        with contextlib.suppress(OSError, ValueError):
            text = file.read_text().strip()
            sizes.append(int(text.rstrip("KM")) * {"K": 2**10, "M": 2**20}.get(text[-1], 1))
    return max(sizes, default=None)
