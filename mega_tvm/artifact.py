"""Writes a compiled model: all in one file, and its manifest beside it again.

The file's format is in `mega_tvm.artifact_format`. Both files are made in a temporary directory
inside the destination's, so that publishing them is two renames within one file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi

import mega_tvm
from mega_tvm.artifact_format import (
    FORMAT_VERSION,
    append_trailer,
    encode_manifest,
    library_digest,
)
from mega_tvm.errors import CompileError
from mega_tvm.manifest_schema import round_up, tensor_layout

# Symbols are bound when the library is loaded: a missing one is an error then, and not the end of
# the process at the first call.
_LINK_OPTIONS = ("-Wl,-z,now",)


class Exportable(Protocol):
    """What `write_artifact` needs of a ``tvm.relax.VMExecutable``."""

    def export_library(self, file_name: str, *, options: Sequence[str]) -> object:
        """Link the module into a shared library, with these options of the linker."""


def write_artifact(
    executable: Exportable,
    manifest: Mapping[str, Any],
    path: str | os.PathLike[str],
    tensors: Sequence[npt.NDArray[Any]] = (),
) -> Path:
    """Write a compiled model, and its manifest beside it.

    Both files appear whole or not at all. ``OUT.json`` is renamed first and ``OUT.so`` last: who
    waits for the library finds its JSON, and an interrupt between the two leaves a whole library
    (the former one, or none). The library's own manifest is the one that counts.

    Parameters
    ----------
    executable : tvm.relax.VMExecutable
        Its functions are the manifest's entries: ``(x, tensors)``, or ``(x)`` if there are none.
        It should have no constant tensors: TVM would print a line for each, here and when loading.
    manifest : mapping
        ``target``, ``dtype``, ``entries``, ``config``, ``weights``, ``kernels`` and ``parity``;
        ``format_version``, ``library``, ``tensors`` and ``versions`` are added here.
    path : path-like
        A name that ends in ``.so``, in an existing directory; a file there is replaced.
    tensors : sequence of array
        What the functions take as their second argument, a tuple.

    Returns
    -------
    Path
        The absolute path of the library.

    Raises
    ------
    CompileError
        If the path is unsuitable or cannot be written, or linking fails.
    ArtifactError
        If a field of the manifest is missing or of the wrong type, or a tensor is empty or of a
        type that the format lacks.
    """
    path = Path(os.path.abspath(path))
    check_destination(path)
    _check_linker()
    table = _describe(tensors)
    # What is wrong with the manifest is told before linking, with a library's fields made up.
    encode_manifest(_complete(manifest, "0" * 64, 1, table))
    aside_json = path.with_suffix(".json")
    with _sigterm_raises(), _directory_beside(path) as directory:
        library, sidecar = directory / "model.so", directory / "model.json"
        try:
            executable.export_library(str(library), options=_LINK_OPTIONS)
        except RuntimeError as error:
            raise CompileError(f"{path}: the library cannot be linked: {error}") from error
        try:
            with library.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                complete = _complete(manifest, library_digest(file, size), size, table)
            append_trailer(library, complete, _pieces(tensors))
            text = json.dumps(complete, ensure_ascii=False, allow_nan=False, indent=2)
            sidecar.write_text(text + "\n", encoding="utf-8")
            _publish(library, path, sidecar, aside_json)
        except OSError as error:
            raise CompileError(f"{path}: cannot be written: {error}") from error
    return path


def check_destination(path: Path) -> None:
    """Refuse a path that no library can be written to.

    Raises
    ------
    CompileError
    """
    if path.suffix != ".so":
        raise CompileError(f"{path}: expected a name that ends in .so, such as {path.name}.so")
    if not path.parent.is_dir():
        raise CompileError(f"{path}: there is no directory {path.parent}; create it first")
    for file in (path, path.with_suffix(".json")):
        if file.is_dir():
            raise CompileError(f"{file}: is a directory; give another name")


def _check_linker() -> None:
    from tvm.support import cc

    compiler = cc.get_cc()
    if compiler is None:
        raise CompileError(
            "linking needs a C++ compiler, and none is in PATH; install one "
            "(Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX to its path"
        )
    if shutil.which(compiler) is None:  # CXX or CC
        raise CompileError(
            f"linking needs a C++ compiler; CXX (or CC) names {compiler!r}, which is not an "
            "executable; set it to a compiler's path without options, or unset it"
        )


def _describe(tensors: Sequence[npt.NDArray[Any]]) -> dict[str, Any]:
    """Return the manifest's field about tensors, but for their offset in the file."""
    digest = hashlib.sha256()
    for piece in _pieces(tensors):
        digest.update(piece)
    starts, end = tensor_layout(tensor.nbytes for tensor in tensors)
    items = [
        {"offset": start, "shape": list(tensor.shape), "dtype": tensor.dtype.name}
        for start, tensor in zip(starts, tensors, strict=True)
    ]
    return {"bytes": end, "sha256": digest.hexdigest(), "items": items}


def _pieces(tensors: Sequence[npt.NDArray[Any]]) -> Iterator[memoryview]:
    """Yield the bytes of all tensors, with the zeros between."""
    starts, end = tensor_layout(tensor.nbytes for tensor in tensors)
    written = 0
    for start, tensor in zip(starts, tensors, strict=True):
        yield memoryview(bytes(start - written))
        native = np.asarray(tensor, tensor.dtype.newbyteorder("<"), order="C")
        yield native.reshape(-1).view(np.uint8).data
        written = start + tensor.nbytes
    assert written == end


def _complete(
    manifest: Mapping[str, Any], digest: str, size: int, tensors: Mapping[str, Any]
) -> dict[str, Any]:
    llvm = tvm.target.codegen.llvm_version_major(allow_none=True)
    return {
        **manifest,
        "format_version": FORMAT_VERSION,
        "library": {"sha256": digest, "bytes": size},
        "tensors": {"offset": round_up(size), **tensors},
        "versions": {
            "mega_tvm": mega_tvm.__version__,
            "tvm": tvm.__version__,
            "tvm_ffi": tvm_ffi.__version__,
            "llvm": None if llvm is None else str(llvm),
        },
    }


@contextlib.contextmanager
def _directory_beside(path: Path) -> Iterator[Path]:
    # A directory, not a file: a linker that outlives an interrupt finds nowhere left to write.
    try:
        directory = tempfile.TemporaryDirectory(
            prefix=".mega_tvm-", dir=path.parent, ignore_cleanup_errors=True
        )
    except OSError as error:
        raise CompileError(f"{path}: cannot be written: {error}") from error
    with directory:
        yield Path(directory.name)


def _publish(library: Path, path: Path, sidecar: Path, aside_json: Path) -> None:
    had_json = aside_json.exists()
    os.replace(sidecar, aside_json)
    try:
        os.replace(library, path)
    except BaseException:
        if not had_json:
            aside_json.unlink()
        raise


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Let SIGTERM unwind the stack, so that temporaries are removed, unless it is handled."""
    # Only the main thread may set handlers; one that the user set is theirs.
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    ):
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
