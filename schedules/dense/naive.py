"""What a dense kernel computes: ``epilogue(x @ w + b)``, unscheduled.

With weights scaled for products in pairs (`pairs`), ``epilogue((x @ w) * scale + b)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from tvm import te, tirx
from tvm.script import tirx as T

from ..common.dims import Dim, DimVars
from ..common.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class DenseSpec(KernelSpec):
    """Sizes and epilogue of a dense kernel.

    Parameters
    ----------
    lead : tuple of int or str
        Leading dimensions of ``x``; their product is the number of rows M.
    k, n : int
        Weights are ``[k, n]``.
    residual : bool
        A tensor of the output's shape is added.
    swiglu : bool
        Columns are pairs (gate of unit i at ``i``, up of unit i at ``n/2 + i``); the output is
        ``silu(gate) * up``, ``[..., n/2]``.
    sigmoid_from : int
        Columns from here on pass through a sigmoid; ``n`` means none do.
    paired : bool
        Columns of the weights are scaled to an RMS near 1, and ``b`` is ``[3, n]``: bias, what
        undoes the scale, and what products in pairs bring too much (`pairs`).
    """

    op: ClassVar[str] = "dense"

    lead: tuple[Dim, ...]
    k: int
    n: int
    residual: bool = False
    swiglu: bool = False
    sigmoid_from: int = -1
    paired: bool = False

    @property
    def out_n(self) -> int:
        """Width of the output."""
        return self.n // 2 if self.swiglu else self.n

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        rows = "x".join(map(str, self.lead))
        epilogue = "_swiglu" if self.swiglu else ""
        epilogue += "_sigmoid" if 0 <= self.sigmoid_from < self.n else ""
        epilogue += "_residual" if self.residual else ""
        epilogue += "_paired" if self.paired else ""
        return f"dense_{rows}x{self.k}x{self.n}{epilogue}"


def dense(spec: DenseSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(x, w, b[, residual], out)``.

    Shapes: ``x [*lead, k]``, ``w [k, n]``, ``b [n]`` or ``[3, n]``, ``residual`` and ``out
    [*lead, out_n]``.
    """
    x = te.placeholder((*DimVars().shape(spec.lead), spec.k), "float32", "x")
    return dense_of(spec, x, x)


def dense_of(spec: DenseSpec, x: te.Tensor, rows: te.Tensor) -> tirx.PrimFunc:
    """Return the PrimFunc ``(x, w, b[, residual], out)`` whose rows are computed from ``x``."""
    *lead, _ = x.shape
    w = te.placeholder((spec.k, spec.n), "float32", "w")
    b = te.placeholder((3, spec.n) if spec.paired else (spec.n,), "float32", "b")
    residual = te.placeholder((*lead, spec.out_n), "float32", "residual")
    k = te.reduce_axis((0, spec.k), "k")
    product = te.compute(
        (*lead, spec.n), lambda *i: te.sum(rows[(*i[:-1], k)] * w[k, i[-1]], axis=k), "product"
    )

    def biased(*i: tirx.Expr) -> tirx.PrimExpr:
        if spec.paired:
            return product[i] * b[1, i[-1]] + b[0, i[-1]]
        return product[i] + b[i[-1]]

    def epilogue(*i: tirx.Var) -> tirx.PrimExpr:
        *row, col = i
        y = biased(*i)
        if spec.swiglu:
            up = biased(*row, col + spec.out_n)
            y = y * tirx.sigmoid(y) * up
        elif 0 <= spec.sigmoid_from < spec.n:
            y = tirx.if_then_else(col >= spec.sigmoid_from, tirx.sigmoid(y), y)
        return y + residual[i] if spec.residual else y

    out = te.compute((*lead, spec.out_n), epilogue, "out")
    args = [x, w, b, residual, out] if spec.residual else [x, w, b, out]
    return spec.attach(te.create_prim_func(args))


def dense_prim_func(
    spec: DenseSpec,
    dims: DimVars,
    w_shape: tuple[int, ...],
    b_size: int,
    body: Callable[..., None],
) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)``; ``body`` gets matrices and writes it out."""
    M, K, out_n = dims.rows(spec.lead), spec.k, spec.out_n
    lead = dims.shape(spec.lead)
    in_shape, out_shape = (*lead, K), (*lead, out_n)

    @T.inline
    def flat(x_nd, w, b, residual_nd, y_nd):
        x = T.decl_buffer((M, K), "float32", data=x_nd.data)
        y = T.decl_buffer((M, out_n), "float32", data=y_nd.data)
        residual = T.decl_buffer((M, out_n), "float32", data=residual_nd.data)
        body(x, w, b, residual, y)

    if spec.residual:

        @T.prim_func(s_tir=True, private=True)
        def dense_residual(
            x: T.Buffer(in_shape, "float32"),
            w: T.Buffer(w_shape, "float32"),
            b: T.Buffer((b_size,), "float32"),
            residual: T.Buffer(out_shape, "float32"),
            y: T.Buffer(out_shape, "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            flat(x, w, b, residual, y)

        return dense_residual

    @T.prim_func(s_tir=True, private=True)
    def dense(
        x: T.Buffer(in_shape, "float32"),
        w: T.Buffer(w_shape, "float32"),
        b: T.Buffer((b_size,), "float32"),
        y: T.Buffer(out_shape, "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        flat(x, w, b, y, y)

    return dense
