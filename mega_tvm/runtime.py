"""Loads and runs compiled models; imports neither TVM's compiler nor torch.

>>> model = mega_tvm.load("model.so", num_threads=1)
>>> y = model(x)  # x [B, T, embed] float32 -> y [B, hidden]
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.artifact_format import check_library, open_artifact, read_manifest_from
from mega_tvm.errors import DamagedArtifactError, IncompatibleArtifactError, InputError
from mega_tvm.inputs import (
    CPU,
    aligned_empty,
    as_array,
    dtype_message,
    is_aligned,
    non_finite,
)
from mega_tvm.manifest_schema import ALIGNMENT
from mega_tvm.runtime_library import (
    RuntimeLibrary,
    available_cpus,
    load_module,
    runtime_library,
)
from mega_tvm.tensor_memory import load_tensors

_POOLED = 2  # VirtualMachine's allocator kinds: naive 1, pooled 2
_SHAPES_IN_MESSAGES = 8


@dataclass(frozen=True)
class Entry:
    """One shape that a model was compiled for.

    Parameters
    ----------
    name : str
        The function in the library.
    input_shape, output_shape : tuple of int
        ``[B, T, embed]`` and ``[B, hidden]``, both float32.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


class Model:
    """A loaded model. Make one with `load`.

    A model may be called from several threads at once: each has a virtual machine and an input
    buffer of its own (16 us and one input's size), and all share the tensors.

    Parameters
    ----------
    path : Path
    manifest : dict
    load_executable : callable
        Makes a virtual machine of the library, and keeps it loaded.
    tensors : tvm_ffi.Array
    library : RuntimeLibrary
    num_threads : int
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        load_executable: Callable[[], Any],
        tensors: tvm_ffi.Array,
        library: RuntimeLibrary,
        num_threads: int,
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._load_executable = load_executable
        self._tensors = tensors
        self._more_arguments = (tensors,) if len(tensors) else ()
        self._library = library
        self._num_threads = num_threads
        self._local = threading.local()
        self._entries = tuple(
            Entry(e["name"], tuple(e["input"]["shape"]), tuple(e["output"]["shape"]))
            for e in manifest["entries"]
        )
        self._by_shape = {entry.input_shape: entry for entry in self._entries}
        self._functions()  # so that what the library lacks is told when it is loaded

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest that the compiler wrote into the file."""
        return self._manifest

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The shapes that the model was compiled for."""
        return self._entries

    @property
    def num_threads(self) -> int:
        """How many threads a call uses, the caller's included."""
        return self._num_threads

    @property
    def tensors(self) -> tvm_ffi.Array:
        """What entry functions take as their second argument; if it is empty, they take none."""
        return self._tensors

    def __repr__(self) -> str:
        shapes = ", ".join(str(list(entry.input_shape)) for entry in self._entries)
        return f"<mega_tvm.Model {str(self._path)!r}: {shapes}, num_threads={self._num_threads}>"

    def __call__(self, x: Any, *, check_finite: bool = False) -> npt.NDArray[np.float32]:
        """Run the model.

        Parameters
        ----------
        x : array
            float32, of one of the shapes in `entries`: a NumPy array, or anything on the CPU that
            exports DLPack. It is read in place if it is C-contiguous, writable and aligned to 64
            bytes, and copied otherwise.
        check_finite : bool, default False
            Refuse NaN and infinity, which propagate to the output otherwise.

        Returns
        -------
        ndarray
            float32, with memory of its own.

        Raises
        ------
        InputError
            If ``x`` has another shape or dtype, or is not an array on the CPU.
        """
        array = as_array(x)
        entry = self._by_shape.get(array.shape)
        if entry is None:
            raise InputError(self._shape_message(array.shape))
        if array.dtype != np.float32:  # '>f4' differs too
            raise InputError(dtype_message(array.dtype))
        if check_finite and not np.isfinite(array).all():
            raise InputError(f"expected finite values, found {non_finite(array)}")
        flags = array.flags
        if not (flags.c_contiguous and flags.writeable and is_aligned(array)):
            buffer = self._buffer(entry)
            np.copyto(buffer, array)
            array = buffer
        output = np.from_dlpack(self.invoke(self._functions()[entry.name], array))
        if output.shape != entry.output_shape or output.dtype != np.float32:
            raise DamagedArtifactError(
                f"{self._path}: {entry.name} returned {output.dtype} {list(output.shape)}; its "
                f"manifest says float32 {list(entry.output_shape)}"
            )
        # A copy: the library may return its input, one of the tensors, or memory of its pool.
        return np.array(output, dtype=np.float32)

    def warmup(self) -> None:
        """Run each entry once on zeros, so that the first real call finds code and pages ready."""
        for entry in self._entries:
            self(np.zeros(entry.input_shape, np.float32))

    def new_machine(self) -> Any:
        """Return a new virtual machine, whose functions have the entries' names.

        It is for one thread at a time. `Model` has others for its own calls, so this one may be
        instrumented (``machine["set_instrument"]``) without a trace in them.
        """
        machine = self._load_executable()
        machine["vm_initialization"](CPU, 0, _POOLED)
        return machine

    def invoke(self, function: Any, x: npt.NDArray[np.float32]) -> Any:
        """Call a machine's function as a call of the model does.

        Parameters
        ----------
        function : tvm_ffi.Function
            An entry of `new_machine`.
        x : ndarray
            float32, of the entry's shape, C-contiguous, writable and aligned to 64 bytes.

        Returns
        -------
        tvm_ffi.Tensor
            Memory of the machine's pool.
        """
        self._library.use_threads(self._num_threads)
        return function(tvm_ffi.from_dlpack(x, require_alignment=ALIGNMENT), *self._more_arguments)

    def _functions(self) -> dict[str, Any]:
        """Return the calling thread's functions by name."""
        functions: dict[str, Any] | None = getattr(self._local, "functions", None)
        if functions is None:
            # A virtual machine holds the registers of a running call: one for each thread.
            machine = self.new_machine()
            functions = {}
            for entry in self._entries:
                try:
                    functions[entry.name] = machine[entry.name]
                except AttributeError as error:
                    raise DamagedArtifactError(
                        f"{self._path}: the manifest names an entry {entry.name!r}, which the "
                        "library does not hold; compile the model again"
                    ) from error
            self._local.functions = functions
            self._local.buffers = {}
        return functions

    def _buffer(self, entry: Entry) -> npt.NDArray[np.float32]:
        """Return the calling thread's aligned buffer for an entry's input."""
        self._functions()
        buffers: dict[tuple[int, ...], npt.NDArray[np.float32]] = self._local.buffers
        if entry.input_shape not in buffers:
            buffers[entry.input_shape] = aligned_empty(entry.input_shape)
        return buffers[entry.input_shape]

    def _shape_message(self, found: tuple[int, ...]) -> str:
        shapes = [str(list(shape)) for shape in self._by_shape]
        if len(shapes) > _SHAPES_IN_MESSAGES:
            shapes[_SHAPES_IN_MESSAGES:] = [f"{len(shapes) - _SHAPES_IN_MESSAGES} more"]
        return (
            f"expected an array of shape {' or '.join(shapes)}, found {list(found)}; reshape it, "
            "or compile the model for this batch and length"
        )


def load(path: str | os.PathLike[str], *, num_threads: int = 1) -> Model:
    """Load a compiled model.

    The file is checked whole before any code of it runs.

    Parameters
    ----------
    path : path-like
        A ``.so`` that `mega_tvm.compile_model` wrote.
    num_threads : int, default 1
        Threads that a call may use, the caller's included. More than the process has CPUs are
        not used, with a warning. With one, no thread is started.

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
        If it is not for this CPU or these versions, or TVM's runtime library is not found.
    """
    threads = _check_num_threads(num_threads)
    path = Path(os.path.abspath(path))
    name = str(path)
    with open_artifact(path) as file:
        manifest = read_manifest_from(file, name)
        _check_cpu(name, manifest)
        _check_version(name, "apache-tvm-ffi", manifest["versions"]["tvm_ffi"], tvm_ffi.__version__)
        check_library(file, name, manifest)
        tensors = load_tensors(file, name, manifest)
        library = runtime_library(path.parent)
        if library.version is not None:
            _check_version(name, "apache-tvm", manifest["versions"]["tvm"], library.version)
        try:
            module = load_module(path)
            load_executable = module["vm_load_executable"]
        except Exception as error:  # the loader's, which are RuntimeError and others
            raise IncompatibleArtifactError(
                f"{name}: the library is whole, but TVM cannot load it: {error}"
            ) from error
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise DamagedArtifactError(f"{name}: was replaced while it was loaded; load it again")
    return Model(path, manifest, load_executable, tensors, library, threads)


def _check_num_threads(num_threads: int) -> int:
    if isinstance(num_threads, bool) or not isinstance(num_threads, int) or num_threads < 1:
        raise ValueError(f"num_threads must be a positive integer, found {num_threads!r}")
    cpus = available_cpus()
    if num_threads > cpus:
        warnings.warn(
            f"num_threads={num_threads}, but this process may use {cpus} CPUs: using {cpus}",
            RuntimeWarning,
            stacklevel=3,
        )
    return min(num_threads, cpus)


def _check_cpu(name: str, manifest: dict[str, Any]) -> None:
    if platform.machine() not in ("x86_64", "AMD64"):
        raise IncompatibleArtifactError(
            f"{name}: expected an x86-64 CPU, found {platform.machine()}; "
            "compile the model for this machine"
        )
    needed = manifest["target"]["cpu_features"]
    found = _cpu_flags()
    if missing := [feature for feature in needed if feature not in found]:
        raise IncompatibleArtifactError(
            f"{name}: compiled for {manifest['target']['name']}, but this CPU lacks "
            f"{', '.join(missing)}; compile the model for this machine (--target native there), "
            "or for a target that has less"
        )
    if "amx_tile" in needed:
        _request_amx(name)


def _cpu_flags() -> set[str]:
    with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        for line in file:
            if line.startswith("flags"):
                return set(line.partition(":")[2].split())
    return set()


def _request_amx(name: str) -> None:
    # arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), for the whole process.
    arguments = (ctypes.c_long(number) for number in (158, 0x1023, 18))
    if ctypes.CDLL(None, use_errno=True).syscall(*arguments) != 0:
        raise IncompatibleArtifactError(
            f"{name}: uses AMX tiles, which this kernel does not grant "
            f"({os.strerror(ctypes.get_errno())}); Linux 5.16 or newer is needed"
        )


def _check_version(name: str, package: str, expected: str, found: str) -> None:
    # Releases that differ in their first two numbers may differ in their binary interface.
    if expected.split(".")[:2] != found.split(".")[:2]:
        raise IncompatibleArtifactError(
            f"{name}: compiled with {package} {expected}, found {found}; "
            f"install {package}=={expected}, or compile the model again"
        )
