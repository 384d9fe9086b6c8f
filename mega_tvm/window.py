"""Windows: a full run on the last ``seq_len`` frames, at each new frame.

>>> window = model.window(batch=1)
>>> y = window.push(x_t)  # x_t [1, embed] -> y [1, hidden]

The output is that of a full run on the frames in the window, to the bit. Unlike a stream's, it does
not depend on older frames.

What can be saved. As the window slides, a frame keeps its row of the input projection and, in the
first block, of the layer norm and of the projection of the moving average. All else changes: the
moving average starts at zero at the window's start, so that its states differ at every frame, and
with them all that follows. At 60 frames of the default model (embed 287, hidden 256, 4 layers)
those rows are 3% of the arithmetic, and a model without an input projection runs 2.3% faster (2860
us, not 2929, one thread of a Zen 4): that much a further entry, compiled and stored beside the
others, could save. It does not pay, so they are computed anew. What is saved is a copy: frames lie
in the memory that the kernels read, and a push moves them by one place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import InputError
from mega_tvm.inputs import aligned_empty, as_frames, positive

if TYPE_CHECKING:
    from mega_tvm.model import Model

Array = npt.NDArray[np.float32]


class Window:
    """The last ``seq_len`` frames of ``batch`` rows. Make one with `Model.window`.

    It is for one thread at a time; a model may have any number of windows.

    Parameters
    ----------
    model : Model
    frames : ndarray
        float32 ``[batch, seq_len, embed]``, aligned: memory for the window to keep.
    """

    def __init__(self, model: Model, frames: Array) -> None:
        self._model = model
        self._frames = frames
        self._length = 0

    def __repr__(self) -> str:
        batch, seq_len, _ = self._frames.shape
        return f"<mega_tvm.Window batch={batch}, {self._length} of {seq_len} frames>"

    def __len__(self) -> int:
        """Frames that it holds."""
        return self._length

    @property
    def frames(self) -> Array:
        """The frames that it holds, the newest last: a read-only view ``[batch, len, embed]``."""
        view = self._frames[:, : self._length]
        view.flags.writeable = False
        return view

    def push(self, x_t: Any, *, check_finite: bool = False) -> Array:
        """Add one frame to each row, drop the oldest if the window is full, and run the model.

        Until the window is full the run is on the frames so far; the model must have been compiled
        for those lengths, as it is where it has a symbolic entry. If not, `fill` the window first.

        Parameters
        ----------
        x_t : array
            float32 ``[batch, embed]``, a NumPy array or anything on the CPU that exports DLPack.
        check_finite : bool, default False
            Refuse NaN and infinity.

        Returns
        -------
        ndarray
            ``[batch, hidden]``, with memory of its own.

        Raises
        ------
        InputError
            If ``x_t`` has another shape or dtype, or the model does not run the frames so far; the
            window is as before.
        """
        batch, seq_len, width = self._frames.shape
        x = as_frames(x_t, (batch, width), check_finite)
        if self._length == seq_len:
            self._move(1)
            self._frames[:, -1] = x
            return self._model(self._frames)
        self._frames[:, self._length] = x
        y = self._model(self._frames[:, : self._length + 1])
        self._length += 1
        return y

    def fill(self, x: Any, *, check_finite: bool = False) -> None:
        """Add frames without a run: those at hand at the start, or missed ones.

        Parameters
        ----------
        x : array
            float32 ``[batch, n, embed]``; of more than ``seq_len`` frames, the last ones stay.
        check_finite : bool, default False
        """
        batch, seq_len, width = self._frames.shape
        x = as_frames(x, (batch, None, width), check_finite)[:, -seq_len:]
        n = x.shape[1]
        dropped = max(0, self._length + n - seq_len)
        self._move(dropped)
        self._length += n - dropped
        self._frames[:, self._length - n : self._length] = x

    def reset(self) -> None:
        """Drop all frames."""
        self._length = 0

    def _move(self, places: int) -> None:
        """Move the frames towards the start, over the oldest."""
        if places:
            kept = self._length - places
            for row in self._frames:
                row[:kept] = row[places : self._length]


def make_window(model: Model, batch: int, seq_len: int | None) -> Window:
    """Make a window, as `Model.window` says."""
    first = model.entries[0].input_shape
    if len(first) != 3:
        raise InputError(f"expected a model of [batch, seq_len, embed]; this one takes {first}")
    length = first[1] if seq_len is None else seq_len
    shape = (positive("batch", batch), length, first[2])
    model.entry_at(shape)  # raises InputError, which lists what runs
    frames = aligned_empty(shape)
    frames[...] = 0
    return Window(model, frames)
