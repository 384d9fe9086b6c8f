"""Writes a bundle: a compiled model with all that a host without pip needs to run it.

model.so, model.json         the compiled model, and its manifest for people
libtvm_runtime.so            TVM's runtime, and what it needs
libtvm_ffi.so
include/                     mega_tvm.h and its parts, and the headers of tvm-ffi and dlpack
example/                     main.cpp and CMakeLists.txt
licenses/
SHA256SUMS                   of every file, for `sha256sum --check`
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tvm_ffi.libinfo

from .artifact_format import read_manifest
from .errors import CompileError
from .runtime_library import LIBRARY, installed_runtime

MODEL = "model.so"
SUMS = "SHA256SUMS"
_SOURCES = Path(__file__).parent / "cpp"
_HEADERS = ("dlpack/*.h", "tvm/**/*.h")
_DISTRIBUTIONS = ("mega-tvm", "apache-tvm", "apache-tvm-ffi")


def check_bundle_destination(directory: Path) -> None:
    """Refuse a directory that no bundle can be written to.

    Raises
    ------
    CompileError
    """
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise CompileError(f"{directory}: is no directory; give another name")
    if directory.is_dir() and any(directory.iterdir()):
        raise CompileError(
            f"{directory}: is not empty; a bundle is written whole, into a new directory: "
            "remove this one, or give another name"
        )
    parent = directory.absolute().parent
    if not parent.is_dir():
        raise CompileError(f"{directory}: there is no directory {parent}; create it first")


def check_bundle_target(target: str) -> None:
    """Refuse a target whose code a bundle does not hold what it needs for.

    Raises
    ------
    CompileError
    """
    if target.startswith("cuda"):
        raise CompileError(
            f"target {target}: bundles hold what runs on CPUs; write the library with -o, and see "
            "the README on what a machine with a GPU needs"
        )


def write_bundle(library: Path, directory: str | os.PathLike[str]) -> Path:
    """Write a compiled model with all that runs it into a directory, which appears whole.

    Parameters
    ----------
    library : Path
        A ``.so`` that `mega_tvm.compile_model` wrote.
    directory : path-like
        New, or empty.

    Returns
    -------
    Path
        The absolute path of the directory.

    Raises
    ------
    CompileError
        If the directory is not new, something cannot be read or written, or the library is for a
        GPU.
    ArtifactError
        If the library is not a compiled model.
    """
    directory = Path(os.path.abspath(directory))
    check_bundle_destination(directory)
    target = read_manifest(library)["target"]
    if target["kind"] != "llvm":
        raise CompileError(
            f"{library}: bundles hold what runs on CPUs; this library is for {target['name']}"
        )
    try:
        with tempfile.TemporaryDirectory(prefix=".mega_tvm-", dir=directory.parent) as aside:
            whole = Path(aside) / "bundle"
            whole.mkdir()
            for source, target in _files(library):
                copied = whole / target
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(source, copied)
            (whole / SUMS).write_text(_sums(whole), encoding="utf-8")
            os.rename(whole, directory)  # also onto an empty directory
    except OSError as error:
        raise CompileError(f"{directory}: cannot be written: {error}") from error
    return directory


def _files(library: Path) -> Iterator[tuple[Path, str]]:
    """Yield what a bundle holds: a file, and its path in the bundle."""
    yield library, MODEL
    manifest = library.with_suffix(".json")
    if manifest.is_file():
        yield manifest, "model.json"
    yield _runtime(), LIBRARY
    yield Path(tvm_ffi.libinfo.find_libtvm_ffi()), "libtvm_ffi.so"
    for header in sorted((_SOURCES / "include").rglob("*.h")):
        yield header, str(header.relative_to(_SOURCES))
    for folder in map(Path, tvm_ffi.libinfo.include_paths()):
        for pattern in _HEADERS:
            for header in sorted(folder.glob(pattern)):
                yield header, f"include/{header.relative_to(folder)}"
    for source in sorted((_SOURCES / "example").iterdir()):
        yield source, f"example/{source.name}"
    for name in _DISTRIBUTIONS:
        for path in importlib.metadata.distribution(name).files or ():
            if path.name.startswith(("LICENSE", "NOTICE")):
                parts = [p for p in path.parts if p != "licenses" and not p.endswith(".dist-info")]
                flat = "-".join(parts)
                yield Path(str(path.locate())), f"licenses/{name}/{flat}"


def _runtime() -> Path:
    installed = installed_runtime()
    if installed is None:
        raise CompileError("apache-tvm, whose runtime library a bundle holds, is not installed")
    return installed[0]


def _sums(directory: Path) -> str:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    lines = (
        f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.relative_to(directory)}\n"
        for file in files
    )
    return "".join(lines)
