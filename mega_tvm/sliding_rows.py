"""Memory for the last rows of a window, contiguous at any time, that slides without moving."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import tvm_ffi

from mega_tvm.inputs import aligned_empty

Array = npt.NDArray[np.float32]


class SlidingRows:
    """An array ``[batch, length, width]`` that drops its oldest rows as new ones come.

    It starts one row further on for each new one: a batch's rows stay where they are, and its new
    row takes the place of the next one's oldest. At the end of the memory, after ``length`` rows,
    all move back to its start.

    Parameters
    ----------
    batch, length, width : int
    """

    def __init__(self, batch: int, length: int, width: int) -> None:
        self._shape = (batch, length, width)
        self._memory = aligned_empty(((batch + 1) * length * width,))
        self._memory[:] = 0
        self._start = 0  # row
        self._tensors: dict[int, tvm_ffi.Tensor] = {}

    @property
    def array(self) -> Array:
        """The rows, the newest last: valid until the next `append`."""
        batch, length, width = self._shape
        start = self._start * width
        return self._memory[start : start + batch * length * width].reshape(self._shape)

    @property
    def tensor(self) -> tvm_ffi.Tensor:
        """The same as an argument of a compiled function."""
        if (tensor := self._tensors.get(self._start)) is None:
            tensor = tvm_ffi.from_dlpack(self.array)
            self._tensors[self._start] = tensor
        return tensor

    def append(self, rows: Array) -> None:
        """Add rows ``[batch, n, width]``, n up to the length, in place of the n oldest."""
        batch, length, width = self._shape
        n = rows.shape[1]
        if self._start + n <= length:
            self._start += n
        else:
            kept = (batch * length - n) * width
            source = (self._start + n) * width
            self._memory[:kept] = self._memory[source : source + kept]  # as memmove
            self._start = 0
        self.array[:, length - n :] = rows
