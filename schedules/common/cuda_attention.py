"""Attention for GPUs in tiles, flash style (Dao, arXiv 2307.08691): O(T) memory, one pass.

A block of 128 threads computes ``block_q`` queries and ``columns`` columns of values.

1. For each tile of 64 keys the scores are a small dense product: queries and keys come through
   shared memory, transposed, in steps of 16 of the width. 16 threads side by side hold 4 keys each,
   8 rows of threads hold ``block_q / 8`` queries each.
2. Scores become weights in registers (`Scoring`). Sums and maxima of a row are those of 16 lanes of
   one warp: shuffles, no barrier. Softmax keeps a running maximum and rescales sum and output when
   it rises (Milakov and Gimelshein, arXiv 1805.02867).
3. Weights go to shared memory, transposed, and meet the values, which come through shared memory
   8 keys at a time. Outputs stay in registers, ``block_q / 8`` rows by ``columns / 16``.
4. Sum and gate are applied on the way out. Causal tiles beyond the last query are skipped.

Where there are few queries a block takes few columns, so that more blocks share the work; each then
computes the scores anew.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from . import decisions
from .attention import ATTENTION_EPS, AttentionSpec
from .attention_blocked import attention_prim_func
from .cuda_scoring import Scoring
from .cuda_threads import (
    BARRIER_CYCLES,
    FFMA_CYCLES,
    MULTIPROCESSORS,
    SCHEDULERS,
    WARP,
    lanes_max,
    lanes_sum,
)
from .dims import DimVars, ceil_div, known

THREADS = 128
ACROSS = 16  # threads that share a row
DOWN = THREADS // ACROSS
THREAD_KEYS = 4
TILE_KEYS = ACROSS * THREAD_KEYS
STEP_D = 16  # width of one pass through shared memory
STEP_KEYS = 8  # values of one pass
PAD = 4  # floats behind each row: rows 4 apart lie in different banks. Buffers are flat, see dense

BLOCK_Q, COLUMNS = (8, 16, 32), (64, 128, 256)


def sample_tiles(sch: Schedule, spec: AttentionSpec, instructions: int) -> None:
    """Sample ``block_q`` and ``columns``; ``instructions`` is what a score's element costs."""
    choices = [(q, c) for q in BLOCK_Q for c in COLUMNS if c == 64 or c / 2 < spec.value_width]
    best = min(choices, key=lambda qc: estimated_cycles(spec, qc[0], qc[1], instructions))
    decisions.sample(sch, "block_q", BLOCK_Q, best[0])
    decisions.sample(sch, "columns", COLUMNS, best[1])


def estimated_cycles(spec: AttentionSpec, block_q: int, columns: int, instructions: int) -> float:
    """Return the estimated time of a multiprocessor for its share of the blocks.

    A key tile of a block is ``width`` steps of ``rows * 4 * instructions`` and 64 steps of
    ``rows * columns / 16`` FFMA, each with its loads from shared memory, and 2 barriers every 16
    and 8 of them.
    """
    rows_a_thread = block_q // DOWN
    batch, q_len, k_len = known((spec.batch, spec.q_len, spec.k_len))
    blocks = batch * ceil_div(q_len, block_q) * ceil_div(spec.value_width, columns)
    tiles = ceil_div(k_len, TILE_KEYS)
    score = rows_a_thread * THREAD_KEYS * FFMA_CYCLES * instructions + 2
    mix = rows_a_thread * columns / ACROSS * FFMA_CYCLES + columns / 64 + 1
    issue = tiles * (spec.width * score + TILE_KEYS * mix)
    waits = tiles * 2 * BARRIER_CYCLES * (spec.width / STEP_D + TILE_KEYS / STEP_KEYS)
    warps = THREADS // WARP
    busy = ceil_div(blocks, MULTIPROCESSORS) * warps / SCHEDULERS * issue
    return max(busy, issue + waits)


def tiled_attention(
    spec: AttentionSpec, chosen: Mapping[str, int], scoring: Scoring
) -> tirx.PrimFunc:
    """Return the kernel ``(q, k, v[, gate], out)``."""
    B, Q, K = known((spec.batch, spec.q_len, spec.k_len))
    W, V = spec.width, spec.value_width
    BQ, BV = chosen["block_q"], chosen["columns"]
    TM = BQ // DOWN
    groups = BV // (ACROSS * 4)  # of 4 columns each, of a thread
    row_blocks, column_blocks = ceil_div(Q, BQ), ceil_div(V, BV)
    widths = ceil_div(W, STEP_D)
    has_gate, softmax, causal = spec.has_gate, scoring.softmax, scoring.causal
    q_off, k_off, v_off, g_off = spec.q_offset, spec.k_offset, spec.v_offset, spec.gate_offset
    lowest = -3.0e38  # below any score: a row's maximum, before there is one

    def vector(stride: int, offset: int, size: int) -> int:
        """Return 4 where rows of an operand can be read in 16-byte pieces."""
        return 4 if stride % 4 == 0 and offset % 4 == 0 and size % 4 == 0 else 1

    vec_q, vec_k = vector(spec.q_stride, q_off, W), vector(spec.k_stride, k_off, W)
    vec_v = vector(spec.v_stride, v_off, V)
    vec_out = vector(spec.gate_stride if has_gate else 0, g_off if has_gate else 0, V)
    whole_width, whole_columns = W % STEP_D == 0, V % BV == 0

    def existing(row, limit: int, count: int):
        # A row that does not exist weighs 0 as a key and is not stored as a query: a copy of the
        # last one does, and costs no branch.
        return T.min(row, limit - 1) if limit % count else row

    @T.inline
    def fetch_transposed(source, to, b, first, rows, off, limit, d, tid, count, vec):
        # to[i * (count + PAD) + r] = source[b, first + r, off + d + i]; zero beyond the width
        for i in T.unroll(ceil_div(count * STEP_D // vec, THREADS)):
            r = T.meta_var((i * THREADS + tid) // (STEP_D // vec))
            col = T.meta_var((i * THREADS + tid) % (STEP_D // vec) * vec)
            if i * THREADS + tid < count * STEP_D // vec:
                piece = T.alloc_buffer((vec,), "float32", scope="local")
                if whole_width:
                    for v in T.vectorized(vec):
                        piece[v] = source[b, existing(first + r, limit, count), off + d + col + v]
                else:
                    if d + col < W:
                        for v in T.vectorized(vec):
                            piece[v] = source[
                                b, existing(first + r, limit, count), off + d + col + v
                            ]
                    else:
                        for v in T.vectorized(vec):
                            piece[v] = T.float32(0)
                for v in T.unroll(vec):
                    to[(col + v) * (count + PAD) + r] = piece[v]

    @T.inline
    def scores(q, k, qs, ks, s, b, first_q, first_k, tid):
        for i in T.unroll(TM * THREAD_KEYS):
            s[i] = T.float32(0)
        for step in T.serial(widths):
            fetch_transposed(q, qs, b, first_q, BQ, q_off, Q, step * STEP_D, tid, BQ, vec_q)
            fetch_transposed(
                k, ks, b, first_k, TILE_KEYS, k_off, K, step * STEP_D, tid, TILE_KEYS, vec_k
            )
            for d in T.unroll(STEP_D):
                a = T.alloc_buffer((TM,), "float32", scope="local")
                c = T.alloc_buffer((THREAD_KEYS,), "float32", scope="local")
                for i in T.vectorized(TM):
                    a[i] = qs[d * (BQ + PAD) + tid // ACROSS * TM + i]
                for j in T.vectorized(THREAD_KEYS):
                    c[j] = ks[d * (TILE_KEYS + PAD) + tid % ACROSS * THREAD_KEYS + j]
                for i in T.unroll(TM):
                    for j in T.unroll(THREAD_KEYS):
                        s[i * THREAD_KEYS + j] = scoring.accumulate(
                            s[i * THREAD_KEYS + j], a[i], c[j]
                        )

    def visible(i, j, first_q, first_k, tid):
        row = first_q + tid // ACROSS * TM + i
        key = first_k + tid % ACROSS * THREAD_KEYS + j
        return T.And(key < K, key <= row + (K - Q)) if causal else key < K

    @T.inline
    def weigh(s, ps, peak, total, rescale, first_q, first_k, tid):
        part = T.alloc_buffer((1,), "float32", scope="local")
        for i in T.unroll(TM):
            if softmax:
                part[0] = T.float32(lowest)
                for j in T.unroll(THREAD_KEYS):
                    if visible(i, j, first_q, first_k, tid):
                        part[0] = T.max(part[0], s[i * THREAD_KEYS + j])
                lanes_max(part, 0, 1, ACROSS)
                part[0] = T.max(part[0], peak[i])
                rescale[i] = scoring.weight(peak[i], part[0])
                peak[i] = part[0]
                total[i] = total[i] * rescale[i]
            part[0] = T.float32(0)
            for j in T.unroll(THREAD_KEYS):
                if visible(i, j, first_q, first_k, tid):
                    s[i * THREAD_KEYS + j] = scoring.weight(s[i * THREAD_KEYS + j], peak[i])
                else:
                    s[i * THREAD_KEYS + j] = T.float32(0)
                part[0] = part[0] + s[i * THREAD_KEYS + j]
            lanes_sum(part, 0, 1, ACROSS)
            total[i] = total[i] + part[0]
        for j in T.unroll(THREAD_KEYS):
            for i in T.vectorized(TM):
                ps[(tid % ACROSS * THREAD_KEYS + j) * (BQ + PAD) + tid // ACROSS * TM + i] = s[
                    i * THREAD_KEYS + j
                ]

    @T.inline
    def mix(v, ps, vs, acc, b, first_k, first_v, tid):
        # acc += weights @ values of one tile of keys
        for step in T.serial(T.min(TILE_KEYS // STEP_KEYS, T.ceildiv(K - first_k, STEP_KEYS))):
            for i in T.unroll(STEP_KEYS * BV // vec_v // THREADS):
                r = T.meta_var((i * THREADS + tid) // (BV // vec_v))
                col = T.meta_var((i * THREADS + tid) % (BV // vec_v) * vec_v)
                key = T.meta_var(existing(first_k + step * STEP_KEYS + r, K, STEP_KEYS))
                if whole_columns:
                    for u in T.vectorized(vec_v):
                        vs[r, col + u] = v[b, key, v_off + first_v + col + u]
                else:
                    if first_v + col < V:
                        for u in T.vectorized(vec_v):
                            vs[r, col + u] = v[b, key, v_off + first_v + col + u]
                    else:
                        for u in T.vectorized(vec_v):
                            vs[r, col + u] = T.float32(0)
            for key in T.unroll(STEP_KEYS):
                a = T.alloc_buffer((TM,), "float32", scope="local")
                for i in T.vectorized(TM):
                    a[i] = ps[(step * STEP_KEYS + key) * (BQ + PAD) + tid // ACROSS * TM + i]
                for g in T.unroll(groups):
                    c = T.alloc_buffer((4,), "float32", scope="local")
                    for u in T.vectorized(4):
                        c[u] = vs[key, g * ACROSS * 4 + tid % ACROSS * 4 + u]
                    for i in T.unroll(TM):
                        for u in T.unroll(4):
                            acc[(i * groups + g) * 4 + u] = (
                                acc[(i * groups + g) * 4 + u] + a[i] * c[u]
                            )

    def gated(gate, acc, total, b, row, col):
        y = acc / (total + T.float32(ATTENTION_EPS))
        return gate[b, row, g_off + col] * y if has_gate else y

    @T.inline
    def store(gate, out, acc, total, b, first_q, first_v, tid):
        for i in T.unroll(TM):
            row = T.meta_var(first_q + tid // ACROSS * TM + i)
            if row < Q:
                for g in T.unroll(groups):
                    for piece in T.unroll(4 // vec_out):
                        at = T.meta_var(g * 4 + piece * vec_out)
                        col = T.meta_var(
                            first_v + g * ACROSS * 4 + tid % ACROSS * 4 + piece * vec_out
                        )
                        if whole_columns:
                            for u in T.vectorized(vec_out):
                                out[b, row, col + u] = gated(
                                    gate, acc[i * groups * 4 + at + u], total[i], b, row, col + u
                                )
                        else:
                            if col < V:
                                for u in T.vectorized(vec_out):
                                    out[b, row, col + u] = gated(
                                        gate, acc[i * groups * 4 + at + u], total[i], b, row,
                                        col + u,
                                    )  # fmt: skip

    @T.inline
    def body(q, k, v, gate, out):
        for block in T.thread_binding(B * row_blocks * column_blocks, thread="blockIdx.x"):
            for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                qs = T.alloc_buffer((STEP_D * (BQ + PAD),), "float32", scope="shared")
                ks = T.alloc_buffer((STEP_D * (TILE_KEYS + PAD),), "float32", scope="shared")
                ps = T.alloc_buffer((TILE_KEYS * (BQ + PAD),), "float32", scope="shared")
                vs = T.alloc_buffer((STEP_KEYS, BV), "float32", scope="shared")
                s = T.alloc_buffer((TM * THREAD_KEYS,), "float32", scope="local")
                acc = T.alloc_buffer((TM * groups * 4,), "float32", scope="local")
                peak = T.alloc_buffer((TM,), "float32", scope="local")
                total = T.alloc_buffer((TM,), "float32", scope="local")
                rescale = T.alloc_buffer((TM,), "float32", scope="local")
                b = T.meta_var(block // (row_blocks * column_blocks))
                # The longest rows first: causal blocks differ in their work.
                first_q = T.meta_var((row_blocks - 1 - block // column_blocks % row_blocks) * BQ)
                first_v = T.meta_var(block % column_blocks * BV)
                last = T.meta_var(T.min(first_q + BQ + (K - Q), K) if causal else K)
                for i in T.unroll(TM):
                    total[i] = T.float32(0)
                    peak[i] = T.float32(lowest)
                for i in T.unroll(TM * groups * 4):
                    acc[i] = T.float32(0)
                for tile in T.serial(T.ceildiv(last, TILE_KEYS)):
                    scores(q, k, qs, ks, s, b, first_q, tile * TILE_KEYS, tid)
                    weigh(s, ps, peak, total, rescale, first_q, tile * TILE_KEYS, tid)
                    if softmax:
                        for i in T.unroll(TM):
                            for j in T.unroll(groups * 4):
                                acc[i * groups * 4 + j] = acc[i * groups * 4 + j] * rescale[i]
                    mix(v, ps, vs, acc, b, tile * TILE_KEYS, first_v, tid)
                store(gate, out, acc, total, b, first_q, first_v, tid)

    return attention_prim_func(spec, DimVars(), body)
