"""Attention of one query a sequence on a GPU: the last row, and the step of a stream.

A block of 8 warps computes 64 columns of one sequence's output, and all its scores for itself: keys
are as long as values, so the blocks of a row read twice what they need, from L2, and need no second
launch to meet. For each tile of 256 keys:

1. A warp takes a key at a time: its lanes multiply along the width, and add up by shuffles.
2. Scores become weights; every warp finds maximum and sum for itself.
3. 64 threads side by side hold a column each, in 4 groups that share the keys between them; the
   groups' outputs meet in shared memory at the end.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .attention import ATTENTION_EPS, AttentionSpec
from .attention_blocked import attention_prim_func
from .cuda_scoring import Scoring
from .cuda_threads import WARP, lanes_max, lanes_sum
from .dims import DimVars, ceil_div, known

THREADS = 256
WARPS = THREADS // WARP
COLUMNS = 64
GROUPS = THREADS // COLUMNS
TILE_KEYS = THREADS


def row_attention(spec: AttentionSpec, scoring: Scoring) -> tirx.PrimFunc:
    """Return the kernel ``(q, k, v[, gate], out)`` for ``q_len == 1``."""
    B, K, W, V = known((spec.batch, spec.k_len, spec.width, spec.value_width))
    q_off, k_off, v_off, g_off = spec.q_offset, spec.k_offset, spec.v_offset, spec.gate_offset
    has_gate, softmax = spec.has_gate, scoring.softmax
    column_blocks = ceil_div(V, COLUMNS)
    lowest = -3.0e38  # below any score

    @T.inline
    def score_keys(q, k, s, b, first, tid):
        part = T.alloc_buffer((1,), "float32", scope="local")
        for i in T.serial(TILE_KEYS // WARPS):
            key = T.meta_var(first + i * WARPS + tid // WARP)
            if key < K:
                part[0] = T.float32(0)
                for d in T.serial(ceil_div(W, WARP)):
                    if d * WARP + tid % WARP < W:
                        part[0] = scoring.accumulate(
                            part[0],
                            q[b, 0, q_off + d * WARP + tid % WARP],
                            k[b, key, k_off + d * WARP + tid % WARP],
                        )
                lanes_sum(part, 0, 1, WARP)
                if tid % WARP == 0:
                    s[i * WARPS + tid // WARP] = part[0]

    @T.inline
    def weigh(s, ps, peak, total, rescale, first, tid):
        part = T.alloc_buffer((1,), "float32", scope="local")
        if softmax:
            part[0] = T.float32(lowest)
            for i in T.serial(TILE_KEYS // WARP):
                if first + i * WARP + tid % WARP < K:
                    part[0] = T.max(part[0], s[i * WARP + tid % WARP])
            lanes_max(part, 0, 1, WARP)
            part[0] = T.max(part[0], peak[0])
            rescale[0] = scoring.weight(peak[0], part[0])
            peak[0] = part[0]
            total[0] = total[0] * rescale[0]
        if first + tid < K:
            ps[tid] = scoring.weight(s[tid], peak[0])
        else:
            ps[tid] = T.float32(0)
        part[0] = T.float32(0)
        for i in T.serial(TILE_KEYS // WARP):
            part[0] = part[0] + ps[i * WARP + tid % WARP]
        lanes_sum(part, 0, 1, WARP)
        total[0] = total[0] + part[0]

    @T.inline
    def mix(v, ps, acc, b, first, col, group):
        if col < V:
            for i in T.serial(TILE_KEYS // GROUPS):
                if first + i * GROUPS + group < K:
                    acc[0] = (
                        acc[0]
                        + ps[i * GROUPS + group] * v[b, first + i * GROUPS + group, v_off + col]
                    )

    @T.inline
    def store(gate, out, acc, sums, total, b, first_v, tid):
        sums[tid // COLUMNS, tid % COLUMNS] = acc[0]
        if T.And(tid < COLUMNS, first_v + tid < V):
            acc[0] = T.float32(0)
            for group in T.unroll(GROUPS):
                acc[0] = acc[0] + sums[group, tid]
            y = T.meta_var(acc[0] / (total[0] + T.float32(ATTENTION_EPS)))
            if has_gate:
                out[b, 0, first_v + tid] = gate[b, 0, g_off + first_v + tid] * y
            else:
                out[b, 0, first_v + tid] = y

    @T.inline
    def body(q, k, v, gate, out):
        for block in T.thread_binding(B * column_blocks, thread="blockIdx.x"):
            for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                s = T.alloc_buffer((TILE_KEYS,), "float32", scope="shared")
                ps = T.alloc_buffer((TILE_KEYS,), "float32", scope="shared")
                sums = T.alloc_buffer((GROUPS, COLUMNS), "float32", scope="shared")
                acc = T.alloc_buffer((1,), "float32", scope="local")
                peak = T.alloc_buffer((1,), "float32", scope="local")
                total = T.alloc_buffer((1,), "float32", scope="local")
                rescale = T.alloc_buffer((1,), "float32", scope="local")
                b = T.meta_var(block // column_blocks)
                first_v = T.meta_var(block % column_blocks * COLUMNS)
                acc[0] = T.float32(0)
                total[0] = T.float32(0)
                peak[0] = T.float32(lowest)
                for tile in T.serial(ceil_div(K, TILE_KEYS)):
                    score_keys(q, k, s, b, tile * TILE_KEYS, tid)
                    weigh(s, ps, peak, total, rescale, tile * TILE_KEYS, tid)
                    if softmax:
                        acc[0] = acc[0] * rescale[0]
                    mix(v, ps, acc, b, tile * TILE_KEYS, first_v + tid % COLUMNS, tid // COLUMNS)
                store(gate, out, acc, sums, total, b, first_v, tid)

    return attention_prim_func(spec, DimVars(), body)
