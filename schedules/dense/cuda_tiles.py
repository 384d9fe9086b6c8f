"""A dense kernel for GPUs in tiles: a block of threads computes ``block_m`` rows of one panel.

1. The block walks k in steps of ``step_k``. Two buffers in shared memory take turns: while one is
   multiplied, the next tile is on its way from global memory into registers, and is stored into the
   other. One barrier a step.
2. A thread holds ``thread_m`` rows by 4 columns of accumulators. A k step costs it one or two
   16-byte loads of ``x`` (a column of rows: the tile is stored transposed), one of weights, and 4
   ``thread_m`` FFMA.
3. Weights come in 16-byte pieces, always (`CudaLayout`); ``x`` does where k is a multiple of 4,
   which makes its rows aligned.
4. Bias, SwiGLU or sigmoid, and residual meet the accumulators on the way out.
"""

from __future__ import annotations

import dataclasses

from tvm import tirx
from tvm.script import tirx as T

from ..common.dims import DimVars, ceil_div, known_rows
from .cuda_epilogue import block_statistics, finish, normalized
from .cuda_packing import CudaLayout
from .naive import DenseSpec, dense_prim_func

THREAD_N = 4  # columns of a thread: one 16-byte load of weights
STEP_K = 8
PAD = 4  # floats behind each row of the transposed tile: 4 rows apart lie in different banks


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a block: rows, columns, and rows of a thread."""

    block_m: int
    block_n: int
    thread_m: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.block_m // self.thread_m * (self.block_n // THREAD_N)


def tile_layout(spec: DenseSpec, tile: Tile) -> CudaLayout:
    """Return the layout of weights for a tile; k is padded to two steps, one a buffer."""
    return CudaLayout(spec, tile.block_n, 2 * STEP_K, THREAD_N // 2)


def tiled_dense(spec: DenseSpec, tile: Tile) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)`` on weights of `tile_layout`."""
    M, K, out_n, swiglu = known_rows(spec.lead), spec.k, spec.out_n, spec.swiglu
    BM, BN, TM, BK = tile.block_m, tile.block_n, tile.thread_m, STEP_K
    layout = tile_layout(spec, tile)
    panels, padded_k, threads = layout.panels, layout.padded_k, tile.threads
    across = BN // THREAD_N  # threads side by side
    pairs = padded_k // (2 * BK)
    row_stride = BM + PAD  # in a flat buffer: TVM would cut a matrix's columns that nobody uses
    wide = K % 4 == 0  # rows of x are aligned to 16 bytes
    pieces_x = BM * BK // (4 if wide else 1)
    pieces_w = BK * BN // 4
    loads_x, loads_w = ceil_div(pieces_x, threads), ceil_div(pieces_w, threads)
    piece = 4 if wide else 1
    out_cols = THREAD_N // 2 if swiglu else THREAD_N  # of a thread
    whole_k = padded_k == K
    whole = out_n % out_cols == 0  # a thread's columns all exist, or none does
    has_residual = spec.residual

    def existing(row):
        return T.min(row, M - 1) if M % BM else row

    @T.inline
    def fetch(x, w, x_next, w_next, m, panel, k, tid):
        # the tile at k, from global memory into registers. Rows that the matrix has not are copies
        # of its last one, which nobody stores: cheaper than a branch
        for i in T.unroll(loads_x):
            row = T.meta_var((i * threads + tid) // (BK // piece))
            col = T.meta_var(k + (i * threads + tid) % (BK // piece) * piece)
            if i * threads + tid < pieces_x:
                if whole_k:
                    for v in T.vectorized(piece):
                        x_next[i * piece + v] = x[existing(m + row), col + v]
                else:
                    if col < K:
                        for v in T.vectorized(piece):
                            x_next[i * piece + v] = x[existing(m + row), col + v]
                    else:
                        for v in T.vectorized(piece):
                            x_next[i * piece + v] = T.float32(0)
        for i in T.unroll(loads_w):
            if i * threads + tid < pieces_w:
                for v in T.vectorized(4):
                    w_next[i * 4 + v] = w[
                        panel,
                        k + (i * threads + tid) * 4 // BN,
                        (i * threads + tid) * 4 % BN + v,
                    ]

    @T.inline
    def put(x_next, w_next, xs, ws, stats, tid):
        # registers into shared memory, x transposed
        for i in T.unroll(loads_x):
            if i * threads + tid < pieces_x:
                row = T.meta_var((i * threads + tid) // (BK // piece))
                col = T.meta_var((i * threads + tid) % (BK // piece) * piece)
                for v in T.unroll(piece):
                    xs[(col + v) * row_stride + row] = normalized(
                        spec, x_next[i * piece + v], stats, row
                    )
        for i in T.unroll(loads_w):
            if i * threads + tid < pieces_w:
                for v in T.vectorized(4):
                    ws[(i * threads + tid) * 4 // BN, (i * threads + tid) * 4 % BN + v] = w_next[
                        i * 4 + v
                    ]

    @T.inline
    def multiply(xs, ws, acc, tid):
        a = T.alloc_buffer((TM,), "float32", scope="local")
        b = T.alloc_buffer((THREAD_N,), "float32", scope="local")
        for k in T.unroll(BK):
            for i in T.unroll(ceil_div(TM, 4)):
                for v in T.vectorized(min(TM, 4)):
                    a[i * 4 + v] = xs[k * row_stride + tid // across * TM + i * 4 + v]
            for j in T.vectorized(THREAD_N):
                b[j] = ws[k, tid % across * THREAD_N + j]
            for i in T.unroll(TM):
                for j in T.unroll(THREAD_N):
                    acc[i * THREAD_N + j] = acc[i * THREAD_N + j] + a[i] * b[j]

    def value(acc, i, j, col):
        up = acc[i * THREAD_N + THREAD_N // 2 + j] if swiglu else None
        return finish(spec, acc[i * THREAD_N + j], up, col)

    def total(done, residual, row, col):
        return residual[row, col] + done if has_residual else done

    @T.inline
    def store(acc, residual, y, m, col):
        # the thread's outputs, from row m and column col on; complete before the store, which
        # then is one, whatever the epilogue
        done = T.alloc_buffer((out_cols,), "float32", scope="local")
        for i in T.unroll(TM):
            if m + i < M:
                for j in T.unroll(out_cols):
                    done[j] = value(acc, i, j, col + j)
                if whole:
                    if col < out_n:
                        for j in T.vectorized(out_cols):
                            y[m + i, col + j] = total(done[j], residual, m + i, col + j)
                else:
                    for j in T.unroll(out_cols):
                        if col + j < out_n:
                            y[m + i, col + j] = total(done[j], residual, m + i, col + j)

    @T.inline
    def body(x, w, b, residual, y):
        for block in T.thread_binding(ceil_div(M, BM) * panels, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                m = T.meta_var(block // panels * BM)
                panel = T.meta_var(block % panels)
                xs0 = T.alloc_buffer((BK * row_stride,), "float32", scope="shared")
                xs1 = T.alloc_buffer((BK * row_stride,), "float32", scope="shared")
                ws0 = T.alloc_buffer((BK, BN), "float32", scope="shared")
                ws1 = T.alloc_buffer((BK, BN), "float32", scope="shared")
                stats = T.alloc_buffer((BM, 2), "float32", scope="shared")
                x_next = T.alloc_buffer((loads_x * piece,), "float32", scope="local")
                w_next = T.alloc_buffer((loads_w * 4,), "float32", scope="local")
                acc = T.alloc_buffer((TM * THREAD_N,), "float32", scope="local")
                block_statistics(spec, x, stats, m, BM, tid, threads)
                for i in T.unroll(TM):
                    for j in T.vectorized(THREAD_N):
                        acc[i * THREAD_N + j] = b[panel * BN + tid % across * THREAD_N + j]
                fetch(x, w, x_next, w_next, m, panel, 0, tid)
                put(x_next, w_next, xs0, ws0, stats, tid)
                for pair in T.serial(pairs):
                    fetch(x, w, x_next, w_next, m, panel, pair * 2 * BK + BK, tid)
                    multiply(xs0, ws0, acc, tid)
                    put(x_next, w_next, xs1, ws1, stats, tid)
                    if pair < pairs - 1:
                        fetch(x, w, x_next, w_next, m, panel, pair * 2 * BK + 2 * BK, tid)
                    multiply(xs1, ws1, acc, tid)
                    if pair < pairs - 1:
                        put(x_next, w_next, xs0, ws0, stats, tid)
                store(
                    acc, residual, y, m + tid // across * TM,
                    (panel * BN + tid % across * THREAD_N) // (2 if swiglu else 1),
                )  # fmt: skip

    return dense_prim_func(spec, DimVars(), (panels, padded_k, BN), layout.padded_n, body)
