"""What a layer_norm kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import te, tirx

from ..common.dims import Dim, DimVars
from ..common.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class LayerNormSpec(KernelSpec):
    """Sizes and form of a layer_norm kernel.

    Parameters
    ----------
    lead : tuple of int or str
        Leading dimensions; their product is the number of rows.
    n : int
        Width of a row.
    eps : float
        Added to the variance.
    affine : bool
        Whether gamma and beta are applied; False where they were folded into the next weights.
    clamp_variance : bool
        Axon 0.8.0's form: ``rsqrt(eps)`` in place of ``rsqrt(var + eps)`` where ``var < eps``.
    """

    op: ClassVar[str] = "layer_norm"

    lead: tuple[Dim, ...]
    n: int
    eps: float
    affine: bool = True
    clamp_variance: bool = False

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        rows = "x".join(map(str, self.lead))
        return f"layer_norm_{rows}x{self.n}" + ("" if self.affine else "_plain")


def layer_norm(spec: LayerNormSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(x[, gamma, beta], y)``; variance is biased.

    Shapes: ``x`` and ``y`` ``[*lead, n]``, ``gamma`` and ``beta`` ``[n]``.
    """
    lead = DimVars().shape(spec.lead)
    x = te.placeholder((*lead, spec.n), "float32", "x")
    gamma = te.placeholder((spec.n,), "float32", "gamma")
    beta = te.placeholder((spec.n,), "float32", "beta")
    inverse = tirx.const(1.0 / spec.n, "float32")
    eps = tirx.const(spec.eps, "float32")
    k = te.reduce_axis((0, spec.n), "k")
    total = te.compute(lead, lambda *r: te.sum(x[(*r, k)], axis=k), "total")
    j = te.reduce_axis((0, spec.n), "j")

    def deviation(r: tuple[tirx.Var, ...], i: tirx.Var) -> tirx.PrimExpr:
        return x[(*r, i)] - total[r] * inverse

    squares = te.compute(
        lead, lambda *r: te.sum(deviation(r, j) * deviation(r, j), axis=j), "squares"
    )

    def normalize(*i: tirx.Var) -> tirx.PrimExpr:
        *row, col = i
        variance = squares[tuple(row)] * inverse
        denominator = variance + eps
        if spec.clamp_variance:
            denominator = tirx.Select(variance < eps, eps, denominator)
        y = deviation(tuple(row), col) / tirx.sqrt(denominator)
        return y * gamma[col] + beta[col] if spec.affine else y

    y = te.compute((*lead, spec.n), normalize, "y")
    args = [x, gamma, beta, y] if spec.affine else [x, y]
    return spec.attach(te.create_prim_func(args))
