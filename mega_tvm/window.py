"""Windows: a full run on the last ``seq_len`` frames, at each new frame.

>>> window = model.window(batch=1)
>>> y = window.push(x_t)  # x_t [1, embed] -> y [1, hidden]

The output is that of a full run on the frames in the window, to the bit. Unlike a stream's, it does
not depend on older frames.

What is saved. As the window slides, a frame keeps its row of the input projection, which is
computed once, when the frame comes. In the first block the rows of the layer norm and of the
projection of the moving average do not change either, but are computed anew, lest bits differ: see
`mega_tvm.passes.split_window`. All else changes: the moving average starts at zero at the window's
start, so that its states differ at every frame, and with them all that follows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import InputError, MegaError
from mega_tvm.inputs import as_frames, as_output, positive
from mega_tvm.sliding_rows import SlidingRows
from mega_tvm.window_entry import WindowEntry

if TYPE_CHECKING:
    from mega_tvm.entries import Entry
    from mega_tvm.model import Model

Array = npt.NDArray[np.float32]


class Window:
    """The last ``seq_len`` frames of ``batch`` rows. Make one with `Model.window`.

    It is for one thread at a time; a model may have any number of windows.

    Parameters
    ----------
    model : Model
    entry : Entry
        What a full run uses; an attribute too.
    saving : WindowEntry or None
        What runs the window from the rows that frames keep; without, each push is a full run.
    """

    def __init__(self, model: Model, entry: Entry, saving: WindowEntry | None) -> None:
        self._model = model
        self.entry = entry
        self._shape = entry.input_shape
        self._output_shape = entry.output_shape
        self._saving = saving
        batch, seq_len, width = entry.input_shape
        self._frames = SlidingRows(batch, seq_len, width)
        self._length = 0
        self._new = 0  # frames since the last run that saved rows

    def __repr__(self) -> str:
        batch, seq_len, _ = self._shape
        return f"<mega_tvm.Window batch={batch}, {self._length} of {seq_len} frames>"

    def __len__(self) -> int:
        """Frames that it holds."""
        return self._length

    @property
    def frames(self) -> Array:
        """The frames that it holds, the newest last: a read-only view ``[batch, len, embed]``.

        It is valid until the next frame.
        """
        view = self._frames.array[:, self._shape[1] - self._length :]
        view.flags.writeable = False
        return view

    def push(self, x_t: Any, *, out: Any = None, check_finite: bool = False) -> Array:
        """Add one frame to each row, drop the oldest if the window is full, and run the model.

        Until the window is full the run is on the frames so far; the model must have been compiled
        for those lengths, as it is where it has a symbolic entry. If not, `fill` the window first.

        Parameters
        ----------
        x_t : array
            float32 ``[batch, embed]``, a NumPy array or anything on the CPU that exports DLPack.
        out : array, optional
            float32, of the output's shape: takes the result.
        check_finite : bool, default False
            Refuse NaN and infinity.

        Returns
        -------
        ndarray
            ``[batch, hidden]``: the memory of ``out``, or an array with memory of its own.

        Raises
        ------
        InputError
            If ``x_t`` or ``out`` has another shape or dtype, or the model does not run the frames
            so far; the window is as before.
        """
        batch, seq_len, width = self._shape
        x = as_frames(x_t, (batch, width), check_finite)
        length = min(self._length + 1, seq_len)
        if length < seq_len:
            self._model.entry_at((batch, length, width))  # raises InputError
        if out is not None:
            out = as_output(out, self._output_shape)
        self._add(x[:, None])
        if self._saving is None or length < seq_len:
            return self._model(self.frames if length < seq_len else self._frames.array, out=out)
        y = self._saving.run(self._frames, self._new)
        self._new = 0
        if out is None:
            return y.copy()
        np.copyto(out, y)
        target: Array = out
        return target

    def fill(self, x: Any, *, check_finite: bool = False) -> None:
        """Add frames without a run: those at hand at the start, or missed ones.

        Parameters
        ----------
        x : array
            float32 ``[batch, n, embed]``; of more than ``seq_len`` frames, the last ones stay.
        check_finite : bool, default False
        """
        batch, seq_len, width = self._shape
        x = as_frames(x, (batch, None, width), check_finite)[:, -seq_len:]
        if x.shape[1]:
            self._add(x)

    def reset(self) -> None:
        """Drop all frames."""
        self._length = self._new = 0

    def _add(self, x: Array) -> None:
        n, seq_len = x.shape[1], self._shape[1]
        self._frames.append(x)
        self._length = min(self._length + n, seq_len)
        self._new = min(self._new + n, seq_len)


def make_window(model: Model, batch: int, seq_len: int | None) -> Window:
    """Make a window, as `Model.window` says."""
    first = model.entries[0].input_shape
    if len(first) != 3:
        raise InputError(f"expected a model of [batch, seq_len, embed]; this one takes {first}")
    length = first[1] if seq_len is None else seq_len
    # Raises InputError, which lists what runs.
    entry = model.entry_at((positive("batch", batch), length, first[2]))
    description = model.metadata.get("window") or {}
    saves = entry.name in description.get("entries", ())
    try:
        return Window(model, entry, WindowEntry(model, description, entry) if saves else None)
    except MemoryError as error:
        raise MegaError(
            f"a window of shape {list(entry.input_shape)} needs memory that this process cannot "
            "have; make it smaller"
        ) from error
