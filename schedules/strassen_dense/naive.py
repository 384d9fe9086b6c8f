"""What a strassen_dense kernel computes, unscheduled: the same as a dense kernel."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import tirx

from ..dense.naive import DenseSpec, dense


@dataclasses.dataclass(frozen=True)
class StrassenDenseSpec(DenseSpec):
    """Sizes and epilogue of a strassen_dense kernel; its rows must be known."""

    op: ClassVar[str] = "strassen_dense"

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        return "strassen_" + super().name


def strassen_dense(spec: StrassenDenseSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(x, w, b[, residual], out)`` of `dense`."""
    return dense(spec)
