"""What a normed_dense kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import te, tirx

from ..common.dims import DimVars
from ..dense.naive import DenseSpec, dense_of
from ..layer_norm.naive import normalized


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
    x = te.placeholder((*DimVars().shape(spec.lead), spec.k), "float32", "x")
    plain = normalized(x, spec.eps, clamp_variance=spec.clamp_variance)
    return dense_of(spec, x, te.compute(x.shape, plain, "normed"))
