"""The layout of packed dense weights on a GPU.

Columns are grouped in panels of ``width``, each stored ``[padded_k, width]`` contiguously: whatever
a block's threads fetch of it is one run of memory, in 16-byte pieces. All is padded with zeros, so
that no thread asks whether its column or its k exists. With SwiGLU, ``group`` gate columns are
followed by the same units' up columns, so that both are one thread's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.dims import ceil_div
from .naive import DenseSpec

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class CudaLayout:
    """Where each column of the weights goes.

    Parameters
    ----------
    spec : DenseSpec
    width : int
        Columns of a panel.
    k_step : int
        What ``padded_k`` is a multiple of.
    group : int
        With SwiGLU, gate columns that stand together; divides ``width / 2``.
    """

    spec: DenseSpec
    width: int
    k_step: int
    group: int

    @property
    def padded_k(self) -> int:
        """Rows of the weights after padding."""
        return ceil_div(self.spec.k, self.k_step) * self.k_step

    @property
    def panels(self) -> int:
        """Number of panels."""
        return ceil_div(self.spec.n, self.width)

    @property
    def padded_n(self) -> int:
        """Columns after padding."""
        return self.panels * self.width

    def _arrange(self, columns: Array) -> Array:
        """Pad ``[..., n]`` to ``[..., padded_n]``, interleaving gate and up for SwiGLU."""

        def pad(a: Array, n: int) -> Array:
            return np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, n - a.shape[-1])])

        if not self.spec.swiglu:
            return pad(columns, self.padded_n)
        half, units = self.padded_n // 2, self.spec.out_n
        by_group = (*columns.shape[:-1], half // self.group, 1, self.group)
        gate, up = (pad(a, half) for a in (columns[..., :units], columns[..., units:]))
        both = np.concatenate([gate.reshape(by_group), up.reshape(by_group)], axis=-2)
        return both.reshape(*columns.shape[:-1], self.padded_n)

    def pack_weight(self, w: Array) -> Array:
        """Pack ``w [k, n]`` into ``[panels, padded_k, width]``."""
        w = np.pad(self._arrange(w), [(0, self.padded_k - self.spec.k), (0, 0)])
        panels = w.reshape(self.padded_k, self.panels, self.width).transpose(1, 0, 2)
        return np.ascontiguousarray(panels)

    def pack_bias(self, b: Array) -> Array:
        """Arrange ``b [n]`` as the columns of the packed weights, ``[padded_n]``."""
        return np.ascontiguousarray(self._arrange(b))
