"""Runs one entry of a loaded library: memory for a call, made once and used again.

A call of a small model takes some 20 us, of which arrays, checks and conversions would be a
third. So an entry keeps *frames*: a workspace, an aligned output and, for inputs that are copied,
an aligned input, all converted to the library's arguments once. A call takes a frame that no other
call has, and gives it back; there are as many as calls ever ran at the same time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.inputs import aligned_empty
from mega_tvm.manifest_schema import ALIGNMENT

# Copying so many bytes takes about as long as finding out where an array lies (1 us).
_ALWAYS_COPIED = 32 << 10


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


# ``(name, shape)``: an aligned float32 array.
Memory = Callable[[str, tuple[int, ...]], npt.NDArray[np.float32]]


class Frame:
    """What one running call has to itself.

    Parameters
    ----------
    entry : Entry
    tensors : tvm_ffi.Tensor
        The model's tensors, as one block of bytes.
    memory : callable
        Where its arrays are from.
    """

    __slots__ = ("_rest", "arguments", "entry", "memory", "x", "y")

    def __init__(self, entry: Entry, tensors: tvm_ffi.Tensor, memory: Memory) -> None:
        self.entry = entry
        self.memory = memory
        self.y = memory("y", entry.output_shape)
        workspace = memory("workspace", (-(-entry.workspace // 4),)).view(np.uint8)
        self._rest = (tensors, as_argument(workspace), as_argument(self.y))
        if always_copies(entry):
            self._add_input()

    def arguments_for(self, array: npt.NDArray[np.float32]) -> tuple[Any, ...]:
        """Return a call's arguments; the array is read in place where kernels can."""
        flags = array.flags
        if flags.c_contiguous and flags.writeable and flags.aligned:
            return (tvm_ffi.from_dlpack(array), *self._rest)
        if not hasattr(self, "x"):
            self._add_input()
        self.x[...] = array
        return self.arguments

    def _add_input(self) -> None:
        self.x = self.memory("x", self.entry.input_shape)
        self.arguments = (as_argument(self.x), *self._rest)


def own_memory(_name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return an array that nothing else uses."""
    return aligned_empty(shape)


class GrowingMemory:
    """Arrays by name, of any size from one use to the next.

    It only grows, by half at least, so that it is never more than half as large again as the
    largest shape that was asked for.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, npt.NDArray[np.float32]] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
        """Return an aligned array, which ends the use of the one before of the same name."""
        items = math.prod(shape)
        array = self._arrays.get(name)
        if array is None or array.size < items:
            size = max(items, 0 if array is None else array.size * 3 // 2)
            array = None
            self._arrays.pop(name, None)  # before its successor is there: only one at a time
            array = self._arrays[name] = aligned_empty((size,))
        return array[:items].reshape(shape)


def always_copies(entry: Entry) -> bool:
    """Whether an entry's input is so small that it is copied wherever it lies."""
    return math.prod(entry.input_shape) * 4 <= _ALWAYS_COPIED


class EntryRunner:
    """An entry's function and its idle frames.

    Parameters
    ----------
    entry : Entry
    function : tvm_ffi.Function
        ``(x, tensors, workspace, y)``; returns 0, or 1 where memory ran out.
    tensors : tvm_ffi.Tensor
        The model's tensors, as one block of bytes.
    idle : list of Frame, optional
        Where other entries of the same function keep theirs: memory is shared over all shapes of
        a symbolic entry.
    """

    def __init__(
        self,
        entry: Entry,
        function: Any,
        tensors: tvm_ffi.Tensor,
        idle: list[Frame] | None = None,
    ) -> None:
        function.release_gil = True  # the default, which the environment can change
        self.entry = entry
        self._tensors = tensors
        self._always_copies = always_copies(entry)
        self._function = function
        self._idle: list[Frame] = [] if idle is None else idle

    def __call__(
        self, array: npt.NDArray[np.float32], out: npt.NDArray[np.float32] | None
    ) -> npt.NDArray[np.float32] | None:
        """Run the entry on the caller's thread.

        Parameters
        ----------
        array : ndarray
            float32 in native byte order, of the entry's input shape, with any strides.
        out : ndarray or None
            float32, writable, of the entry's output shape, with any strides.

        Returns
        -------
        ndarray or None
            ``out``, or a new array; None if a kernel ran out of memory.
        """
        # list.pop and append are atomic, so that no two calls have one frame: not those of other
        # threads, and not that of a signal handler within this one.
        try:
            frame = self._idle.pop()
        except IndexError:
            memory = GrowingMemory() if self.entry.symbolic else own_memory
            frame = Frame(self.entry, self._tensors, memory)
        if frame.entry is not self.entry and frame.entry != self.entry:
            frame = Frame(self.entry, self._tensors, frame.memory)
        try:
            if self._always_copies:
                frame.x[...] = array
                status = self._function(*frame.arguments)
            else:
                status = self._function(*frame.arguments_for(array))
            if status != 0:
                return None
            if out is None:
                return frame.y.copy()
            out[...] = frame.y
            return out
        finally:
            self._idle.append(frame)


def as_argument(array: npt.NDArray[Any]) -> tvm_ffi.Tensor:
    """Return an aligned array as an argument of a compiled function, which shares its memory."""
    return tvm_ffi.from_dlpack(array, require_alignment=ALIGNMENT)
