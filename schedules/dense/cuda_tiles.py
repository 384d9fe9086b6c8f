"""A dense kernel for GPUs in tiles: a block of threads computes ``block_m`` rows of one panel.

1. The block walks k in steps of 8 times ``slices``. Two stages of shared memory take turns: while
   one is multiplied, the next tile is on its way from global memory into registers, and is stored
   into the other. One barrier a step. (Not by ``cp.async``: it moves 16 bytes as they lie, and
   ``x`` is stored transposed, or losing its mean.)
2. A thread holds ``thread_m`` rows by 4 columns of accumulators, of 8 k of each step: where there
   are too few tiles for a GPU, several threads, ``slices`` of them, share what would be one's.
   A k costs a thread one or two 16-byte loads of ``x`` (a column of rows: the tile is stored
   transposed), one of weights, and 4 ``thread_m`` FFMA.
3. Weights come in 16-byte pieces, always (`CudaLayout`); ``x`` does where k is a multiple of 4,
   which makes its rows aligned.
4. Rows to be normalized lose their mean on the way into shared memory, which costs one FADD; their
   deviation, a factor of a whole row, waits for the accumulators.
5. Slices meet in shared memory; then bias, SwiGLU or sigmoid, and residual, on the way out.
"""

from __future__ import annotations

import dataclasses

from tvm import tirx
from tvm.script import tirx as T

from ..common.dims import DimVars, ceil_div, known_rows
from ..normed_dense.naive import NormedDenseSpec
from .cuda_epilogue import block_statistics, finish
from .cuda_packing import CudaLayout
from .naive import DenseSpec, dense_prim_func

THREAD_N = 4  # columns of a thread: one 16-byte load of weights
SLICE_K = 8  # of each step, for one slice
PAD = 4  # floats behind each row of the transposed tile: 4 rows apart lie in different banks


@dataclasses.dataclass(frozen=True)
class Tile:
    """The tile of a block: rows, columns, rows of a thread, and threads that share a k step."""

    block_m: int
    block_n: int
    thread_m: int
    slices: int

    @property
    def slice_threads(self) -> int:
        """Threads of a slice."""
        return self.block_m // self.thread_m * (self.block_n // THREAD_N)

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return self.slice_threads * self.slices

    @property
    def step_k(self) -> int:
        """What a block multiplies from barrier to barrier."""
        return SLICE_K * self.slices

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a block, at most."""
        stages = 2 * self.step_k * (self.block_m + PAD + self.block_n)
        sums = (self.slices - 1) * self.block_m * self.block_n
        return 4 * (stages + sums + 2 * self.block_m)


def tile_layout(spec: DenseSpec, tile: Tile) -> CudaLayout:
    """Return the layout of weights for a tile; k is padded to two steps, one a stage."""
    return CudaLayout(spec, tile.block_n, 2 * tile.step_k, THREAD_N // 2)


def tiled_dense(spec: DenseSpec, tile: Tile) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)`` on weights of `tile_layout`."""
    M, K, out_n, swiglu = known_rows(spec.lead), spec.k, spec.out_n, spec.swiglu
    BM, BN, TM, BK = tile.block_m, tile.block_n, tile.thread_m, tile.step_k
    layout = tile_layout(spec, tile)
    panels, padded_k = layout.panels, layout.padded_k
    threads, own, slices = tile.threads, tile.slice_threads, tile.slices
    across = BN // THREAD_N  # threads side by side
    pairs = padded_k // (2 * BK)
    row_stride = BM + PAD  # in a flat buffer: TVM would cut a matrix's columns that nobody uses
    # Both tiles of a stage are one buffer: on sm_90 each buffer's address is computed anew.
    weights = BK * row_stride
    wide = K % 4 == 0  # rows of x are aligned to 16 bytes
    pieces_x = BM * BK // (4 if wide else 1)
    pieces_w = BK * BN // 4
    loads_x, loads_w = ceil_div(pieces_x, threads), ceil_div(pieces_w, threads)
    piece = 4 if wide else 1
    out_cols = THREAD_N // 2 if swiglu else THREAD_N  # of a thread
    whole_k = padded_k == K
    whole = out_n % out_cols == 0  # a thread's columns all exist, or none does
    has_residual, normed = spec.residual, isinstance(spec, NormedDenseSpec)

    def existing(row):
        return T.min(row, M - 1) if M % BM else row

    @T.inline
    def start(acc, mean, stats, b, panel, tid):
        # accumulators: the bias, once. And the means of the rows whose pieces the thread fetches
        for i in T.unroll(TM):
            for j in T.vectorized(THREAD_N):
                acc[i * THREAD_N + j] = (
                    T.float32(0)
                    if normed or slices > 1
                    else b[panel * BN + tid % across * THREAD_N + j]
                )
        if normed:
            for i in T.unroll(loads_x):
                if i * threads + tid < pieces_x:
                    mean[i] = stats[(i * threads + tid) // (BK // piece), 0]

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
    def put(x_next, w_next, mean, stage, tid):
        # registers into shared memory, x transposed
        for i in T.unroll(loads_x):
            if i * threads + tid < pieces_x:
                row = T.meta_var((i * threads + tid) // (BK // piece))
                col = T.meta_var((i * threads + tid) % (BK // piece) * piece)
                for v in T.unroll(piece):
                    stage[(col + v) * row_stride + row] = (
                        x_next[i * piece + v] - mean[i] if normed else x_next[i * piece + v]
                    )
        for i in T.unroll(loads_w):
            if i * threads + tid < pieces_w:
                for v in T.vectorized(4):
                    stage[weights + (i * threads + tid) * 4 + v] = w_next[i * 4 + v]

    @T.inline
    def multiply(stage, acc, tid):
        a = T.alloc_buffer((TM,), "float32", scope="local")
        b = T.alloc_buffer((THREAD_N,), "float32", scope="local")
        first = T.meta_var(tid // own * SLICE_K)
        lane = T.meta_var(tid % own)
        for k in T.unroll(SLICE_K):
            for i in T.unroll(ceil_div(TM, 4)):
                for v in T.vectorized(min(TM, 4)):
                    a[i * 4 + v] = stage[(first + k) * row_stride + lane // across * TM + i * 4 + v]
            for j in T.vectorized(THREAD_N):
                b[j] = stage[weights + (first + k) * BN + lane % across * THREAD_N + j]
            for i in T.unroll(TM):
                for j in T.unroll(THREAD_N):
                    acc[i * THREAD_N + j] = acc[i * THREAD_N + j] + a[i] * b[j]

    @T.inline
    def meet(acc, sums, tid):
        # the first slice's accumulators become those of all
        if tid >= own:
            for i in T.unroll(TM):
                for j in T.vectorized(THREAD_N):
                    sums[i, tid - own, j] = acc[i * THREAD_N + j]
        T.tvm_storage_sync("shared")
        if tid < own:
            for other in T.unroll(slices - 1):
                for i in T.unroll(TM):
                    for j in T.unroll(THREAD_N):
                        acc[i * THREAD_N + j] = (
                            acc[i * THREAD_N + j] + sums[i, other * own + tid, j]
                        )

    @T.inline
    def add_bias(acc, stats, b, panel, tid):
        # and divide by the deviation of the thread's rows, if they are to be normalized
        bias = T.alloc_buffer((THREAD_N,), "float32", scope="local")
        for j in T.vectorized(THREAD_N):
            bias[j] = b[panel * BN + tid % across * THREAD_N + j]
        for i in T.unroll(TM):
            for j in T.unroll(THREAD_N):
                acc[i * THREAD_N + j] = (
                    acc[i * THREAD_N + j] * stats[tid // across * TM + i, 1] + bias[j]
                    if normed
                    else acc[i * THREAD_N + j] + bias[j]
                )

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
    def leave(acc, stats, b, residual, y, m, panel, tid):
        if normed or slices > 1:
            add_bias(acc, stats, b, panel, tid)
        store(
            acc, residual, y, m + tid // across * TM,
            (panel * BN + tid % across * THREAD_N) // (2 if swiglu else 1),
        )  # fmt: skip

    @T.inline
    def body(x, w, b, residual, y):
        for block in T.thread_binding(ceil_div(M, BM) * panels, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                m = T.meta_var(block // panels * BM)
                panel = T.meta_var(block % panels)
                stage0 = T.alloc_buffer((BK * (row_stride + BN),), "float32", scope="shared")
                stage1 = T.alloc_buffer((BK * (row_stride + BN),), "float32", scope="shared")
                sums = T.alloc_buffer((TM, threads - own, THREAD_N), "float32", scope="shared")
                stats = T.alloc_buffer((BM, 2), "float32", scope="shared")
                mean = T.alloc_buffer((loads_x,), "float32", scope="local")
                x_next = T.alloc_buffer((loads_x * piece,), "float32", scope="local")
                w_next = T.alloc_buffer((loads_w * 4,), "float32", scope="local")
                acc = T.alloc_buffer((TM * THREAD_N,), "float32", scope="local")
                block_statistics(spec, x, stats, m, BM, tid, threads)
                start(acc, mean, stats, b, panel, tid)
                fetch(x, w, x_next, w_next, m, panel, 0, tid)
                put(x_next, w_next, mean, stage0, tid)
                for pair in T.serial(pairs):
                    fetch(x, w, x_next, w_next, m, panel, pair * 2 * BK + BK, tid)
                    multiply(stage0, acc, tid)
                    put(x_next, w_next, mean, stage1, tid)
                    if pair < pairs - 1:
                        fetch(x, w, x_next, w_next, m, panel, pair * 2 * BK + 2 * BK, tid)
                    multiply(stage1, acc, tid)
                    if pair < pairs - 1:
                        put(x_next, w_next, mean, stage0, tid)
                if slices > 1:
                    meet(acc, sums, tid)
                    if tid < own:
                        leave(acc, stats, b, residual, y, m, panel, tid)
                else:
                    leave(acc, stats, b, residual, y, m, panel, tid)

    return dense_prim_func(spec, DimVars(), (panels, padded_k, BN), layout.padded_n, body)
