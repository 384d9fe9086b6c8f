"""Loads and runs compiled models; imports neither TVM's compiler nor torch.

>>> model = mega_tvm.load("model.so", num_threads=1)
>>> y = model(x)  # x [B, T, embed] float32 -> y [B, hidden]
"""

from __future__ import annotations

import ctypes
import functools
import math
import os
import platform
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.artifact_format import check_library, open_artifact, read_manifest_from
from mega_tvm.errors import (
    DamagedArtifactError,
    IncompatibleArtifactError,
    InputError,
    MegaError,
)
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
from mega_tvm.stream import Stream, make_stream
from mega_tvm.symbolic_entry import SymbolicEntry
from mega_tvm.tensor_memory import Tensors, load_tensors
from mega_tvm.window import Window, make_window

_POOLED = 2  # VirtualMachine's allocator kinds: naive 1, pooled 2
_SHAPES_IN_MESSAGES = 8


@dataclass(frozen=True)
class Entry:
    """One shape that a model runs.

    Parameters
    ----------
    name : str
        The function in the library.
    input_shape, output_shape : tuple of int
        ``[B, T, embed]`` and ``[B, hidden]``, both float32.
    workspace : int
        Bytes that a call needs for intermediates.
    symbolic : bool
        Whether the function serves other shapes too.
    """

    name: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    workspace: int
    symbolic: bool = False

    @property
    def label(self) -> str:
        """The name, and where that does not tell the shape, batch and length."""
        return f"{self.name} {list(self.input_shape[:2])}" if self.symbolic else self.name


def _workspace(size: int) -> Any:
    memory = aligned_empty((-(-size // 4),)).view(np.uint8)
    return tvm_ffi.from_dlpack(memory, require_alignment=ALIGNMENT)


class _Scratch:
    """One thread's memory for one entry: a workspace, and an input for arrays to copy into."""

    def __init__(self, entry: Entry) -> None:
        self.workspace = _workspace(entry.workspace)
        self._shape = entry.input_shape

    @functools.cached_property
    def x(self) -> npt.NDArray[np.float32]:
        """The input."""
        return aligned_empty(self._shape)


class _SymbolicScratch:
    """One thread's memory for all shapes of a symbolic entry.

    It only grows, by half at least, so that it is never more than half as large again as the
    largest shape that the thread has run needs.
    """

    def __init__(self) -> None:
        self._workspace_bytes = self._x_items = 0

    def fit(self, entry: Entry) -> _SymbolicScratch:
        """Make room for a shape."""
        if entry.workspace > self._workspace_bytes:
            self.workspace = None  # before its successor is there: only one at a time
            self._workspace_bytes = max(entry.workspace, self._workspace_bytes * 3 // 2)
            self.workspace = _workspace(self._workspace_bytes)
        self._shape = entry.input_shape
        return self

    @property
    def x(self) -> npt.NDArray[np.float32]:
        """An input."""
        items = math.prod(self._shape)
        if items > self._x_items:
            self._x_items = max(items, self._x_items * 3 // 2)
            self._x = aligned_empty((self._x_items,))
        return self._x[:items].reshape(self._shape)


class Model:
    """A loaded model. Make one with `load`.

    A model may be called from several threads at once: each has a workspace of its own, and all
    share the code and the tensors.

    Parameters
    ----------
    path : Path
    manifest : dict
    module : tvm_ffi.Module
        The loaded library.
    tensors : Tensors
    library : RuntimeLibrary
    num_threads : int
    """

    def __init__(
        self,
        path: Path,
        manifest: dict[str, Any],
        module: tvm_ffi.Module,
        tensors: Tensors,
        library: RuntimeLibrary,
        num_threads: int,
    ) -> None:
        self._path = path
        self._manifest = manifest
        self._module = module
        self._tensors = tensors
        self._library = library
        self._num_threads = num_threads
        self._local = threading.local()
        self._entries = tuple(
            Entry(
                e["name"], tuple(e["input"]["shape"]), tuple(e["output"]["shape"]), e["workspace"]
            )
            for e in manifest["entries"]
        )
        self._by_shape = {entry.input_shape: entry for entry in self._entries}
        symbolic = manifest.get("symbolic_entries", [])
        self._symbolic_entries = tuple(map(SymbolicEntry.of, symbolic))
        names = [entry.name for entry in (*self._entries, *self._symbolic_entries)]
        self._functions = {name: self._function(name) for name in names}

    @property
    def metadata(self) -> dict[str, Any]:
        """The manifest that the compiler wrote into the file."""
        return self._manifest

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The shapes that the model was compiled for."""
        return self._entries

    @property
    def symbolic_entries(self) -> tuple[SymbolicEntry, ...]:
        """What runs batches and lengths that no entry of `entries` has; may be empty."""
        return self._symbolic_entries

    def entry_at(self, shape: tuple[int, ...]) -> Entry:
        """Return what runs an input of some shape: an entry of it alone, else a symbolic one's.

        Raises
        ------
        InputError
            If none does; the message lists what there is.
        """
        entry = self._by_shape.get(shape)
        if entry is not None:
            return entry
        for symbolic in self._symbolic_entries:
            sizes = symbolic.sizes(shape)
            if sizes is not None:
                output, workspace = symbolic.output_at(sizes), symbolic.workspace_at(sizes)
                return Entry(symbolic.name, shape, output, workspace, symbolic=True)
        raise InputError(self._shape_message(shape))

    @property
    def num_threads(self) -> int:
        """How many threads a call uses, the caller's included."""
        return self._num_threads

    @property
    def tensors(self) -> tvm_ffi.Array:
        """The packed weights, views of one block of memory."""
        return self._tensors.views

    def __repr__(self) -> str:
        shapes = ", ".join(self._shapes())
        return f"<mega_tvm.Model {str(self._path)!r}: {shapes}, num_threads={self._num_threads}>"

    def __call__(self, x: Any, *, check_finite: bool = False) -> npt.NDArray[np.float32]:
        """Run the model.

        Parameters
        ----------
        x : array
            float32, of one of the shapes in `entries`, or within the limits of one of
            `symbolic_entries`: a NumPy array, or anything on the CPU that exports DLPack. It is
            read in place if it is C-contiguous, writable and aligned to 64 bytes, and copied
            otherwise.
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
        entry = self._by_shape.get(array.shape) or self.entry_at(array.shape)
        if array.dtype != np.float32:  # '>f4' differs too
            raise InputError(dtype_message(array.dtype))
        if check_finite and not np.isfinite(array).all():
            raise InputError(f"expected finite values, found {non_finite(array)}")
        flags = array.flags
        if not (flags.c_contiguous and flags.writeable and is_aligned(array)):
            buffer = self._scratch(entry).x
            np.copyto(buffer, array)
            array = buffer
        output = aligned_empty(entry.output_shape)
        self._library.use_threads(self._num_threads)
        arguments = (
            tvm_ffi.from_dlpack(array, require_alignment=ALIGNMENT),
            self._tensors.block,
            self._scratch(entry).workspace,
            tvm_ffi.from_dlpack(output, require_alignment=ALIGNMENT),
        )
        try:
            status = self._functions[entry.name](*arguments)
        except (TypeError, ValueError, RuntimeError) as error:  # the library's own checks
            raise DamagedArtifactError(
                f"{self._path}: the library does not take what its manifest says: {error}"
            ) from error
        if status != 0:
            raise MegaError(f"{self._path}: a kernel of {entry.name} failed: out of memory")
        return output

    def warmup(self) -> None:
        """Run each entry once on zeros, so that the first real call finds code and pages ready.

        A symbolic entry runs at its least shape.
        """
        least = (
            tuple(
                entry.limits[dim][0] if isinstance(dim, str) else dim for dim in entry.input_shape
            )
            for entry in self._symbolic_entries
        )
        for shape in (*self._by_shape, *least):
            self(np.zeros(shape, np.float32))

    def stream(
        self, batch: int = 1, *, max_len: int | None = None, on_full: str = "error"
    ) -> Stream:
        """Return a stream: the model fed frame by frame, its state kept. See `mega_tvm.stream`.

        Parameters
        ----------
        batch : int, default 1
            Rows that are fed together, each with a length of its own.
        max_len : int, optional
            Frames that a row may have; the longest compiled ``seq_len`` by default. It sets the
            memory: about ``batch * max_len * hidden * num_layers * 4`` bytes.
        on_full : {"error", "slide"}
            At ``max_len`` frames a step is an error, or attention sees the last ``max_len`` ones.

        Raises
        ------
        StreamUnsupportedError
            If the model cannot stream.
        """
        return make_stream(self, batch, max_len, on_full)

    def window(self, batch: int = 1, *, seq_len: int | None = None) -> Window:
        """Return a window: the model run on the last frames, at each frame. See `mega_tvm.window`.

        Parameters
        ----------
        batch : int, default 1
            Rows whose frames come together.
        seq_len : int, optional
            Frames of the window; those of the first compiled shape by default.

        Raises
        ------
        InputError
            If the model does not run that shape.
        """
        return make_window(self, batch, seq_len)

    def new_machine(self) -> Any:
        """Return a Relax virtual machine that computes the same, kernel by kernel.

        Its functions have the entries' names. It is for one thread at a time, and for tracing
        (``machine["set_instrument"]``): calls of the model do without one.
        """
        machine = self._module["vm_load_executable"]()
        machine["vm_initialization"](CPU, 0, _POOLED)
        return machine

    def invoke(self, function: Any, x: npt.NDArray[np.float32]) -> Any:
        """Call a machine's function on as many threads as a call of the model.

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
        tensors = (self.tensors,) if len(self.tensors) else ()
        return function(tvm_ffi.from_dlpack(x, require_alignment=ALIGNMENT), *tensors)

    def _function(self, name: str) -> Any:
        try:
            return self._module.get_function(f"{name}__run", query_imports=True)
        except AttributeError as error:
            raise DamagedArtifactError(
                f"{self._path}: the manifest names an entry {name!r}, which the library "
                "does not hold; compile the model again"
            ) from error

    def _scratch(self, entry: Entry) -> _Scratch | _SymbolicScratch:
        """Return the calling thread's memory for an entry.

        Raises
        ------
        MegaError
            If there is not enough.
        """
        scratches: dict[str, _Scratch | _SymbolicScratch] | None
        scratches = getattr(self._local, "scratches", None)
        if scratches is None:
            scratches = self._local.scratches = {}
        scratch = scratches.get(entry.name)
        try:
            if scratch is None:
                scratch = _SymbolicScratch() if entry.symbolic else _Scratch(entry)
                scratches[entry.name] = scratch
            if entry.symbolic:
                scratch.fit(entry)
        except MemoryError as error:
            scratches.pop(entry.name, None)
            raise MegaError(
                f"an input of shape {list(entry.input_shape)} needs {entry.workspace:,} bytes of "
                "workspace, which this process cannot have; split the batch"
            ) from error
        return scratch

    def _shape_message(self, found: tuple[int, ...]) -> str:
        return (
            f"expected an array of shape {' or '.join(self._shapes())}, found {list(found)}; "
            "reshape it, or compile the model for this batch and length"
        )

    def _shapes(self) -> list[str]:
        """Return what shapes run, for people."""
        shapes = [str(list(shape)) for shape in self._by_shape]
        if len(shapes) > _SHAPES_IN_MESSAGES:
            shapes[_SHAPES_IN_MESSAGES:] = [f"{len(shapes) - _SHAPES_IN_MESSAGES} more"]
        return shapes + [str(entry) for entry in self._symbolic_entries]


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
        except Exception as error:  # the loader's, which are RuntimeError and others
            raise IncompatibleArtifactError(
                f"{name}: the library is whole, but TVM cannot load it: {error}"
            ) from error
        if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            raise DamagedArtifactError(f"{name}: was replaced while it was loaded; load it again")
    return Model(path, manifest, module, tensors, library, threads)


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
