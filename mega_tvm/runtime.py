"""Loads compiled models; imports neither TVM's compiler nor torch.

>>> model = mega_tvm.load("model.so", num_threads=1)
>>> y = model(x)  # x [B, T, embed] float32 -> y [B, hidden]
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import tvm_ffi

from mega_tvm.artifact_format import open_artifact, pinned, read_library, read_manifest_from
from mega_tvm.entries import Entry
from mega_tvm.errors import IncompatibleArtifactError
from mega_tvm.host import check_cpu, check_version
from mega_tvm.inputs import positive
from mega_tvm.library_image import load_image
from mega_tvm.model import Model
from mega_tvm.permissions import warn_if_writable_by_all
from mega_tvm.runtime_library import runtime_library
from mega_tvm.tensor_memory import load_tensors
from mega_tvm.thread_pool import available_cpus

__all__ = ["Entry", "Model", "load"]


def load(
    path: str | os.PathLike[str],
    *,
    num_threads: int = 1,
    sha256: str | None = None,
    cuda_graph: bool = True,
) -> Model:
    """Load a compiled model.

    The file is opened once and checked whole before any code of it runs, and what runs is what was
    checked. It is not needed afterwards. A compiled model is code: load what you trust.

    Parameters
    ----------
    path : path-like
        A ``.so`` that `mega_tvm.compile_model` wrote.
    num_threads : int, default 1
        Threads that a call may use, the caller's included. More than the process has CPUs are
        not used, with a warning. With one, no thread is started.
    sha256 : str, optional
        Digest of the file, in hex, from a place that you trust: another file is refused before
        anything of it is used. Without it, a file that every user can write gives a warning.
    cuda_graph : bool, default True
        On a GPU, launch an entry's kernels as a CUDA graph, captured at its first call, and not one
        by one.

    Returns
    -------
    Model

    Raises
    ------
    NotAnArtifactError
        If there is no such file, or it is not a compiled model.
    DamagedArtifactError
        If its bytes are not what the compiler wrote.
    IncompatibleArtifactError
        If it is not for this CPU or GPU or these versions, or a runtime library is not found.
    UntrustedArtifactError
        If ``sha256`` is given, and is not the file's.
    """
    threads = _check_num_threads(num_threads)
    path = Path(os.path.abspath(path))
    name = str(path)
    with open_artifact(path) as opened:
        if sha256 is None:
            warn_if_writable_by_all(path, os.fstat(opened.fileno()), "pass its digest, sha256=...")
        file = opened if sha256 is None else pinned(opened, name, sha256)
        manifest = read_manifest_from(file, name)
        check_cpu(name, manifest)
        check_version(name, "apache-tvm-ffi", manifest["versions"]["tvm_ffi"], tvm_ffi.__version__)
        image = read_library(file, name, manifest)
        tensors = load_tensors(file, name, manifest)
    library = runtime_library(path.parent)
    if library.version is not None:
        check_version(name, "apache-tvm", manifest["versions"]["tvm"], library.version)
    device = None
    if manifest["target"]["kind"] == "cuda":
        from mega_tvm.cuda.device import Device

        device = Device(name, manifest["target"], library.path.parent)
    try:
        module = load_image(image)
    except Exception as error:  # the loader's, which are RuntimeError and others
        raise IncompatibleArtifactError(
            f"{name}: the library is whole, but cannot be loaded: {error}"
        ) from error
    if device is not None:
        from mega_tvm.cuda.model import CudaModel

        return CudaModel(path, manifest, module, tensors, library, threads, device, cuda_graph)
    return Model(path, manifest, module, tensors, library, threads)


def _check_num_threads(num_threads: int) -> int:
    num_threads = positive("num_threads", num_threads)
    cpus = available_cpus()
    if num_threads > cpus:
        warnings.warn(
            f"num_threads={num_threads}, but this process may use {cpus} CPUs: using {cpus}",
            RuntimeWarning,
            stacklevel=3,
        )
    return min(num_threads, cpus)
