"""Where NVIDIA's tools and libraries are. Needs no TVM, since running looks for them too."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
from pathlib import Path

DRIVER, CUDART = "libcuda.so.1", "libcudart.so.13"
RUNTIME = "libtvm_runtime_cuda.so"

_kept: list[ctypes.CDLL] = []


def find_tool(name: str) -> Path | None:
    """Return the path of one of NVIDIA's tools, or None.

    Looked for in this order: the variables ``CUDA_HOME`` and ``CUDA_PATH``, ``PATH``,
    ``/usr/local/cuda``, and NVIDIA's wheels in this Python environment.
    """
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if home := os.environ.get(variable):
            path = Path(home) / "bin" / name
            if os.access(path, os.X_OK):
                return path
    if found := shutil.which(name):
        return Path(found)
    folders = [Path("/usr/local/cuda/bin"), *(folder / "bin" for folder in wheel_folders())]
    return next((f / name for f in folders if os.access(f / name, os.X_OK)), None)


def wheel_folders() -> list[Path]:
    """Return where NVIDIA's wheels for CUDA 13 keep ``bin``, ``lib`` and ``include``."""
    spec = importlib.util.find_spec("nvidia")
    roots = spec.submodule_search_locations if spec is not None else None
    return [folder for root in roots or () if (folder := Path(root) / "cu13").is_dir()]


def load_shared(name: str) -> ctypes.CDLL | None:
    """Load the driver's or the CUDA runtime's library, and return it, or None where it is not.

    Looked for where the dynamic loader looks, in ``/usr/local/cuda``, and in NVIDIA's wheels.
    """
    folders = [Path("/usr/local/cuda/lib64"), Path("/usr/local/cuda/lib")]
    folders += [folder / "lib" for folder in wheel_folders()]
    for path in (Path(name), *(folder / name for folder in folders)):
        try:
            library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        _kept.append(library)
        return library
    return None
