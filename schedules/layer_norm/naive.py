"""What a layer_norm kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from tvm import te, tirx
from tvm.script import tirx as T

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
    x = te.placeholder((*DimVars().shape(spec.lead), spec.n), "float32", "x")
    gamma = te.placeholder((spec.n,), "float32", "gamma")
    beta = te.placeholder((spec.n,), "float32", "beta")
    plain = normalized(x, spec.eps, clamp_variance=spec.clamp_variance)

    def output(*i: tirx.Var) -> tirx.PrimExpr:
        y = plain(*i)
        return y * gamma[i[-1]] + beta[i[-1]] if spec.affine else y

    y = te.compute(x.shape, output, "y")
    args = [x, gamma, beta, y] if spec.affine else [x, y]
    return spec.attach(te.create_prim_func(args))


def normalized(x: te.Tensor, eps: float, *, clamp_variance: bool) -> Callable[..., tirx.PrimExpr]:
    """Return the plain layer norm of ``x``, as a function of an element's indices."""
    *lead, n = x.shape
    inverse, epsilon = tirx.const(1.0 / int(n), "float32"), tirx.const(eps, "float32")
    k, j = te.reduce_axis((0, n), "k"), te.reduce_axis((0, n), "j")
    total = te.compute(lead, lambda *r: te.sum(x[(*r, k)], axis=k), "total")

    def deviation(row: tuple[tirx.Var, ...], col: tirx.Var) -> tirx.PrimExpr:
        return x[(*row, col)] - total[row] * inverse

    squares = te.compute(
        lead, lambda *r: te.sum(deviation(r, j) * deviation(r, j), axis=j), "squares"
    )

    def normalize(*index: tirx.Var) -> tirx.PrimExpr:
        *row, col = index
        variance = squares[tuple(row)] * inverse
        denominator = variance + epsilon
        if clamp_variance:
            denominator = tirx.Select(variance < epsilon, epsilon, denominator)
        return deviation(tuple(row), col) / tirx.sqrt(denominator)

    return normalize


def layer_norm_prim_func(
    spec: LayerNormSpec, dims: DimVars, body: Callable[..., None]
) -> tirx.PrimFunc:
    """Return the kernel ``(x[, gamma, beta], y)``; ``body`` gets matrices and writes it out."""
    M, N = dims.rows(spec.lead), spec.n
    shape = (*dims.shape(spec.lead), N)

    @T.inline
    def flat(x_nd, gamma, beta, y_nd):
        x = T.decl_buffer((M, N), "float32", data=x_nd.data)
        y = T.decl_buffer((M, N), "float32", data=y_nd.data)
        body(x, gamma, beta, y)

    if spec.affine:

        @T.prim_func(s_tir=True, private=True)
        def layer_norm(
            x: T.Buffer(shape, "float32"),
            gamma: T.Buffer((N,), "float32"),
            beta: T.Buffer((N,), "float32"),
            y: T.Buffer(shape, "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            flat(x, gamma, beta, y)

        return layer_norm

    @T.prim_func(s_tir=True, private=True)
    def layer_norm_plain(x: T.Buffer(shape, "float32"), y: T.Buffer(shape, "float32")):
        T.func_attr({"tirx.noalias": True})
        flat(x, x, x, y)

    return layer_norm_plain
