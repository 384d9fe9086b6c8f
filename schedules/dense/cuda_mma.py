"""A dense kernel for GPUs on tensor cores: tensors of a half type, ``mma.sync`` with float32 sums.

1. A block computes ``block_m`` rows of one panel of ``block_n`` columns, and walks k in steps of
   32. Up to four steps lie in shared memory: while one is multiplied, those behind it are on their
   way (``cp.async``). One barrier a step.
2. Rows of ``x`` lie there in 16-byte chunks whose order differs from row to row (chunk ``c`` of row
   ``r`` is at ``c ^ (r / 2 % 4)``), so that neither the copies nor ``ldmatrix`` meet a bank twice.
   Where k is no multiple of 8 rows are not aligned: then halves are loaded one by one.
3. Weights are packed as fragments lie in registers (`FragmentLayout`): copied as they are, and
   loaded by 16 bytes a lane.
4. A warp multiplies ``warp_m`` by ``warp_n``: for 16 of k, a fragment of 16 rows each by
   ``ldmatrix``, of 16 columns each by a load, and two instructions a pair of them. Rows that are
   layer-normalized are normalized in the fragments, and rounded again, as a layer norm of its own
   would.
5. Bias starts the accumulators; SwiGLU or sigmoid, and residual meet them on the way out. A thread
   holds two columns side by side, which are one store where the width of the output is even.
"""

from __future__ import annotations

import dataclasses

from tvm import tirx
from tvm.script import tirx as T

from ..common.cuda_threads import (
    BARRIER_CYCLES,
    L2_BYTES,
    MMA_CYCLES,
    MMA_LATENCY,
    MULTIPROCESSORS,
    SCHEDULERS,
    WARP,
)
from ..common.dims import DimVars, ceil_div, known_rows
from ..normed_dense.naive import NormedDenseSpec
from .cuda_epilogue import block_statistics, finish
from .cuda_mma_packing import GROUP, PIECE, FragmentLayout
from .naive import DenseSpec, dense_prim_func

STEP_K = 32
CHUNK = 8  # halves of a 16-byte copy
_CHUNKS = STEP_K // CHUNK
_SHARED_BYTES = 40 * 1024  # of 48 KB
_MOST_STAGES = 4


@dataclasses.dataclass(frozen=True)
class MmaTile:
    """The tile of a block, and of a warp: rows and columns."""

    block_m: int
    block_n: int
    warp_m: int
    warp_n: int

    @property
    def warps(self) -> int:
        """Warps of a block."""
        return self.block_m // self.warp_m * (self.block_n // self.warp_n)

    @property
    def stages(self) -> int:
        """Steps of k that shared memory holds."""
        step = 2 * STEP_K * (self.block_m + self.block_n)
        return min(_MOST_STAGES, _SHARED_BYTES // step)


def mma_tiles() -> list[MmaTile]:
    """Return the tiles to choose from, the smallest first."""
    sizes = [(m, n) for m in (16, 32, 64, 128) for n in (32, 64, 128)]
    every = [
        MmaTile(m, n, wm, wn) for m, n in sizes for wm in (16, 32, 64) for wn in (16, 32) if wm <= m
    ]
    fit = [tile for tile in every if 2 <= tile.warps <= 8 and tile.stages >= 2]
    return sorted(fit, key=lambda t: (t.block_m * t.block_n, t.warp_m * t.warp_n, t.block_m))


def fragment_layout(spec: DenseSpec, tile: MmaTile) -> FragmentLayout:
    """Return the layout of weights for a tile."""
    return FragmentLayout(spec, tile.block_n, STEP_K, GROUP)


def estimated_cycles(spec: DenseSpec, tile: MmaTile) -> float:
    """Return the estimated time of a multiprocessor for its share of the blocks.

    A step of k is ``warp_m warp_n / 64`` instructions of a warp, 8 cycles each of one of four
    tensor cores. The blocks of a multiprocessor share them, and its way to L2. A block alone waits,
    each step, for the barrier, ``ldmatrix`` (as long again) and the last products.

    ========================================  =========  ======  ==================  =============
    dense, default model                      FLOP       blocks  estimate, A100, us  at 312 TFLOP/s
    ========================================  =========  ======  ==================  =============
    60 x 256 x 768 (queries, values, gate)    23.6 M     48      1.0                 0.08
    60 x 256 x 1376 (gate and up)             42.3 M     86      1.0                 0.14
    60 x 688 x 256 (down)                     21.1 M     16      2.9                 0.07
    1920 x 256 x 768 (B = 32)                 755 M      180     2.9                 2.4
    ========================================  =========  ======  ==================  =============

    (At 1.41 GHz.) At B = 1 all of it is latency, beside a launch of 2.5 us: 8 or 22 steps.
    Splitting k over blocks would halve the last of them and need a second launch.
    """
    blocks = ceil_div(known_rows(spec.lead), tile.block_m) * ceil_div(spec.n, tile.block_n)
    share = ceil_div(blocks, MULTIPROCESSORS)
    instructions = tile.warp_m * tile.warp_n / 64
    product = ceil_div(tile.warps, SCHEDULERS) * instructions * MMA_CYCLES
    busy = share * tile.warps / SCHEDULERS * instructions * MMA_CYCLES
    alone = 2 * BARRIER_CYCLES + MMA_LATENCY + product
    traffic = share * 2 * STEP_K * (tile.block_m + tile.block_n) / L2_BYTES
    return ceil_div(spec.k, STEP_K) * max(busy, alone, traffic)


def mma_dense(spec: DenseSpec, tile: MmaTile, dtype: str) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)`` on weights of `fragment_layout`.

    It calls functions on the memory of ``x`` and ``w`` as halves: it is right once `stored_as` has
    made them ``dtype``.
    """
    M, K, out_n, swiglu = known_rows(spec.lead), spec.k, spec.out_n, spec.swiglu
    BM, BN, WM, WN = tile.block_m, tile.block_n, tile.warp_m, tile.warp_n
    layout = fragment_layout(spec, tile)
    panels, steps = layout.panels, layout.padded_k // STEP_K
    threads, stages = tile.warps * WARP, tile.stages
    across = BN // WN  # warps side by side
    MI, NI = WM // PIECE, WN // PIECE
    aligned = K % CHUNK == 0
    normed, has_residual = isinstance(spec, NormedDenseSpec), spec.residual
    parts = 1 if swiglu else 2  # pairs of columns that a piece gives
    even = out_n % 2 == 0

    def chunk_at(stage, row, chunk):
        """Return where a chunk of a row of ``x`` lies."""
        return stage * (BM * STEP_K) + row * STEP_K + (chunk ^ (row // 2 % _CHUNKS)) * CHUNK

    @T.inline
    def fetch(x, w, xs, ws, m, panel, stage, step, tid):
        for i in T.unroll(ceil_div(BM * _CHUNKS, threads)):
            if i * threads + tid < BM * _CHUNKS:
                row = T.meta_var((i * threads + tid) // _CHUNKS)
                chunk = T.meta_var((i * threads + tid) % _CHUNKS)
                k = T.meta_var(step * STEP_K + chunk * CHUNK)
                to = T.meta_var(chunk_at(stage, row, chunk))
                start = T.meta_var((m + row) * K + k)
                if aligned:
                    there = T.meta_var(T.And(m + row < M, k < K))
                    T.call_extern("void", "mega_copy_async", xs.data, to, x.data, start, there)
                else:
                    count = T.meta_var(T.if_then_else(m + row < M, K - k, 0))
                    T.call_extern("void", "mega_copy_halves", xs.data, to, x.data, start, count)
        for i in T.unroll(ceil_div(BN * _CHUNKS, threads)):
            if i * threads + tid < BN * _CHUNKS:
                at = T.meta_var((i * threads + tid) * CHUNK)
                T.call_extern(
                    "void", "mega_copy_async", ws.data, stage * (BN * STEP_K) + at,
                    w.data, (panel * steps + step) * (BN * STEP_K) + at, True,
                )  # fmt: skip

    @T.inline
    def multiply(xs, ws, acc, rows, stage, lane, warp):
        a = T.alloc_buffer((MI * 4,), "uint32", scope="local")
        b = T.alloc_buffer((NI * 4,), "uint32", scope="local")
        for k in T.unroll(STEP_K // PIECE):
            for i in T.unroll(MI):
                row = T.meta_var(warp // across * WM + i * PIECE + lane % PIECE)
                at = T.meta_var(chunk_at(stage, row, k * 2 + lane // PIECE))
                T.call_extern("void", "mega_load_matrices", a.data, i * 4, xs.data, at)
                if normed:
                    T.call_extern(
                        "void", f"mega_normalize_{dtype}", a.data, i * 4,
                        rows[i * 4], rows[i * 4 + 1], rows[i * 4 + 2], rows[i * 4 + 3],
                    )  # fmt: skip
            for j in T.unroll(NI):
                piece = T.meta_var(k * (BN // PIECE) + warp % across * NI + j)
                at = T.meta_var(stage * (BN * STEP_K) + (piece * WARP + lane) * CHUNK)
                T.call_extern("void", "mega_load_registers", b.data, j * 4, ws.data, at)
            for i in T.unroll(MI):
                for j in T.unroll(NI):
                    for half in T.unroll(2):
                        T.call_extern(
                            "void", f"mega_mma_{dtype}", acc.data, ((i * NI + j) * 2 + half) * 4,
                            a.data, i * 4, b.data, j * 4 + half * 2,
                        )  # fmt: skip

    @T.inline
    def store_pair(acc, residual, y, row, col, at):
        # two columns of a row; `at` is where their accumulators are
        pair = T.alloc_buffer((2,), "float32", scope="local")
        for e in T.unroll(2):
            pair[e] = finish(spec, acc[at + e], acc[at + 4 + e] if swiglu else None, col + e)
        if even:
            if col < out_n:
                at_y = T.meta_var(row * out_n + col)
                if has_residual:
                    r = T.alloc_buffer((2,), "float32", scope="local")
                    T.call_extern("void", "mega_load_pair", r.data, residual.data, at_y)
                    for e in T.unroll(2):
                        pair[e] = r[e] + pair[e]
                T.call_extern("void", "mega_store_pair", y.data, at_y, pair[0], pair[1])
        else:
            for e in T.unroll(2):
                if col + e < out_n:
                    if has_residual:
                        y[row, col + e] = residual[row, col + e] + pair[e]
                    else:
                        y[row, col + e] = pair[e]

    @T.inline
    def body(x, w, b, residual, y):
        for block in T.thread_binding(ceil_div(M, BM) * panels, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                m = T.meta_var(block // panels * BM)
                panel = T.meta_var(block % panels)
                warp, lane = T.meta_var(tid // WARP), T.meta_var(tid % WARP)
                first_row = T.meta_var(warp // across * WM + lane // 4)
                first_col = T.meta_var(warp % across * WN)
                xs = T.alloc_buffer((stages * BM * STEP_K,), dtype, scope="shared")
                ws = T.alloc_buffer((stages * BN * STEP_K,), dtype, scope="shared")
                stats = T.alloc_buffer((BM, 2), "float32", scope="shared")
                # mean and scale of a fragment's two rows
                rows = T.alloc_buffer((MI * 4,), "float32", scope="local")
                acc = T.alloc_buffer((MI * NI * 8,), "float32", scope="local")
                for stage in T.unroll(stages - 1):
                    if stage < steps:
                        fetch(x, w, xs, ws, m, panel, stage, stage, tid)
                    T.call_extern("void", "mega_commit_copies")
                block_statistics(spec, x, stats, m, BM, tid, threads)
                if normed:
                    for i in T.unroll(MI):
                        for e in T.unroll(4):
                            rows[i * 4 + e] = stats[first_row + i * PIECE + e // 2 * 8, e % 2]
                for i in T.unroll(MI):
                    for j in T.unroll(NI):
                        for half in T.unroll(2):
                            for e in T.unroll(4):
                                acc[((i * NI + j) * 2 + half) * 4 + e] = b[
                                    panel * BN + first_col + j * PIECE + half * 8
                                    + lane % 4 * 2 + e % 2
                                ]  # fmt: skip
                for step in T.serial(steps):
                    T.call_extern("void", "mega_wait_copies", stages - 2)
                    T.tvm_storage_sync("shared")
                    ahead = T.meta_var(step + stages - 1)
                    if ahead < steps:
                        fetch(x, w, xs, ws, m, panel, ahead % stages, ahead, tid)
                    T.call_extern("void", "mega_commit_copies")
                    multiply(xs, ws, acc, rows, step % stages, lane, warp)
                for i in T.unroll(MI):
                    for h in T.unroll(2):
                        row = T.meta_var(m + first_row + i * PIECE + h * 8)
                        if row < M:
                            for j in T.unroll(NI):
                                for half in T.unroll(parts):
                                    col = T.meta_var(
                                        (panel * BN + first_col + j * PIECE) // (3 - parts)
                                        + half * 8 + lane % 4 * 2
                                    )  # fmt: skip
                                    at = T.meta_var(((i * NI + j) * 2 + half) * 4 + h * 2)
                                    store_pair(acc, residual, y, row, col, at)

    return dense_prim_func(spec, DimVars(), (layout.size,), layout.padded_n, body)
