"""The layout of packed dense weights for tensor cores: as fragments lie in registers.

Of a 16x16 piece of the weights a lane holds 8 elements (PTX ISA, "mma.m16n8k16", matrix B, twice).
They stand together here, lane after lane: a warp loads a piece by one 16-byte load a lane, without
conflicts in shared memory, and a block's tile is one run of memory.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from .cuda_packing import CudaLayout

PIECE = 16  # rows and columns of a piece
GROUP = 8  # columns of an instruction: with SwiGLU, gate columns, then the same units' up columns

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class FragmentLayout(CudaLayout):
    """A `CudaLayout` whose panels are pieces, those of a step of k side by side."""

    @property
    def size(self) -> int:
        """Elements of the packed weights."""
        return self.padded_k * self.padded_n

    def pack_weight(self, w: Array) -> Array:
        """Pack ``w [k, n]`` into a flat array of `size` elements.

        It is ``[panel, k / 16, width / 16, lane, 8]``. Lane ``4 g + t`` holds columns ``g`` and
        ``g + 8``, and of each the rows ``2 t``, ``2 t + 1``, ``2 t + 8`` and ``2 t + 9``.
        """
        panels = super().pack_weight(w)
        # panel, k / 16, (half of k, t, one of two), width / 16, (half of n, g)
        shape = (self.panels, -1, 2, 4, 2, self.width // PIECE, 2, 8)
        fragments = panels.reshape(shape).transpose(0, 1, 5, 7, 3, 6, 2, 4)
        return np.ascontiguousarray(fragments).reshape(-1)
