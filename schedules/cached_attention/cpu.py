"""How a cached_attention kernel runs on x86.

1. The new frames' keys and values are appended to the cache.
2. The grid is (stream, tile of queries). A tile of ``tile_q`` rows, or a single row, walks over the
   cache in blocks of 64 rows, 64 KB at a width of 256: a block is read from memory once, and is
   still in L2 when its rows serve as values.
3. Scores are dot products over the width, where the cache's rows lie: register tiles of queries by
   ``tile_k`` keys accumulate vectors of partial sums, which are added up at the end. Keys are not
   transposed as in ``gated_attention``: for a single row that would cost more than the scores.
4. An online softmax, as there; then weights times values accumulate in registers.
5. A single row, a step of a stream, reads each byte of the cache once, and memory bounds it. It
   prefetches: the next keys while it scores, the next block's rows while it mixes. Eight rows that
   are read side by side are no stream that the hardware would follow (64 streams of 1024 frames,
   width 256: 29 ms a step without, 18 with; 11 and 19 GB/s for the cache, of 22 for a copy).
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.attention import ATTENTION_EPS
from ..common.cpu_features import VectorUnit, vector_unit
from ..common.dims import DimVars
from ..common.kernel import ScheduledKernel
from ..common.prefetch import INTO_L2, READ, prefetch
from ..common.reduce import fold_sum
from ..gated_attention.cpu import softmax
from .naive import CachedAttentionSpec, cached_attention_prim_func

BLOCK = 64  # cache rows that are scored together
ROW_TILE_K = 8  # keys of a register tile beside a single query: chains that hide FMA latency


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``tile_q`` queries by ``tile_k`` keys, the register tile of scores.

    With AVX-512, 4x4 accumulators beside 4 vectors of queries; with AVX2, 2x4 beside 2.
    """
    tile_q = 4 if vector_unit(target).registers == 32 else 2
    decisions.sample(sch, "tile_q", [2, 3, 4, 6], tile_q)
    decisions.sample(sch, "tile_k", [2, 3, 4, 6], 4)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec, chosen = CachedAttentionSpec.of(func), decisions.read(func)
    return ScheduledKernel(_kernel(spec, vector_unit(target), chosen["tile_q"], chosen["tile_k"]))


def _kernel(spec: CachedAttentionSpec, unit: VectorUnit, tile_q: int, tile_k: int) -> tirx.PrimFunc:
    dims = DimVars()
    B, C, Q, N = dims.shape(spec.sizes)
    W, V, v_off, shared = spec.width, spec.value_width, spec.value_offset, spec.shared
    L = unit.lanes
    while L > W or L > V:
        L //= 2
    scoring = softmax(spec.scale, L)
    start, weigh = scoring.start, scoring.weigh
    one_row = isinstance(Q, int) and Q == 1
    full_tiles = 0 if one_row else Q // tile_q
    tasks = 1 if one_row else full_tiles + Q % tile_q  # of a stream
    row_vectors = unit.registers // 2  # accumulators of a single row of output
    tile_vectors = max(1, row_vectors // tile_q)

    @T.inline
    def copy_row(rows, cache, b, c, slot, offset, width):
        for j in T.serial(width // L):
            for lane in T.vectorized(L):
                cache[b, slot, offset + j * L + lane] = rows[b, c, j * L + lane]
        if width % L > 0:
            for lane in T.vectorized(width % L):
                cache[b, slot, offset + width // L * L + lane] = rows[b, c, width // L * L + lane]

    @T.inline
    def append(k, v, lengths, cache):
        for b in T.serial(B):
            for c in T.serial(C):
                slot = T.meta_var((lengths[b] + c) % N)
                copy_row(k, cache, b, c, slot, 0, W)
                if not shared:
                    copy_row(v, cache, b, c, slot, v_off, V)

    @T.inline
    def accumulate(q, cache, acc, b, row, key, n_rows, n_keys, d, n):
        for i in T.unroll(n_rows):
            for j in T.unroll(n_keys):
                for lane in T.vectorized(n):
                    acc[i * n_keys + j, lane] = (
                        acc[i * n_keys + j, lane]
                        + q[b, row + i, d + lane] * cache[b, key + j, d + lane]
                    )

    @T.inline
    def score(q, cache, s, b, row, first, j0, n_rows, n_keys):
        # s[:, j0:j0 + n_keys] = scores of cache rows first + j0, ...
        acc = T.alloc_buffer((n_rows * n_keys, L), "float32", scope="local")
        for i in T.unroll(n_rows * n_keys):
            for lane in T.vectorized(L):
                acc[i, lane] = T.float32(0)
        for d in T.serial(W // L):
            if n_rows == 1:
                for j in T.unroll(n_keys):
                    prefetch(cache[b, first + j0 + n_keys + j, d * L], READ, INTO_L2)
            accumulate(q, cache, acc, b, row, first + j0, n_rows, n_keys, d * L, L)
        if W % L > 0:
            accumulate(q, cache, acc, b, row, first + j0, n_rows, n_keys, W - W % L, W % L)
        for i in T.unroll(n_rows):
            for j in T.unroll(n_keys):
                fold_sum(acc, i * n_keys + j, L)
                s[i, j0 + j] = acc[i * n_keys + j, 0]

    @T.inline
    def score_block(q, cache, s, b, row, first, n_rows, n_keys, tile):
        for t in T.serial(n_keys // tile):
            score(q, cache, s, b, row, first, t * tile, n_rows, tile)
        for t in T.serial(n_keys % tile):
            score(q, cache, s, b, row, first, n_keys - n_keys % tile + t, n_rows, 1)

    @T.inline
    def mix_group(s, cache, o, rescale, b, first, n_rows, n_keys, col, n, step):
        # o[:, col:col + n] = rescale * o + s @ v, in vectors of `step` columns. A block is summed
        # by itself first: one chain of additions over all keys would round like one.
        acc = T.alloc_buffer((n_rows, n), "float32", scope="local")
        for i in T.unroll(n_rows):
            for j in T.unroll(n // step):
                for lane in T.vectorized(step):
                    acc[i, j * step + lane] = T.float32(0)
        for key in T.serial(n_keys):
            if n_rows == 1:
                for j in T.unroll(n // step):
                    prefetch(cache[b, first + BLOCK + key, v_off + col + j * step], READ, INTO_L2)
            for i in T.unroll(n_rows):
                for j in T.unroll(n // step):
                    for lane in T.vectorized(step):
                        acc[i, j * step + lane] = (
                            acc[i, j * step + lane]
                            + s[i, key] * cache[b, first + key, v_off + col + j * step + lane]
                        )
        for i in T.unroll(n_rows):
            for j in T.unroll(n // step):
                for lane in T.vectorized(step):
                    o[i, col + j * step + lane] = (
                        o[i, col + j * step + lane] * rescale[i] + acc[i, j * step + lane]
                    )

    @T.inline
    def mix(s, cache, o, rescale, b, first, n_rows, n_keys, vectors):
        group = T.meta_var(min(vectors * L, V // L * L))
        for c in T.serial(V // group):
            mix_group(s, cache, o, rescale, b, first, n_rows, n_keys, c * group, group, L)
        tail = T.meta_var(V % group // L * L)
        if tail > 0:
            col = T.meta_var(V // group * group)
            mix_group(s, cache, o, rescale, b, first, n_rows, n_keys, col, tail, L)
        if V % L > 0:
            mix_group(s, cache, o, rescale, b, first, n_rows, n_keys, V - V % L, V % L, V % L)

    @T.inline
    def write(o, total, out, b, row, n_rows):
        for i in T.serial(n_rows):
            inverse = T.meta_var(total[i] + T.float32(ATTENTION_EPS))
            for j in T.serial(V // L):
                for lane in T.vectorized(L):
                    out[b, row + i, j * L + lane] = o[i, j * L + lane] / inverse
            if V % L > 0:
                for lane in T.vectorized(V % L):
                    out[b, row + i, V - V % L + lane] = o[i, V - V % L + lane] / inverse

    @T.inline
    def attend(q, lengths, cache, out, b, row, n_rows, tile, vectors):
        s = T.alloc_buffer((n_rows, BLOCK), "float32", scope="local")
        o = T.alloc_buffer((n_rows, V), "float32", scope="local")
        peak = T.alloc_buffer((n_rows,), "float32", scope="local")
        total = T.alloc_buffer((n_rows,), "float32", scope="local")
        rescale = T.alloc_buffer((n_rows,), "float32", scope="local")
        position = T.meta_var(lengths[b] + (C - Q) + row)  # of the first query
        seen = T.meta_var(T.min(position + n_rows, N))
        for i in T.serial(n_rows):
            start(peak, total, i)
            for d in T.serial(V):
                o[i, d] = T.float32(0)
        for p in T.serial((seen + BLOCK - 1) // BLOCK):
            n_keys = T.meta_var(T.min(BLOCK, seen - p * BLOCK))
            score_block(q, cache, s, b, row, p * BLOCK, n_rows, n_keys, tile)
            for i in T.serial(n_rows):
                limit = T.meta_var(T.min(position + i + 1, N))
                weigh(s, peak, total, rescale, i, i, p * BLOCK, limit, (n_keys + L - 1) // L, 1)
            mix(s, cache, o, rescale, b, p * BLOCK, n_rows, n_keys, vectors)
        write(o, total, out, b, row, n_rows)

    @T.inline
    def task(q, lengths, cache, out, b, t):
        if one_row:
            attend(q, lengths, cache, out, b, 0, 1, ROW_TILE_K, row_vectors)
        else:
            if t < full_tiles:
                attend(q, lengths, cache, out, b, t * tile_q, tile_q, tile_k, tile_vectors)
            else:
                row = T.meta_var(full_tiles * tile_q + t - full_tiles)
                attend(q, lengths, cache, out, b, row, 1, ROW_TILE_K, row_vectors)

    @T.inline
    def body(q, k, v, lengths, cache, out):
        append(k, v, lengths, cache)
        if B * Q == 1:  # a parallel region costs about 1 us
            attend(q, lengths, cache, out, 0, 0, 1, ROW_TILE_K, row_vectors)
        else:
            for g in T.parallel(B * tasks):
                task(q, lengths, cache, out, g // tasks, g % tasks)

    return cached_attention_prim_func(spec, dims, body)
