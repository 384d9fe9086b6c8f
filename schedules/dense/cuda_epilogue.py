"""What the dense kernels for GPUs share: row statistics before the product, and the epilogue."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from ..common.cuda_threads import WARP, lanes_sum, sigmoid, silu
from ..common.dims import ceil_div, known_rows
from ..normed_dense.naive import NormedDenseSpec
from .naive import DenseSpec


def finish(spec: DenseSpec, value: tirx.PrimExpr, up: tirx.PrimExpr, col: tirx.PrimExpr):
    """Return an output element, residual left out, of its accumulator with the bias added.

    ``up`` is the same unit's second accumulator where there is SwiGLU.
    """
    if spec.swiglu:
        return silu(value) * up
    if 0 < spec.sigmoid_from < spec.n:
        return T.if_then_else(col >= spec.sigmoid_from, sigmoid(value), value)
    return sigmoid(value) if spec.sigmoid_from == 0 else value


@T.inline
def _row_statistics(x, stats, m, row, lane, k, inverse, eps, clamp_variance):
    # stats[row]: mean and 1 / deviation of row m of x; one warp
    part = T.alloc_buffer((1,), "float32", scope="local")
    mean = T.alloc_buffer((1,), "float32", scope="local")
    part[0] = T.float32(0)
    for i in T.serial(ceil_div(k, WARP)):
        if i * WARP + lane < k:
            part[0] = part[0] + x[m, i * WARP + lane]
    lanes_sum(part, 0, 1, WARP)
    mean[0] = part[0] * T.float32(inverse)
    part[0] = T.float32(0)
    for i in T.serial(ceil_div(k, WARP)):
        if i * WARP + lane < k:
            part[0] = part[0] + (x[m, i * WARP + lane] - mean[0]) * (
                x[m, i * WARP + lane] - mean[0]
            )
    lanes_sum(part, 0, 1, WARP)
    part[0] = part[0] * T.float32(inverse)
    if clamp_variance:
        part[0] = T.if_then_else(part[0] < T.float32(eps), T.float32(eps), part[0] + T.float32(eps))
    else:
        part[0] = part[0] + T.float32(eps)
    if lane == 0:
        stats[row, 0] = mean[0]
        stats[row, 1] = T.float32(1) / T.sqrt(part[0])


@T.inline
def _block_statistics(x, stats, first, count, tid, warps, M, k, inverse, eps, clamp_variance):
    for i in T.serial(ceil_div(count, warps)):
        if i * warps + tid // WARP < count:
            if first + i * warps + tid // WARP < M:
                _row_statistics(
                    x, stats, first + i * warps + tid // WARP, i * warps + tid // WARP,
                    tid % WARP, k, inverse, eps, clamp_variance,
                )  # fmt: skip
            else:
                if tid % WARP < 2:  # rows that a tile has and the matrix has not
                    stats[i * warps + tid // WARP, tid % WARP] = T.float32(0)


def block_statistics(spec: DenseSpec, x, stats, first, count: int, tid, threads: int) -> None:
    """Fill ``stats`` with mean and inverse deviation of ``count`` rows from ``first`` on.

    Does nothing unless the rows are to be normalized.
    """
    if isinstance(spec, NormedDenseSpec):
        _block_statistics(
            x, stats, first, count, tid, threads // WARP, known_rows(spec.lead), spec.k,
            1.0 / spec.k, spec.eps, spec.clamp_variance,
        )  # fmt: skip


def normalized(spec: DenseSpec, value: tirx.PrimExpr, stats, row):
    """Return an element of ``x``, normalized if it is to be."""
    if isinstance(spec, NormedDenseSpec):
        return (value - stats[row, 0]) * stats[row, 1]
    return value
