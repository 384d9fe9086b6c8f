"""Runs a streaming entry: new frames in, the state advanced, the output behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.inputs import aligned_bytes, aligned_empty
from mega_tvm.stream_state import StreamEntry, StreamState
from mega_tvm.symbolic_entry import BATCH, SEQ_LEN, workspace_bytes

if TYPE_CHECKING:
    from mega_tvm.model import Model

Array = npt.NDArray[np.float32]

# Rows (streams times frames) that a call of prefill's pieces aims at: enough for full register
# tiles, few enough that a piece's intermediates (0.7 MB at hidden size 256) stay in L2.
PREFILL_ROWS = 128


class Feeder:
    """The entry's function with memory for its arguments, made once.

    Parameters
    ----------
    model : Model
    entry : StreamEntry
    run : callable
        The entry's function.
    state : StreamState
        Is advanced by what is fed.
    """

    def __init__(
        self, model: Model, entry: StreamEntry, run: Callable[..., int], state: StreamState
    ) -> None:
        self._model = model
        self._entry = entry
        self._run = run
        self._state = state
        batch = len(state.lengths)
        self._piece = max(1, PREFILL_ROWS // batch)  # frames
        self._x = aligned_empty((batch * self._piece * entry.input_width,))
        self._y = aligned_empty((batch, *entry.output_shape))
        size = workspace_bytes(entry.workspace, {BATCH: batch, SEQ_LEN: self._piece})
        self._workspace = _tensor(aligned_bytes(size))
        self._step_x = self._x[: batch * entry.input_width].reshape(batch, -1)
        self._step_arguments = self._arguments(slice(0, batch), 1)

    def step(self, x: Array) -> Array:
        """Feed one frame to each row; the output is valid until the next call."""
        np.copyto(self._step_x, x)
        self._call(self._step_arguments)
        self._state.advance()
        return self._y

    def feed(self, run: slice, x: Array) -> Array:
        """Feed many frames to neighbouring rows, in pieces; return the last one's output.

        The state's longest row is not counted anew.
        """
        batch, n = x.shape[:2]
        done = 0
        while done < n:
            # A piece must not wrap around a cache: its first queries would miss rows that its last
            # frames have replaced. Full caches take one frame at a time.
            room = max(1, self._state.max_len - int(self._state.lengths[run].max()))
            frames = min(n - done, self._piece, room)
            arguments = self._arguments(run, frames)
            piece = self._x[: batch * frames * x.shape[2]].reshape(batch, frames, -1)
            np.copyto(piece, x[:, done : done + frames])
            self._call(arguments)
            self._state.lengths[run] += frames
            done += frames
        return self._y[:batch]

    def _arguments(self, run: slice, frames: int) -> tuple[tvm_ffi.Tensor, ...]:
        """Return what the entry's function takes, for some frames to neighbouring rows."""
        batch, width = run.stop - run.start, self._entry.input_width
        x = self._x[: batch * frames * width].reshape(batch, frames, width)
        return (
            _tensor(x),
            _tensor(self._state.lengths[run]),
            *(_tensor(array[run]) for array in self._state.arrays),
            self._model.tensor_block,
            self._workspace,
            _tensor(self._y[:batch]),
        )

    def _call(self, arguments: tuple[tvm_ffi.Tensor, ...]) -> None:
        self._model.run_function(self._entry.name, self._run, arguments)


def _tensor(array: npt.NDArray[Any]) -> tvm_ffi.Tensor:
    # Without a check of its alignment: all arrays and rows of states start at cache lines, but for
    # lengths, which are read one by one.
    return tvm_ffi.from_dlpack(array)
