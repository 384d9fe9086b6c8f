"""The attention kernel on x86 for one query row a batch element, shared by both attention forms.

The last block of a model, and a step of a stream, need one row. Keys are then read once, as they
lie: transposing them would cost more than the scores. Scores are dot products over the width in
independent partial sums; weighted values accumulate in registers over all keys.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .attention import ATTENTION_EPS, AttentionSpec
from .attention_blocked import attention_prim_func
from .attention_scoring import Scoring
from .dims import DimVars
from .reduce import fold_max, fold_sum

# Vectors of partial sums, which hide the latency of one FMA chain (4 cycles, 1 to 2 a cycle).
UNROLL = 4
# Value columns accumulated in one pass over the weights.
GROUP_VECTORS = 8


def row_attention(spec: AttentionSpec, lanes: int, scoring: Scoring) -> tirx.PrimFunc:
    """Return the kernel ``(q, k, v[, gate], out)`` for ``q_len == 1``."""
    dims = DimVars()
    B, K = dims.shape((spec.batch, spec.k_len))
    W, V, L = spec.width, spec.value_width, lanes
    while L > W or L > V:
        L //= 2
    wide = L * UNROLL
    steps, rest = W // wide, W % wide
    group = min(L * GROUP_VECTORS, V // L * L)
    groups, tail = V // group, V % group
    q_off, k_off, v_off, g_off = spec.q_offset, spec.k_offset, spec.v_offset, spec.gate_offset
    has_gate, softmax = spec.has_gate, scoring.rescales
    accumulate, weight = scoring.accumulate, scoring.weight

    @T.inline
    def partial(q, k, acc, b, j, at, col, n):
        for lane in T.vectorized(n):
            acc[0, at + lane] = accumulate(
                acc[0, at + lane], q[b, 0, q_off + col + lane], k[b, j, k_off + col + lane]
            )

    @T.inline
    def score(q, k, s, b, j):
        acc = T.alloc_buffer((1, wide), "float32", scope="local")
        for lane in T.vectorized(wide):
            acc[0, lane] = T.float32(0)
        for d in T.serial(steps):
            for u in T.unroll(UNROLL):
                partial(q, k, acc, b, j, u * L, d * wide + u * L, L)
        for u in T.unroll(rest // L):
            partial(q, k, acc, b, j, u * L, steps * wide + u * L, L)
        if rest % L > 0:
            partial(q, k, acc, b, j, 0, W - rest % L, rest % L)
        fold_sum(acc, 0, wide)
        s[j] = acc[0, 0]

    @T.inline
    def weigh(s, peak, total):
        # s: scores to weights; total[0, 0]: their sum
        part = T.alloc_buffer((1, L), "float32", scope="local")
        if softmax:
            for lane in T.vectorized(L):
                part[0, lane] = T.min_value("float32")
            for j in T.serial(K // L):
                for lane in T.vectorized(L):
                    part[0, lane] = T.max(part[0, lane], s[j * L + lane])
            for j in T.serial(K % L):
                part[0, 0] = T.max(part[0, 0], s[K - K % L + j])
            fold_max(part, 0, L)
            peak[0] = part[0, 0]
        for lane in T.vectorized(L):
            total[0, lane] = T.float32(0)
        for j in T.serial(K // L):
            for lane in T.vectorized(L):
                s[j * L + lane] = weight(s[j * L + lane], peak[0])
            for lane in T.vectorized(L):
                total[0, lane] = total[0, lane] + s[j * L + lane]
        for j in T.serial(K % L):
            s[K - K % L + j] = weight(s[K - K % L + j], peak[0])
            total[0, 0] = total[0, 0] + s[K - K % L + j]
        fold_sum(total, 0, L)

    @T.inline
    def mix(s, v, gate, out, total, b, col, n, step):
        acc = T.alloc_buffer((n,), "float32", scope="local")
        for j in T.unroll(n // step):
            for lane in T.vectorized(step):
                acc[j * step + lane] = T.float32(0)
        for key in T.serial(K):
            for j in T.unroll(n // step):
                for lane in T.vectorized(step):
                    acc[j * step + lane] = (
                        acc[j * step + lane] + s[key] * v[b, key, v_off + col + j * step + lane]
                    )
        for j in T.unroll(n // step):
            for lane in T.vectorized(step):
                y = T.meta_var(acc[j * step + lane] / (total[0, 0] + T.float32(ATTENTION_EPS)))
                if has_gate:
                    out[b, 0, col + j * step + lane] = gate[b, 0, g_off + col + j * step + lane] * y
                else:
                    out[b, 0, col + j * step + lane] = y

    @T.inline
    def row(q, k, v, gate, out, b):
        s = T.alloc_buffer((K,), "float32")
        peak = T.alloc_buffer((1,), "float32", scope="local")
        total = T.alloc_buffer((1, L), "float32", scope="local")
        for j in T.serial(K):
            score(q, k, s, b, j)
        weigh(s, peak, total)
        for c in T.serial(groups):
            mix(s, v, gate, out, total, b, c * group, group, L)
        if tail >= L:
            mix(s, v, gate, out, total, b, groups * group, tail // L * L, L)
        if tail % L > 0:
            mix(s, v, gate, out, total, b, V - tail % L, tail % L, tail % L)

    @T.inline
    def body(q, k, v, gate, out):
        for b in T.parallel(B):
            row(q, k, v, gate, out, b)

    return attention_prim_func(spec, dims, body)
