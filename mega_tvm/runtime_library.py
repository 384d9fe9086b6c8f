"""Finds and loads ``libtvm_runtime.so``."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
import threading
from pathlib import Path

from mega_tvm.errors import IncompatibleArtifactError
from mega_tvm.permissions import warn_if_writable_by_all
from mega_tvm.thread_pool import ThreadPools

LIBRARY = "libtvm_runtime.so"
VARIABLE = "MEGA_TVM_RUNTIME"


class RuntimeLibrary:
    """The loaded runtime library.

    Parameters
    ----------
    path : Path
    version : str or None
        TVM's version, where it is known.
    """

    def __init__(self, path: Path, version: str | None) -> None:
        self.path = path
        self.version = version
        try:
            ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise IncompatibleArtifactError(
                f"{path}: TVM's runtime library cannot be loaded: {error}"
            ) from error
        self.threads = ThreadPools(path)


_loaded: RuntimeLibrary | None = None
_lock = threading.Lock()
# Another thread may hold it when this one forks.
os.register_at_fork(
    before=lambda: _lock.acquire(),
    after_in_parent=lambda: _lock.release(),
    after_in_child=lambda: _lock.release(),
)


def runtime_library(beside: Path) -> RuntimeLibrary:
    """Return the process's runtime library, loaded at the first call.

    One that is loaded already, by ``import tvm`` for instance, is used as it is: a second copy
    would register every function twice. Else the order is the variable ``MEGA_TVM_RUNTIME`` (a
    file, or a directory that holds it), the artifact's directory, and an installed ``apache-tvm``.

    Parameters
    ----------
    beside : Path
        The artifact's directory.

    Raises
    ------
    IncompatibleArtifactError
        If none is found, or it cannot be used.
    """
    global _loaded
    with _lock:
        if _loaded is None:
            found = _mapped()
            if found is None:
                found = _find(beside)
                advice = f"set {VARIABLE} to another copy"
                warn_if_writable_by_all(found[0], os.stat(found[0]), advice)
            _loaded = RuntimeLibrary(*found)
        return _loaded


def _mapped() -> tuple[Path, str | None] | None:
    with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file:
            # address permissions offset device inode path
            fields = line.rstrip("\n").split(maxsplit=5)
            if len(fields) == 6 and os.path.basename(fields[5]) == LIBRARY:
                return Path(fields[5]), getattr(sys.modules.get("tvm"), "__version__", None)
    return None


def _find(beside: Path) -> tuple[Path, str | None]:
    if named := os.environ.get(VARIABLE):
        path = Path(os.path.abspath(named))
        if path.is_dir():
            path /= LIBRARY
        if not path.is_file():
            raise IncompatibleArtifactError(
                f"{VARIABLE} names {named!r}, where there is no {LIBRARY}"
            )
        return path, None
    if (beside / LIBRARY).is_file():
        return beside / LIBRARY, None
    if (installed := installed_runtime()) is not None:
        return installed
    raise IncompatibleArtifactError(
        f"TVM's runtime library, {LIBRARY}, is not found: {VARIABLE} is not set, there is none in "
        f"{beside}, and apache-tvm is not installed here; copy it from tvm/lib of the apache-tvm "
        f"0.27 wheel to the model's directory, or set {VARIABLE} to its path"
    )


def installed_runtime() -> tuple[Path, str] | None:
    """Return the runtime library of an installed ``apache-tvm``, and its version."""
    # Metadata, since `import tvm` takes seconds and loads the compiler.
    try:
        distribution = importlib.metadata.distribution("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return None
    path = Path(str(distribution.locate_file(f"tvm/lib/{LIBRARY}")))
    return (path, distribution.version) if path.is_file() else None
