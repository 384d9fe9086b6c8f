"""What a normed_dense kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import te, tirx

from ..common.dims import DimVars
from ..dense.naive import DenseSpec, dense_of


@dataclasses.dataclass(frozen=True)
class NormedDenseSpec(DenseSpec):
    """Sizes and epilogue of a normed_dense kernel.

    Parameters
    ----------
    eps : float
        Added to the variance.
    clamp_variance : bool
        As in `LayerNormSpec`.
    """

    op: ClassVar[str] = "normed_dense"

    eps: float = 1e-5
    clamp_variance: bool = False

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        return "normed_" + super().name


def normed_dense(spec: NormedDenseSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(x, w, b[, residual], out)``: `dense` of the plain layer norm of x."""
    lead = DimVars().shape(spec.lead)
    x = te.placeholder((*lead, spec.k), "float32", "x")
    inverse, eps = tirx.const(1.0 / spec.k, "float32"), tirx.const(spec.eps, "float32")
    i, j = te.reduce_axis((0, spec.k), "i"), te.reduce_axis((0, spec.k), "j")
    total = te.compute(lead, lambda *r: te.sum(x[(*r, i)], axis=i), "total")

    def deviation(row: tuple[tirx.Var, ...], col: tirx.Var) -> tirx.PrimExpr:
        return x[(*row, col)] - total[row] * inverse

    squares = te.compute(
        lead, lambda *r: te.sum(deviation(r, j) * deviation(r, j), axis=j), "squares"
    )

    def normalize(*index: tirx.Var) -> tirx.PrimExpr:
        *row, col = index
        variance = squares[tuple(row)] * inverse
        denominator = variance + eps
        if spec.clamp_variance:
            denominator = tirx.Select(variance < eps, eps, denominator)
        return deviation(tuple(row), col) / tirx.sqrt(denominator)

    return dense_of(spec, x, te.compute((*lead, spec.k), normalize, "normed"))
