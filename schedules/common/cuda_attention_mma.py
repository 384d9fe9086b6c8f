"""Softmax attention for GPUs on tensor cores: tensors of a half type, flash style, one pass.

It takes O(T) memory. A block of 4 warps computes ``block_q`` queries and ``columns`` columns of
values.

1. For each tile of 64 keys the warps share the keys: a warp has the scores of 16. Operands come
   through shared memory in steps, as `cuda_attention_copies` says. One barrier a step.
2. A row's maximum is that of 4 lanes (shuffles) and 4 warps (shared memory). Scores become weights
   in float32 registers, are rounded to half and go to shared memory. Sums stay with their thread
   until the end, and are of the weights as they were before rounding.
3. Then the warps share the columns: each multiplies all weights by its ``columns / 4``. Values are
   turned by ``ldmatrix.trans``.
4. Sum and gate are applied on the way out. Causal tiles beyond the last query are skipped.
"""

from __future__ import annotations

from collections.abc import Mapping

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T

from . import decisions
from .attention import ATTENTION_EPS, AttentionSpec
from .attention_blocked import attention_prim_func
from .cuda_attention_copies import (
    CHUNK,
    STAGES,
    STEP_D,
    STEPS_V,
    THREADS,
    TILE_KEYS,
    AttentionCopies,
)
from .cuda_threads import (
    BARRIER_CYCLES,
    L2_BYTES,
    MMA_LATENCY,
    MULTIPROCESSORS,
    WARP,
    exp,
    lanes_max,
    lanes_sum,
)
from .dims import DimVars, ceil_div, known

WARPS = THREADS // WARP
PIECE = 16  # rows of a fragment
BLOCK_Q, COLUMNS = (16, 32, 64), (64, 128, 256)
_SHARED_CYCLES = (
    200  # from scores to weights: two rounds of shuffles, and one through shared memory
)
_FMA = 1024  # a multiprocessor's tensor cores, a cycle


def sample_mma_tiles(sch: Schedule, spec: AttentionSpec) -> None:
    """Sample ``block_q`` and ``columns``."""
    best = min(mma_tiles(spec), key=lambda qc: estimated_cycles(spec, *qc))
    decisions.sample(sch, "block_q", BLOCK_Q, best[0])
    decisions.sample(sch, "columns", COLUMNS, best[1])


def mma_tiles(spec: AttentionSpec) -> list[tuple[int, int]]:
    """Return the tiles that a default is chosen from: ``block_q`` and ``columns``."""
    return [(q, c) for q in BLOCK_Q for c in COLUMNS if c == 64 or c / 2 < spec.value_width]


def estimated_cycles(spec: AttentionSpec, block_q: int, columns: int) -> float:
    """Return the estimated time of a multiprocessor for its share of the blocks.

    A key tile of a block multiplies ``block_q * 64 * (width + columns)``, fetches as many columns
    of 64 keys and ``block_q`` queries, and waits, if the block is alone, at each of its steps.
    """
    batch, q_len, k_len = known((spec.batch, spec.q_len, spec.k_len))
    blocks = batch * ceil_div(q_len, block_q) * ceil_div(spec.value_width, columns)
    share = ceil_div(blocks, MULTIPROCESSORS)
    products = block_q * TILE_KEYS * (spec.width + columns) / _FMA
    fetched = 2 * (TILE_KEYS * (spec.width + columns) + block_q * spec.width) / L2_BYTES
    steps = ceil_div(spec.width, STEP_D) + STEPS_V
    alone = steps * (2 * BARRIER_CYCLES + MMA_LATENCY) + products + _SHARED_CYCLES
    return ceil_div(k_len, TILE_KEYS) * max(alone, share * products, share * fetched)


def mma_attention(spec: AttentionSpec, chosen: Mapping[str, int], dtype: str) -> tirx.PrimFunc:
    """Return the kernel ``(q, k, v[, gate], out)`` of causal softmax attention.

    It calls functions on the memory of ``q``, ``k`` and ``v`` as halves: it is right once
    `stored_as` has made all tensors ``dtype``.
    """
    B, Q, K = known((spec.batch, spec.q_len, spec.k_len))
    V, scale = spec.value_width, spec.scale
    BQ, BV = chosen["block_q"], chosen["columns"]
    R = BQ // PIECE  # fragments of rows, of each warp
    NJ = BV // (WARPS * PIECE)  # pieces of 16 columns of a warp
    row_blocks, column_blocks = ceil_div(Q, BQ), ceil_div(V, BV)
    copies = AttentionCopies(spec, BQ, BV)
    steps_d, steps = copies.steps_d, copies.steps
    row_chunk, value_chunk, fetch = copies.row_chunk, copies.value_chunk, copies.fetch()
    has_gate = spec.has_gate
    lowest = -3.0e38  # below any score: a row's maximum, before there is one

    pairs = V % 2 == 0 and spec.gate_stride % 2 == 0 and spec.gate_offset % 2 == 0

    def weight_chunk(row, chunk):
        return row * TILE_KEYS + (chunk ^ (row % 8)) * CHUNK

    def visible(row, key):
        return T.And(key < K, key <= row + (K - Q))

    @T.inline
    def advance(q, k, v, tiles, b, first_q, first_v, tile, step, count, tid):
        # wait for a step, and start one
        T.call_extern("void", "mega_wait_copies", STAGES - 2)
        T.tvm_storage_sync("shared")
        if step + STAGES - 1 < steps:
            fetch(q, k, v, tiles, b, first_q, first_v, tile, step + STAGES - 1, tid)
        else:
            if tile + 1 < count:
                fetch(q, k, v, tiles, b, first_q, first_v, tile + 1, step + STAGES - 1 - steps, tid)
        T.call_extern("void", "mega_commit_copies")

    @T.inline
    def score(tiles, s, base, warp, lane):
        a = T.alloc_buffer((R * 4,), "uint32", scope="local")
        c = T.alloc_buffer((4,), "uint32", scope="local")
        for d in T.unroll(STEP_D // PIECE):
            for r in T.unroll(R):
                at = T.meta_var(
                    base + TILE_KEYS * STEP_D
                    + row_chunk(r * PIECE + lane % PIECE, d * 2 + lane // PIECE)
                )  # fmt: skip
                T.call_extern("void", "mega_load_matrices", a.data, r * 4, tiles.data, at)
            key = T.meta_var(warp * PIECE + lane // 16 * 8 + lane % 8)
            at = T.meta_var(base + row_chunk(key, d * 2 + lane // 8 % 2))
            T.call_extern("void", "mega_load_matrices", c.data, 0, tiles.data, at)
            for r in T.unroll(R):
                for half in T.unroll(2):
                    T.call_extern(
                        "void", f"mega_mma_{dtype}", s.data, (r * 2 + half) * 4, a.data, r * 4,
                        c.data, half * 2,
                    )  # fmt: skip

    @T.inline
    def weigh(s, ps, shared_peak, peak, total, acc, first_q, first_k, warp, lane):
        part = T.alloc_buffer((R * 2,), "float32", scope="local")
        for i in T.unroll(R * 2):  # rows of a thread: fragment, and one of two, 8 apart
            row = T.meta_var(i // 2 * PIECE + i % 2 * 8 + lane // 4)
            part[i] = T.float32(lowest)
            for e in T.unroll(4):
                key = T.meta_var(first_k + warp * PIECE + e // 2 * 8 + lane % 4 * 2 + e % 2)
                if visible(first_q + row, key):
                    part[i] = T.max(part[i], s[(i // 2 * 2 + e // 2) * 4 + i % 2 * 2 + e % 2])
            lanes_max(part, i, 1, 4)
            if lane % 4 == 0:
                shared_peak[warp * BQ + row] = part[i]
        T.tvm_storage_sync("shared")
        for i in T.unroll(R * 2):
            row = T.meta_var(i // 2 * PIECE + i % 2 * 8 + lane // 4)
            for w in T.unroll(WARPS):
                if w == 0:
                    part[i] = T.max(peak[i], shared_peak[row])
                else:
                    part[i] = T.max(part[i], shared_peak[w * BQ + row])
            rescale = T.alloc_buffer((1,), "float32", scope="local")
            rescale[0] = exp((peak[i] - part[i]) * T.float32(scale))
            peak[i] = part[i]
            total[i] = total[i] * rescale[0]
            for j in T.unroll(NJ * 2):
                for e in T.unroll(2):
                    at = T.meta_var((i // 2 * NJ * 2 + j) * 4 + i % 2 * 2 + e)
                    acc[at] = acc[at] * rescale[0]
            for e in T.unroll(4):
                key = T.meta_var(first_k + warp * PIECE + e // 2 * 8 + lane % 4 * 2 + e % 2)
                at = T.meta_var((i // 2 * 2 + e // 2) * 4 + i % 2 * 2 + e % 2)
                if visible(first_q + row, key):
                    s[at] = exp((s[at] - peak[i]) * T.float32(scale))
                else:
                    s[at] = T.float32(0)
                total[i] = total[i] + s[at]
            for half in T.unroll(2):
                at = T.meta_var((i // 2 * 2 + half) * 4 + i % 2 * 2)
                to = T.meta_var(weight_chunk(row, warp * 2 + half) + lane % 4 * 2)
                T.call_extern("void", "mega_store_pair", ps.data, to, s[at], s[at + 1])

    @T.inline
    def mix(tiles, ps, acc, base, step, warp, lane):
        a = T.alloc_buffer((R * 4,), "uint32", scope="local")
        c = T.alloc_buffer((4,), "uint32", scope="local")
        for r in T.unroll(R):
            at = T.meta_var(weight_chunk(r * PIECE + lane % PIECE, step * 2 + lane // PIECE))
            T.call_extern("void", "mega_load_matrices", a.data, r * 4, ps.data, at)
        for j in T.unroll(NJ):
            key = T.meta_var(lane // 8 % 2 * 8 + lane % 8)
            at = T.meta_var(base + value_chunk(key, (warp * NJ + j) * 2 + lane // 16))
            T.call_extern("void", "mega_load_matrices_transposed", c.data, 0, tiles.data, at)
            for r in T.unroll(R):
                for half in T.unroll(2):
                    T.call_extern(
                        "void", f"mega_mma_{dtype}", acc.data, ((r * NJ + j) * 2 + half) * 4,
                        a.data, r * 4, c.data, half * 2,
                    )  # fmt: skip

    @T.inline
    def store_pair(gate, out, acc, at, total, b, row, col):
        pair = T.alloc_buffer((2,), "float32", scope="local")
        for e in T.unroll(2):
            pair[e] = acc[at + e] / (total + T.float32(ATTENTION_EPS))
        if pairs:
            if col < V:
                if has_gate:
                    g = T.alloc_buffer((2,), "float32", scope="local")
                    start = T.meta_var((b * Q + row) * spec.gate_stride + spec.gate_offset + col)
                    T.call_extern("void", "mega_load_pair", g.data, gate.data, start)
                    for e in T.unroll(2):
                        pair[e] = g[e] * pair[e]
                to = T.meta_var((b * Q + row) * V + col)
                T.call_extern("void", "mega_store_pair", out.data, to, pair[0], pair[1])
        else:
            for e in T.unroll(2):
                if col + e < V:
                    if has_gate:
                        out[b, row, col + e] = gate[b, row, spec.gate_offset + col + e] * pair[e]
                    else:
                        out[b, row, col + e] = pair[e]

    @T.inline
    def store(gate, out, acc, total, shared_total, b, first_q, first_v, warp, lane):
        whole = T.alloc_buffer((1,), "float32", scope="local")
        for i in T.unroll(R * 2):
            lanes_sum(total, i, 1, 4)
            if lane % 4 == 0:
                shared_total[warp * BQ + i // 2 * PIECE + i % 2 * 8 + lane // 4] = total[i]
        T.tvm_storage_sync("shared")
        for i in T.unroll(R * 2):
            row = T.meta_var(i // 2 * PIECE + i % 2 * 8 + lane // 4)
            whole[0] = T.float32(0)
            for w in T.unroll(WARPS):
                whole[0] = whole[0] + shared_total[w * BQ + row]
            if first_q + row < Q:
                for j in T.unroll(NJ * 2):
                    at = T.meta_var((i // 2 * NJ * 2 + j) * 4 + i % 2 * 2)
                    col = T.meta_var(first_v + warp * (BV // WARPS) + j * 8 + lane % 4 * 2)
                    store_pair(gate, out, acc, at, whole[0], b, first_q + row, col)

    @T.inline
    def body(q, k, v, gate, out):
        for block in T.thread_binding(B * row_blocks * column_blocks, thread="blockIdx.x"):
            for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                tiles = T.alloc_buffer((STAGES * copies.stage_size,), dtype, scope="shared")
                ps = T.alloc_buffer((BQ * TILE_KEYS,), dtype, scope="shared")
                shared_peak = T.alloc_buffer((WARPS * BQ,), "float32", scope="shared")
                shared_total = T.alloc_buffer((WARPS * BQ,), "float32", scope="shared")
                s = T.alloc_buffer((R * 8,), "float32", scope="local")
                acc = T.alloc_buffer((R * NJ * 8,), "float32", scope="local")
                peak = T.alloc_buffer((R * 2,), "float32", scope="local")
                total = T.alloc_buffer((R * 2,), "float32", scope="local")
                warp, lane = T.meta_var(tid // WARP), T.meta_var(tid % WARP)
                b = T.meta_var(block // (row_blocks * column_blocks))
                # The longest rows first: causal blocks differ in their work.
                first_q = T.meta_var((row_blocks - 1 - block // column_blocks % row_blocks) * BQ)
                first_v = T.meta_var(block % column_blocks * BV)
                count = T.meta_var(T.ceildiv(T.min(first_q + BQ + (K - Q), K), TILE_KEYS))
                for i in T.unroll(R * 2):
                    total[i] = T.float32(0)
                    peak[i] = T.float32(lowest)
                for i in T.unroll(R * NJ * 8):
                    acc[i] = T.float32(0)
                for step in T.unroll(STAGES - 1):
                    fetch(q, k, v, tiles, b, first_q, first_v, 0, step, tid)
                    T.call_extern("void", "mega_commit_copies")
                for tile in T.serial(count):
                    for i in T.unroll(R * 8):
                        s[i] = T.float32(0)
                    for step in T.serial(steps_d):
                        advance(q, k, v, tiles, b, first_q, first_v, tile, step, count, tid)
                        base = T.meta_var(copies.stage(tile, step))
                        score(tiles, s, base, warp, lane)
                    weigh(
                        s, ps, shared_peak, peak, total, acc, first_q, tile * TILE_KEYS, warp, lane
                    )
                    for step in T.serial(STEPS_V):
                        advance(
                            q, k, v, tiles, b, first_q, first_v, tile, steps_d + step, count, tid
                        )
                        base = T.meta_var(copies.stage(tile, steps_d + step))
                        mix(tiles, ps, acc, base, step, warp, lane)
                store(gate, out, acc, total, shared_total, b, first_q, first_v, warp, lane)

    return attention_prim_func(spec, DimVars(), body)
