"""A driver for Triton that stands in for a Hopper GPU: kernels are compiled and cached, and never run."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.kernel_cache.entries import Entries

ARCHITECTURE = 90  # of the H100 and the H200


def stand_in() -> Entries:
    """Let launches of this process compile only, and let the Triton engine take parameters on the CPU.

    Call it once in a process, before its first launch. TRITON_INTERPRET must not be set.

    Returns:
        The entries of the cache that launches ask for from now on. It grows.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import compiler
    from triton.runtime import cache, driver

    entries = Entries()

    def key(src: Any, backend: Any, options: Any, env_vars: Any) -> str:
        found: str = cache.get_cache_key(src, backend, options, env_vars)
        entries.add_kernel(found, src, backend, options)
        return found

    compiler.get_cache_key = key
    properties = {"max_shared_mem": 232448, "max_num_regs": 65536, "multiprocessor_count": 132, "warpSize": 32}
    gpu: Any = SimpleNamespace(
        utils=SimpleNamespace(
            load_binary=lambda name, kernel, shared, device: (1, 1, 32, 0, 1024),
            get_device_properties=lambda device: properties,
        ),
        launcher_cls=_launchers(entries),
        get_current_device=lambda: 0,
        set_current_device=lambda device: None,
        get_current_stream=lambda device: 0,
        get_device_capability=lambda device=0: divmod(ARCHITECTURE, 10),
        get_current_target=lambda: GPUTarget("cuda", ARCHITECTURE, 32),
    )
    driver.set_active(gpu)
    _let_parameters_be_on_the_cpu()
    return entries


def _launchers(entries: Entries) -> Any:
    """What makes a launcher of a compiled kernel. Nothing is launched, but its C module is built.

    Versions of Triton differ in these modules. Those of 3.6 are built, and those of others are left out.
    """
    from triton.backends.nvidia import driver

    nvidia: Any = driver
    if not hasattr(nvidia, "compile_module_from_src"):
        return lambda src, metadata: lambda *args: None
    empty = _empty_libcuda()

    def module(src: str, name: str, **places: Any) -> Any:
        entries.add_module(*_built(src, name, **places))
        return Silent()

    vars(nvidia).update(library_dirs=lambda: [nvidia.libdevice_dir, empty])
    nvidia.compile_module_from_src = module
    nvidia.CudaUtils()
    return nvidia.CudaLauncher


class Silent:
    """A C module, none of whose functions does anything."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args: None


def _let_parameters_be_on_the_cpu() -> None:
    from lightning_optim.engines import triton as engine

    refusal = engine.refusal

    def without_place(*args: Any) -> str:
        why = refusal(*args)
        return "" if "is not on a GPU" in why else why

    engine.refusal = without_place


def _built(src: str, name: str, **places: Any) -> tuple[str, str]:
    """Build a C module and put it into the cache, as Triton does, but do not load it: what it needs is not here.

    Returns:
        The folder of the entry, and the name of the file.
    """
    import hashlib
    import sysconfig

    from triton.runtime import build, cache

    make: Any = build._build
    key = hashlib.sha256((src + build.platform_key()).encode()).hexdigest()
    manager = cache.get_cache_manager(key)
    file = f"{name}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if manager.get_file(file) is None:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, f"{name}.c")
            source.write_text(src)
            lists: list[Any] = [
                places.get(what) or [] for what in ("library_dirs", "include_dirs", "libraries", "ccflags")
            ]
            manager.put(Path(make(name, str(source), folder, *lists)).read_bytes(), file, binary=True)
    return cache._base32(key), file


def _empty_libcuda() -> str:
    """A folder with a libcuda.so.1 to link to."""
    folder = Path(tempfile.mkdtemp(prefix="empty_libcuda_"))
    command = ["gcc", "-shared", "-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1"), "-x", "c", "/dev/null"]
    subprocess.run(command, check=True)
    return str(folder)
