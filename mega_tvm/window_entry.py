"""Runs an entry on a window whose frames keep their rows, see `mega_tvm.passes.split_window`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.entries import Entry, as_argument
from mega_tvm.inputs import aligned_bytes, aligned_empty
from mega_tvm.sliding_rows import SlidingRows
from mega_tvm.symbolic_entry import BATCH, SEQ_LEN, workspace_bytes

if TYPE_CHECKING:
    from mega_tvm.model import Model

Array = npt.NDArray[np.float32]


class WindowEntry:
    """The functions of an entry's windows, with the rows of one window.

    Parameters
    ----------
    model : Model
    description : mapping
        The manifest's field ``window``.
    entry : Entry
        What a full run would use.
    """

    def __init__(self, model: Model, description: Mapping[str, Any], entry: Entry) -> None:
        batch, length, width = entry.input_shape
        rest = description["entries"][entry.name]
        self._model = model
        self._names = description["name"], rest["name"]
        self._frame_rows, self._rest = (model.function(name) for name in self._names)
        self._frame_workspace = description["workspace"]
        self._rows = [SlidingRows(batch, length, row) for row in description["widths"]]
        self._y = aligned_empty(entry.output_shape)
        sizes = {BATCH: batch, SEQ_LEN: length}
        workspace = as_argument(aligned_bytes(workspace_bytes(rest["workspace"], sizes)))
        self._last = (model.tensor_block, workspace, as_argument(self._y))
        self._one = self._memory(batch, 1, width)

    def run(self, frames: SlidingRows, new: int) -> Array:
        """Run the model on a window; the output is valid until the next run.

        Parameters
        ----------
        frames : SlidingRows
            The window's.
        new : int
            How many of the last ones have come since the run before.
        """
        x = frames.array[:, -new:]
        memory, arguments = self._one if new == 1 else self._memory(*x.shape)
        np.copyto(memory[0], x)
        self._model.run_function(self._names[0], self._frame_rows, arguments)
        for rows, found in zip(self._rows, memory[1:], strict=True):
            rows.append(found)
        arguments = (*(rows.tensor for rows in self._rows), *self._last)
        self._model.run_function(self._names[1], self._rest, arguments)
        return self._y

    def _memory(
        self, batch: int, n: int, width: int
    ) -> tuple[list[Array], tuple[tvm_ffi.Tensor, ...]]:
        """Return arrays for n frames and their rows, and a function's arguments with them."""
        arrays = [aligned_empty((batch, n, width))]
        arrays += [aligned_empty((batch, n, rows.array.shape[2])) for rows in self._rows]
        size = workspace_bytes(self._frame_workspace, {BATCH: batch, SEQ_LEN: n})
        x, *rows = map(as_argument, arrays)
        return arrays, (x, self._model.tensor_block, as_argument(aligned_bytes(size)), *rows)
