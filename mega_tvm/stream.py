"""Streams: a model fed frame by frame, at the cost of the new frames alone.

>>> stream = model.stream(batch=2, max_len=300)
>>> y = stream.prefill(x)  # x [2, n, embed] -> y [2, hidden]
>>> y = stream.step(x_t)  # x_t [2, embed] -> y [2, hidden]

A row's state is, for each layer, that of the moving average, and a cache of the rows that serve its
attention as keys and values. After any split of frames over calls, the output is that of a full run
on all frames of the row so far, up to the order of sums.

A full cache is an error, or slides (``on_full="slide"``): attention then sees the last ``max_len``
frames. That is not a full run on those frames: their rows were computed when older frames were
still visible, and the moving average goes on. `Model.window` gives the full run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import (
    InputError,
    MegaError,
    StreamFullError,
    StreamUnsupportedError,
)
from mega_tvm.inputs import as_frames, as_output, positive
from mega_tvm.stream_feed import Feeder
from mega_tvm.stream_state import Snapshot, StreamEntry, StreamState

if TYPE_CHECKING:
    from mega_tvm.model import Model

Array = npt.NDArray[np.float32]
ON_FULL = ("error", "slide")


class Stream:
    """A running model with state for ``batch`` rows. Make one with `Model.stream`.

    It is for one thread at a time; a model may have any number of streams. All memory is allocated
    here: a step allocates none beside the array that it returns, and not that one given ``out``.

    Parameters
    ----------
    model : Model
    entry : StreamEntry
    run : callable
        The entry's function.
    batch, max_len : int
    on_full : {"error", "slide"}
    """

    def __init__(
        self,
        model: Model,
        entry: StreamEntry,
        run: Callable[..., int],
        batch: int,
        max_len: int,
        on_full: str,
    ) -> None:
        self._model = model
        self._entry = entry
        self._batch = positive("batch", batch)
        self._max_len = positive("max_len", max_len)
        if on_full not in ON_FULL:
            raise ValueError(
                f"on_full must be {' or '.join(map(repr, ON_FULL))}, found {on_full!r}"
            )
        self._slides = on_full == "slide"
        self._state = StreamState(entry, batch, max_len)
        self._feeder = Feeder(model, entry, run, self._state)

    def __repr__(self) -> str:
        on_full = "slide" if self._slides else "error"
        return (
            f"<mega_tvm.Stream batch={self._batch}, max_len={self._max_len}, on_full={on_full!r}, "
            f"longest row {self._state.longest}>"
        )

    @property
    def batch(self) -> int:
        """Rows."""
        return self._batch

    @property
    def max_len(self) -> int:
        """Frames that a row's caches hold."""
        return self._max_len

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Frames that each row has seen since its reset, a copy ``[batch]``."""
        return self._state.lengths.copy()

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return self._state.nbytes

    def step(self, x_t: Any, *, out: Any = None, check_finite: bool = False) -> Array:
        """Feed one frame to each row.

        Parameters
        ----------
        x_t : array
            float32 ``[batch, embed]``, a NumPy array or anything on the CPU that exports DLPack.
        out : array, optional
            float32, of the output's shape: takes the result, and nothing is allocated.
        check_finite : bool, default False
            Refuse NaN and infinity, which spread to all later outputs of the row otherwise.

        Returns
        -------
        ndarray
            The model's output for the frames of each row so far, ``[batch, hidden]``: ``out``, or
            an array with memory of its own.

        Raises
        ------
        InputError
            If ``x_t`` or ``out`` has another shape or dtype; the state is as before.
        StreamFullError
            If a row holds ``max_len`` frames and the stream does not slide; likewise.
        """
        x = self._checked(x_t, (self._batch, self._entry.input_width), check_finite)
        if out is not None:
            out = self._output(out, self._batch)
        if self._state.longest >= self._max_len and not self._slides:
            raise StreamFullError(self._full_message(1))
        y = self._feeder.step(x)
        if out is None:
            return y.copy()
        np.copyto(out, y)
        return out

    def prefill(
        self,
        x: Any,
        *,
        rows: Sequence[int] | None = None,
        out: Any = None,
        check_finite: bool = False,
    ) -> Array:
        """Feed many frames to each row, at the cost of a full run on them.

        Parameters
        ----------
        x : array
            float32 ``[batch, n, embed]``, or ``[len(rows), n, embed]``.
        rows : sequence of int, optional
            The rows that get them, ascending; all by default.
        out : array, optional
            As for `step`.
        check_finite : bool, default False

        Returns
        -------
        ndarray
            The output behind the last frame, ``[batch, hidden]`` or ``[len(rows), hidden]``.

        Raises
        ------
        InputError, StreamFullError
            As `step` does, before any frame is fed.
        """
        chosen = np.arange(self._batch) if rows is None else self._rows(rows)
        if (np.diff(chosen) <= 0).any() or len(chosen) == 0:
            raise InputError(f"expected ascending rows, at least one, found {chosen.tolist()}")
        x = self._checked(x, (len(chosen), None, self._entry.input_width), check_finite)
        n = x.shape[1]
        if n == 0:
            raise InputError("expected at least one frame, found none")
        if out is not None:
            out = self._output(out, len(chosen))
        if not self._slides and self._state.lengths[chosen].max() + n > self._max_len:
            raise StreamFullError(self._full_message(n))
        if out is None:
            out = np.empty((len(chosen), *self._entry.output_shape), np.float32)
        done = 0
        for run in _runs(chosen):
            end = done + run.stop - run.start
            out[done:end] = self._feeder.feed(run, x[done:end])
            done = end
        self._state.recount()
        return out

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Let rows start anew, all by default.

        Parameters
        ----------
        rows : sequence of int, optional
        """
        self._state.reset(slice(None) if rows is None else self._rows(rows))

    def reorder(self, rows: Sequence[int]) -> None:
        """Let each row go on from the state of another: row ``i`` from that of ``rows[i]``.

        For the beams of a search, or environments that are copied.

        Parameters
        ----------
        rows : sequence of int
            ``batch`` rows; a row may stand there more than once.
        """
        source = self._rows(rows)
        if len(source) != self._batch:
            raise InputError(f"expected {self._batch} rows, found {len(source)}")
        self._state.reorder(source)

    def snapshot(self) -> Snapshot:
        """Return a copy of the state."""
        return self._state.snapshot(self._origin)

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from a snapshot.

        Parameters
        ----------
        snapshot : Snapshot
            Of this stream, or of another with its weights, batch, ``max_len`` and ``on_full``.

        Raises
        ------
        InputError
            If it is of another kind of stream; the state is as before.
        """
        if not isinstance(snapshot, Snapshot):
            raise InputError(f"expected a Snapshot, found {type(snapshot).__name__}")
        if snapshot.origin != self._origin:
            raise InputError(
                "expected a snapshot of a stream with the same model, batch, max_len and on_full: "
                f"{self._origin}; found {snapshot.origin}"
            )
        self._state.restore(snapshot)

    @property
    def _origin(self) -> tuple[Any, ...]:
        digest = self._model.metadata["library"]["sha256"]
        tensors = self._model.metadata["tensors"]["sha256"]
        return digest, tensors, self._batch, self._max_len, self._slides

    def _checked(self, x: Any, shape: tuple[int | None, ...], check_finite: bool) -> Array:
        return as_frames(x, shape, check_finite, f"; this stream has batch {self._batch}")

    def _output(self, out: Any, rows: int) -> Array:
        return as_output(out, (rows, *self._entry.output_shape))

    def _rows(self, rows: Sequence[int]) -> npt.NDArray[np.intp]:
        chosen = np.asarray(rows)
        if chosen.ndim != 1 or (chosen.size and chosen.dtype.kind not in "iu"):
            raise InputError(f"expected rows to be a list of integers, found {rows!r}")
        if ((chosen < 0) | (chosen >= self._batch)).any():
            raise InputError(f"expected rows from 0 to {self._batch - 1}, found {chosen.tolist()}")
        return chosen.astype(np.intp)

    def _full_message(self, n: int) -> str:
        return (
            f"{n} more frame(s) do not fit: the longest row holds {self._state.longest} of "
            f"max_len={self._max_len}; reset() rows whose sequence has ended, make the stream with "
            'a larger max_len, or with on_full="slide"'
        )


def make_stream(model: Model, batch: int, max_len: int | None, on_full: str) -> Stream:
    """Make a stream, as `Model.stream` says."""
    description = model.metadata.get("stream") or {"left_out": "it is of an older compiler"}
    if reason := description.get("left_out"):
        raise StreamUnsupportedError(f"this model cannot stream: {reason}")
    entry = StreamEntry.from_manifest(description)
    run = model.function(entry.name)
    if max_len is None:
        max_len = max(e["seq_len"] for e in model.metadata["entries"])
    try:
        return Stream(model, entry, run, batch, max_len, on_full)
    except MemoryError as error:
        row = sum(width * (max_len if kind == "cache" else 1) for kind, width in entry.state)
        raise MegaError(
            f"a stream of batch {batch} and max_len {max_len} keeps {4 * batch * row:,} bytes of "
            "state, and needs more to compute, which this process cannot have; make it smaller"
        ) from error


def _runs(rows: npt.NDArray[np.intp]) -> Iterator[slice]:
    """Yield the runs of neighbours among ascending rows."""
    for part in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        yield slice(int(part[0]), int(part[-1]) + 1)
