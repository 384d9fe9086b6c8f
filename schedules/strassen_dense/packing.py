"""The layout of packed weights: the right factors of seven products, panel by panel.

Columns are cut in two halves of whole vectors; padding is at the end of the right one. With SwiGLU
the left half are the gates, the right one the same units' up columns. A panel is a group of columns
of the left half with those at the same place of the right half, or the sums of both. Widths of
panels differ by at most one vector, the wider first.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from .naive import StrassenDenseSpec

Array = npt.NDArray[Any]


@dataclasses.dataclass(frozen=True)
class StrassenLayout:
    """Where the sums of weights go.

    Parameters
    ----------
    spec : StrassenDenseSpec
    lanes : int
        Float32 lanes of a vector.
    widest : int
        Vectors of a panel that none exceeds.
    """

    spec: StrassenDenseSpec
    lanes: int
    widest: int

    @property
    def vectors(self) -> int:
        """Vectors of either half of the columns."""
        units = self.spec.out_n if self.spec.swiglu else -(-self.spec.n // 2)
        return -(-units // self.lanes)

    @property
    def half_n(self) -> int:
        """Columns of either half, padding included."""
        return self.vectors * self.lanes

    @property
    def panels(self) -> int:
        """Number of panels."""
        return -(-self.vectors // self.widest)

    @property
    def narrow(self) -> int:
        """Vectors of a narrower panel."""
        return self.vectors // self.panels

    @property
    def wide_panels(self) -> int:
        """How many panels, the first ones, have a vector more."""
        return self.vectors % self.panels

    @property
    def halves_k(self) -> tuple[int, int]:
        """Rows of the weights' upper and lower half; of an odd k the upper has one more."""
        return self.spec.k - self.spec.k // 2, self.spec.k // 2

    @property
    def steps(self) -> tuple[int, ...]:
        """How many of k each product runs over.

        Two multiply the right half of ``x`` itself, which ends earlier where k is odd.
        """
        upper, lower = self.halves_k
        return (upper, lower, upper, upper, lower, upper, upper)

    @property
    def size(self) -> int:
        """Elements of the packed weights."""
        return sum(self.steps) * self.half_n

    def _half(self, columns: Array, *, right: bool) -> Array:
        cut = self.spec.out_n if self.spec.swiglu else self.half_n
        part = columns[..., cut:] if right else columns[..., :cut]
        return np.pad(part, [(0, 0)] * (part.ndim - 1) + [(0, self.half_n - part.shape[-1])])

    def factors(self, w: Array) -> tuple[Array, ...]:
        """Return the right factors of the seven products, in the order of `steps`, in float64."""
        upper, lower = self.halves_k
        wide = w.astype(np.float64)
        left, right = self._half(wide, right=False), self._half(wide, right=True)
        w11, w12 = left[:upper], right[:upper]
        w21, w22 = (np.pad(half[upper:], [(0, upper - lower), (0, 0)]) for half in (left, right))
        t1 = w12 - w11
        t2 = w22 - t1
        t3 = w22 - w12
        t4 = w21 - t2
        return w11, w21[:lower], t2, t3, t4[:lower], t1, w22

    def pack_weight(self, w: Array) -> Array:
        """Pack ``w [k, n]`` into a flat array of `size` elements; sums are rounded once."""
        factors = self.factors(w)
        widths = [self.narrow + (panel < self.wide_panels) for panel in range(self.panels)]
        ends = np.cumsum(widths) * self.lanes
        parts = [
            factor[:, end - width * self.lanes : end].ravel()
            for width, end in zip(widths, ends, strict=True)
            for factor in factors
        ]
        return np.concatenate(parts).astype(w.dtype)

    def pack_bias(self, b: Array) -> Array:
        """Arrange ``b [n]`` as left half and right half, ``[2 * half_n]``."""
        return np.concatenate([self._half(b, right=False), self._half(b, right=True)])
