"""A dense kernel for GPUs for few rows: as fast as the weights arrive.

A block computes one narrow panel for all rows. Its threads split k between them: at each step they
fetch a run of the panel in 16-byte pieces, and each keeps their 4 columns (8 of a half type) of
partial sums of every row. Partial sums meet in two steps: in a warp by shuffles, between warps in
shared memory.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from ..common.cuda_threads import WARP, lanes_sum
from ..common.dims import DimVars, ceil_div, known_rows
from .cuda_epilogue import block_statistics, finish, normalized
from .cuda_packing import CudaLayout
from .naive import DenseSpec, dense_prim_func

MAX_ROWS = 8
THREADS = 256
WARPS = THREADS // WARP


def rows_layout(spec: DenseSpec, width: int) -> CudaLayout:
    """Return the layout of weights for panels of ``width`` columns; k is not padded."""
    return CudaLayout(spec, width, 1, width // 2)


def few_rows_dense(spec: DenseSpec, width: int, *, half: bool) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)`` on weights of `rows_layout`.

    With ``half`` it is right once `stored_as` has made the weights a half type.
    """
    M, K, out_n, swiglu = known_rows(spec.lead), spec.k, spec.out_n, spec.swiglu
    layout = rows_layout(spec, width)
    piece = 8 if half else 4  # columns of a thread: 16 bytes of weights
    across = width // piece  # threads side by side
    slices = THREADS // across
    steps = ceil_div(K, slices)
    out_width = width // 2 if swiglu else width
    outputs = M * out_width
    has_residual = spec.residual

    def total(acc, up, b, col, panel, j):
        gate = acc + b[panel * width + j]
        other = up + b[panel * width + width // 2 + j] if swiglu else None
        return finish(spec, gate, other, col)

    @T.inline
    def load(w, piece_of, panel, k, col):
        if half:
            at = T.meta_var((panel * layout.padded_k + k) * width + col)
            T.call_extern("void", "mega_load_halves", piece_of.data, w.data, at)
        else:
            for v in T.vectorized(4):
                piece_of[v] = w[panel, k, col + v]

    @T.inline
    def write(sums, b, residual, y, panel, o):
        # output o of the block: sum over warps, then the epilogue
        m = T.meta_var(o // out_width)
        j = T.meta_var(o % out_width)
        col = T.meta_var(panel * out_width + j)
        acc = T.alloc_buffer((2,), "float32", scope="local")
        acc[0] = T.float32(0)
        acc[1] = T.float32(0)
        for part in T.unroll(WARPS):
            acc[0] = acc[0] + sums[part, m, j]
            if swiglu:
                acc[1] = acc[1] + sums[part, m, width // 2 + j]
        if col < out_n:
            if has_residual:
                y[m, col] = residual[m, col] + total(acc[0], acc[1], b, col, panel, j)
            else:
                y[m, col] = total(acc[0], acc[1], b, col, panel, j)

    @T.inline
    def body(x, w, b, residual, y):
        for panel in T.thread_binding(layout.panels, thread="blockIdx.x"):
            for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                sums = T.alloc_buffer((WARPS, M, width), "float32", scope="shared")
                stats = T.alloc_buffer((M, 2), "float32", scope="shared")
                acc = T.alloc_buffer((M * piece,), "float32", scope="local")
                w_piece = T.alloc_buffer((piece,), "float32", scope="local")
                block_statistics(spec, x, stats, 0, M, tid, THREADS)
                for i in T.unroll(M * piece):
                    acc[i] = T.float32(0)
                for i in T.serial(steps):
                    k = T.meta_var(i * slices + tid // across)
                    if k < K:
                        load(w, w_piece, panel, k, tid % across * piece)
                        for m in T.unroll(M):
                            for v in T.unroll(piece):
                                acc[m * piece + v] = (
                                    acc[m * piece + v]
                                    + normalized(spec, x[m, k], stats, m) * w_piece[v]
                                )
                for i in T.unroll(M * piece):
                    lanes_sum(acc, i, across, WARP)
                if tid % WARP < across:
                    for i in T.unroll(M * piece // 4):
                        for v in T.vectorized(4):
                            sums[
                                tid // WARP, i * 4 // piece,
                                tid % WARP * piece + i * 4 % piece + v,
                            ] = acc[i * 4 + v]  # fmt: skip
                for i in T.serial(ceil_div(outputs, THREADS)):
                    if i * THREADS + tid < outputs:
                        write(sums, b, residual, y, panel, i * THREADS + tid)

    return dense_prim_func(
        spec, DimVars(), (layout.panels, layout.padded_k, width), layout.padded_n, body
    )
