"""The layout of packed dense weights.

Columns are grouped in panels of ``width`` and each panel is stored ``[k, width]`` contiguously, so
that the inner loop reads one stream. A last, narrower panel takes what is left, rounded up to whole
vectors; no other padding exists. With SwiGLU a vector of gate columns is followed by the vector of
the same units' up columns, so that both meet in one register tile.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from .naive import DenseSpec

Array = npt.NDArray[Any]


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


@dataclasses.dataclass(frozen=True)
class PanelLayout:
    """Where each column of the weights goes.

    Parameters
    ----------
    spec : DenseSpec
    lanes : int
        Float32 lanes of a vector.
    width : int
        Columns of a panel, a multiple of ``lanes`` (of ``2 * lanes`` with SwiGLU).
    """

    spec: DenseSpec
    lanes: int
    width: int

    @property
    def padded_n(self) -> int:
        """Columns after padding to whole vectors."""
        if self.spec.swiglu:
            return 2 * _round_up(self.spec.out_n, self.lanes)
        return _round_up(self.spec.n, self.lanes)

    @property
    def full_panels(self) -> int:
        """Number of panels of the full width."""
        return self.padded_n // self.width

    @property
    def tail_width(self) -> int:
        """Width of the last, narrower panel; 0 if there is none."""
        return self.padded_n % self.width

    @property
    def panels(self) -> int:
        """Number of panels, the tail included."""
        return self.full_panels + (self.tail_width > 0)

    @property
    def size(self) -> int:
        """Elements of the packed weights."""
        return self.spec.k * self.padded_n

    def _arrange(self, columns: Array) -> Array:
        """Pad ``[..., n]`` to ``[..., padded_n]``, interleaving gate and up for SwiGLU."""

        def pad(a: Array, n: int) -> Array:
            return np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, n - a.shape[-1])])

        if not self.spec.swiglu:
            return pad(columns, self.padded_n)
        half = self.padded_n // 2
        units = self.spec.out_n
        gate, up = pad(columns[..., :units], half), pad(columns[..., units:], half)
        by_vector = (*columns.shape[:-1], half // self.lanes, 1, self.lanes)
        both = np.concatenate([gate.reshape(by_vector), up.reshape(by_vector)], axis=-2)
        return both.reshape(*columns.shape[:-1], self.padded_n)

    def pack_weight(self, w: Array) -> Array:
        """Pack ``w [k, n]`` into a flat array of `size` elements."""
        w = self._arrange(w)
        starts = range(0, self.padded_n, self.width)
        panels = [np.ravel(w[:, start : start + self.width]) for start in starts]
        return np.ascontiguousarray(np.concatenate(panels))

    @property
    def bias_size(self) -> int:
        """Elements of the packed bias."""
        return 3 * self.padded_n + self.lanes if self.spec.paired else self.padded_n

    def pack_bias(self, b: Array) -> Array:
        """Arrange ``b [n]`` as the columns of the packed weights, ``[padded_n]``.

        Of ``b [3, n]`` row follows row, and then a vector of zeros (`pairs`).
        """
        arranged = np.ravel(self._arrange(b))
        return np.pad(arranged, (0, self.bias_size - arranged.size))
