"""What a stream keeps between calls: of each layer the moving average's state and the cache.

A cache holds, for each frame, the row that serves the layer's attention as key and value; the row
of frame ``t`` lies at ``t % max_len``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.inputs import aligned_empty

Array = npt.NDArray[np.float32]
Rows = npt.NDArray[np.intp] | slice

# Frames of a cache that are moved together: what is set aside meanwhile stays small.
_MOVED_FRAMES = 64


@dataclasses.dataclass(frozen=True)
class StreamEntry:
    """The entry of a library that goes on from a state.

    Parameters
    ----------
    name : str
        The function in the library.
    input_width : int
        Width of a frame.
    output_shape : tuple of int
        A row's output.
    state : tuple of (str, int)
        Kind and width of each layer's states, in order: ``"ema"`` or ``"cache"``.
    workspace : mapping of str to int
        Bytes that a call needs, see `mega_tvm.symbolic_entry`.
    """

    name: str
    input_width: int
    output_shape: tuple[int, ...]
    state: tuple[tuple[str, int], ...]
    workspace: Mapping[str, int]

    @classmethod
    def from_manifest(cls, entry: Mapping[str, Any]) -> StreamEntry:
        """Read a manifest's field ``stream``."""
        return cls(
            entry["name"],
            entry["input_width"],
            tuple(entry["output_shape"]),
            tuple((state["kind"], state["width"]) for state in entry["state"]),
            entry["workspace"],
        )


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A copy of a stream's state, for `Stream.restore`; it stays as it is.

    Parameters
    ----------
    lengths : ndarray
        Frames of each row.
    arrays : tuple of ndarray
        The states; of caches, the frames that are in use.
    origin : tuple
        What a stream must have in common with the one it was taken from.
    """

    lengths: npt.NDArray[np.int64]
    arrays: tuple[Array, ...]
    origin: tuple[Any, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it holds."""
        return self.lengths.nbytes + sum(array.nbytes for array in self.arrays)


class StreamState:
    """The state of ``batch`` rows.

    Parameters
    ----------
    entry : StreamEntry
    batch, max_len : int
    """

    def __init__(self, entry: StreamEntry, batch: int, max_len: int) -> None:
        self.max_len = max_len
        self.lengths = aligned_empty((batch * 2,)).view(np.int64)
        self.arrays = [
            aligned_empty((batch, width) if kind == "ema" else (batch, max_len, width))
            for kind, width in entry.state
        ]
        self._ema = [array for array in self.arrays if array.ndim == 2]
        self._caches = [array for array in self.arrays if array.ndim == 3]
        self.longest = 0  # of the lengths, kept beside them for the quick check of a step
        self.reset(slice(None))

    @property
    def nbytes(self) -> int:
        """Bytes of the states."""
        return sum(array.nbytes for array in self.arrays)

    def advance(self) -> None:
        """Count a frame of each row."""
        np.add(self.lengths, 1, out=self.lengths)
        self.longest += 1

    def recount(self) -> None:
        """Find the longest row, where lengths were changed in another way."""
        self.longest = int(self.lengths.max())

    def reset(self, rows: Rows) -> None:
        """Let rows start anew."""
        self.lengths[rows] = 0
        for array in self._ema:
            array[rows] = 0
        self.recount()

    def reorder(self, source: npt.NDArray[np.intp]) -> None:
        """Let each row ``i`` go on from row ``source[i]``."""
        moved = np.flatnonzero(source != np.arange(len(source)))
        if len(moved) == 0:
            return
        source = source[moved]
        used = min(int(self.lengths[source].max()), self.max_len)
        self.lengths[moved] = self.lengths[source]
        for array in self._ema:
            array[moved] = array[source]
        for cache in self._caches:
            for start in range(0, used, _MOVED_FRAMES):
                frames = slice(start, min(start + _MOVED_FRAMES, used))
                cache[moved, frames] = cache[source, frames]
        self.recount()

    def snapshot(self, origin: tuple[Any, ...]) -> Snapshot:
        """Return a copy."""
        used = min(self.longest, self.max_len)
        arrays = (a.copy() if a.ndim == 2 else a[:, :used].copy() for a in self.arrays)
        return Snapshot(self.lengths.copy(), tuple(arrays), origin)

    def restore(self, snapshot: Snapshot) -> None:
        """Take a snapshot's place."""
        self.lengths[:] = snapshot.lengths
        for array, saved in zip(self.arrays, snapshot.arrays, strict=True):
            if array.ndim == 2:
                array[...] = saved
            else:
                array[:, : saved.shape[1]] = saved
        self.recount()
