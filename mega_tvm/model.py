"""A loaded model: calls, streams and windows; imports neither TVM's compiler nor torch."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.entries import Entry, EntryRunner, Frame, as_argument
from mega_tvm.errors import DamagedArtifactError, InputError, MegaError
from mega_tvm.inputs import CPU, as_array, as_output, check_values
from mega_tvm.runtime_library import RuntimeLibrary
from mega_tvm.stream import Stream, make_stream
from mega_tvm.symbolic_entry import SymbolicEntry, shapes_for_people
from mega_tvm.tensor_memory import Tensors
from mega_tvm.window import Window, make_window

POOLED = 2  # VirtualMachine's allocator kinds: naive 1, pooled 2
_FLOAT32 = np.dtype(np.float32)


class Model:
    """A loaded model. Make one with `load`.

    A model may be called from several threads at once: each call has memory of its own, and all
    share the code and the tensors. Other Python threads run while kernels do.

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
        self._entries = tuple(
            Entry(
                e["name"], tuple(e["input"]["shape"]), tuple(e["output"]["shape"]), e["workspace"]
            )
            for e in manifest["entries"]
        )
        block = tensors.block
        self._runners = {
            entry.input_shape: EntryRunner(entry, self.function(entry.name), block)
            for entry in self._entries
        }
        symbolic = map(SymbolicEntry.of, manifest.get("symbolic_entries", []))
        # Each with its function, and the frames that all its shapes share.
        self._symbolic: tuple[tuple[SymbolicEntry, Any, list[Frame]], ...] = tuple(
            (entry, self.function(entry.name), []) for entry in symbolic
        )

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
        return tuple(entry for entry, _, _ in self._symbolic)

    def entry_at(self, shape: tuple[int, ...]) -> Entry:
        """Return what runs an input of some shape: an entry of it alone, else a symbolic one's.

        Raises
        ------
        InputError
            If none does; the message lists what there is.
        """
        return self._runner_at(shape).entry

    @property
    def num_threads(self) -> int:
        """How many threads a call uses, the caller's included."""
        return self._num_threads

    @property
    def tensors(self) -> tvm_ffi.Array:
        """The packed weights, views of one block of memory."""
        return self._tensors.views

    @property
    def tensor_block(self) -> tvm_ffi.Tensor:
        """The same as one block of bytes, as compiled functions take it."""
        return self._tensors.block

    def __repr__(self) -> str:
        shapes = ", ".join(self._shapes())
        return f"<mega_tvm.Model {str(self._path)!r}: {shapes}, num_threads={self._num_threads}>"

    def __call__(
        self, x: Any, *, out: Any = None, check_finite: bool = False
    ) -> npt.NDArray[np.float32]:
        """Run the model.

        Parameters
        ----------
        x : array
            float32, of one of the shapes in `entries`, or within the limits of one of
            `symbolic_entries`: a NumPy array, or anything on the CPU that exports DLPack. Where it
            is larger than 32 KiB, C-contiguous and writable, it is read in
            place; it is copied otherwise.
        out : array, optional
            Takes the result: float32, of the entry's output shape, writable; with any strides and
            alignment. It may overlap ``x``, and is left alone if the call fails.
        check_finite : bool, default False
            Refuse NaN and infinity, which propagate to the output otherwise.

        Returns
        -------
        ndarray
            float32: an array with memory of its own, or the memory of ``out``. Libraries that read
            DLPack take it without a copy (``torch.from_dlpack(y)``).

        Raises
        ------
        InputError
            If ``x`` or ``out`` has another shape or dtype, or is not an array on the CPU.
        """
        array = x if type(x) is np.ndarray else as_array(x)
        runner = self._runners.get(array.shape) or self._runner_at(array.shape)
        if array.dtype is not _FLOAT32 or check_finite:  # the same object nearly always
            check_values(array, check_finite)
        target = None if out is None else as_output(out, runner.entry.output_shape)
        self._library.threads.use(self._num_threads)
        try:
            result = runner(array, target)
        except (TypeError, ValueError, RuntimeError) as error:  # the library's own checks
            raise self.mismatch(error) from error
        except MemoryError as error:
            raise MegaError(
                f"an input of shape {list(array.shape)} needs {runner.entry.workspace:,} bytes of "
                "workspace, which this process cannot have; split the batch"
            ) from error
        if result is None:
            raise MegaError(f"{self._path}: a kernel of {runner.entry.name} failed: out of memory")
        return result

    def warmup(self) -> None:
        """Run each entry once on zeros, so that the first real call finds code and pages ready.

        A symbolic entry runs at its least shape. With several threads all run in a thread of their
        own: the calling one keeps no workers, which a process that is forked now would start anew.
        """
        if self._num_threads == 1:
            return self._run_each()
        with concurrent.futures.ThreadPoolExecutor(1, "mega_tvm-warmup") as thread:
            thread.submit(self._run_each).result()

    def _run_each(self) -> None:
        for shape in (*self._runners, *(entry.least_shape for entry in self.symbolic_entries)):
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
        MegaError
            If there is no memory for it.
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
        machine["vm_initialization"](CPU, 0, POOLED)
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
        self._library.threads.use(self._num_threads)
        return function(as_argument(x), *self._machine_tensors())

    def _machine_tensors(self) -> tuple[tvm_ffi.Array, ...]:
        """Return what a machine's function takes behind its input: nothing if there are none."""
        return (self.tensors,) if len(self.tensors) else ()

    def fetch(self, tensor: tvm_ffi.Tensor) -> npt.NDArray[Any]:
        """Copy a tensor that a machine computed."""
        return np.from_dlpack(tensor).copy()

    def run_function(self, name: str, function: Any, arguments: Sequence[Any]) -> None:
        """Call a compiled function on this thread, on as many threads as a call of the model.

        Raises
        ------
        DamagedArtifactError
            If it does not take these arguments.
        MegaError
            If a kernel found no memory.
        """
        self._library.threads.use(self._num_threads)
        try:
            status = function(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:  # the library's own checks
            raise self.mismatch(error) from error
        if status != 0:
            raise MegaError(f"{self._path}: a kernel of {name} failed: out of memory")

    def function(self, name: str) -> Any:
        """Return a compiled function of the library."""
        try:
            return self._module.get_function(f"{name}__run", query_imports=True)
        except AttributeError as error:
            raise self._missing(name) from error

    def mismatch(self, error: Exception) -> DamagedArtifactError:
        """Return the error for arguments that the library refuses."""
        return DamagedArtifactError(
            f"{self._path}: the library does not take what its manifest says: {error}"
        )

    def _missing(self, name: str) -> DamagedArtifactError:
        return DamagedArtifactError(
            f"{self._path}: the manifest names an entry {name!r}, which the library "
            "does not hold; compile the model again"
        )

    def _runner_at(self, shape: tuple[int, ...]) -> EntryRunner:
        if (runner := self._runners.get(shape)) is not None:
            return runner
        for symbolic, function, idle in self._symbolic:
            if (sizes := symbolic.sizes(shape)) is not None:
                output, workspace = symbolic.output_at(sizes), symbolic.workspace_at(sizes)
                entry = Entry(symbolic.name, shape, output, workspace, symbolic=True)
                return EntryRunner(entry, function, self._tensors.block, idle)
        shapes = " or ".join(self._shapes())
        raise InputError(
            f"expected an array of shape {shapes}, found {list(shape)}; reshape it, or compile the "
            "model for this batch and length"
        )

    def _shapes(self) -> list[str]:
        return shapes_for_people(self._runners, self.symbolic_entries)
