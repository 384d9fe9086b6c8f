"""The blocked attention kernel on x86, shared by both attention forms.

1. Keys are transposed into panels ``[width, panel]``, so that a vector holds one component of a
   vector's worth of keys: all of them at first, or, where one block has all queries, each span's
   as the block comes to it.
2. The grid is (batch, query block). A block walks over spans of ``span_panels`` key panels; within
   a span, register tiles of ``tile_q`` queries by one panel of keys accumulate their scores over
   the width. A panel of keys and values takes 128 KB at width 256, and a span of them stays in L2
   for all tiles of the block.
3. Scores of a span become weights a row at a time (the one step in which the two forms differ).
4. Weights times values: register tiles of ``tile_q`` queries by one group of value columns
   accumulate over the span's keys, onto the block's running output.
5. After the last span: times the inverse of the sum of weights, and the gate. Where one span holds
   all keys there is no running output, and a tile's accumulators become the output at once.

Memory beside inputs and output: the transposed keys (of one span, where one block has all queries),
and per thread one block of output. A causal
form skips panels, and keys within a panel, that no query of a tile may see.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T

from .attention import ATTENTION_EPS, AttentionSpec
from .dims import DimVars, Extent, ceil_div
from .row_tiles import RowTiles, opaque
from .transpose import transposed


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Sizes: vector lanes, queries and vectors of a tile, panels of a span, tiles of a block."""

    lanes: int
    tile_q: int
    panel_vectors: int
    span_panels: int
    block_tiles: int


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How an attention form scores a key and makes weights of scores.

    Parameters
    ----------
    accumulate : callable
        ``(acc, q, k) -> acc`` for one component of the width.
    weight : callable
        ``(score, peak) -> weight`` of one key.
    start : inline
        ``(peak, total, r)``: reset the running values of row ``r``.
    weigh : inline
        ``(s, peak, total, rescale, r, i, first, limit, vectors)``: turn the scores ``s[i, :]`` of
        the keys ``first, first + 1, ...``, so many vectors of them, into weights; those at
        ``limit`` and beyond become 0. Updates the running values of row ``r``, and stores in
        ``rescale[i]`` the factor by which the row's earlier output must shrink.
    rescales : bool
        Whether ``rescale`` can differ from 1.
    causal : bool
        Whether a query sees only keys up to its own position.
    """

    accumulate: Callable[[tirx.PrimExpr, tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    weight: Callable[[tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    start: Callable[..., None]
    weigh: Callable[..., None]
    rescales: bool
    causal: bool


def blocked_attention(spec: AttentionSpec, blocking: Blocking, scoring: Scoring) -> tirx.PrimFunc:
    """Return the blocked kernel ``(q, k, v[, gate], out)``."""
    dims = DimVars()
    B, Q, K = dims.shape((spec.batch, spec.q_len, spec.k_len))
    W, V, L = spec.width, spec.value_width, blocking.lanes
    tile_q = min(blocking.tile_q, Q) if isinstance(Q, int) else blocking.tile_q
    panel = blocking.panel_vectors * L
    span_panels = blocking.span_panels
    if isinstance(K, int):
        span_panels = min(span_panels, ceil_div(K, panel))
    span = span_panels * panel
    first_pos = K - Q  # position of query row 0
    panels = ceil_div(K, panel)
    # Queries of a known number among keys that a call brings: a piece of a long sequence, which one
    # thread runs.
    span_by_span = isinstance(Q, int) and not isinstance(K, int)
    block_rows = Q if span_by_span else blocking.block_tiles * tile_q  # of a block's memory
    hide = opaque if not (isinstance(Q, int) and isinstance(K, int)) else lambda value: value
    group = min(panel, V // L * L) if L <= V else V  # value columns of a register tile
    groups, tail = V // group, V % group
    step = min(L, group)
    one_span = isinstance(K, int) and ceil_div(K, panel) <= blocking.span_panels
    q_off, k_off, v_off, g_off = spec.q_offset, spec.k_offset, spec.v_offset, spec.gate_offset
    has_gate, causal, rescales = spec.has_gate, scoring.causal, scoring.rescales
    accumulate, start, weigh = scoring.accumulate, scoring.start, scoring.weigh

    @T.inline
    def pack_columns(k, kt, b, p, at, d0, n):
        # n components of every key of a panel, an element at a time
        for j in T.serial(panel):
            for d in T.serial(n):
                kt[at, d0 + d, j] = k[b, T.min(p * panel + j, K - 1), k_off + d0 + d]

    @T.inline
    def store_column(kt, square, at, d, j):
        kt[at, d, T.Ramp(j, 1, L)] = square

    def pack_square(k, kt, b, p, at, d0, j0):
        # L components of L keys. Behind the last key it stands again: nobody looks at it.
        keys = [T.min(p * panel + j0 + j, K - 1) for j in range(L)]
        rows = [k[b, key, T.Ramp(k_off + d0, 1, L)] for key in keys]
        for d, column in enumerate(transposed(rows)):
            store_column(kt, column, at, d0 + d, j0)

    @T.inline
    def pack_panel(k, kt, b, p, at):
        for j in T.serial(panel // L):
            for c in T.serial(W // L):
                pack_square(k, kt, b, p, at, c * L, j * L)
        if W % L > 0:
            pack_columns(k, kt, b, p, at, W - W % L, W % L)

    @T.inline
    def score(q, kt, s, b, row, p, at, n_rows, vectors):
        # s[:, at:at + vectors * L] = scores of the first keys of the panel at kt[p]
        acc = T.alloc_buffer((n_rows, vectors * L), "float32", scope="local")
        for i in T.unroll(n_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    acc[i, j * L + lane] = T.float32(0)
        for d in T.serial(W):
            for i in T.unroll(n_rows):
                for j in T.unroll(vectors):
                    for lane in T.vectorized(L):
                        acc[i, j * L + lane] = accumulate(
                            acc[i, j * L + lane],
                            q[b, row + i, q_off + d],
                            kt[p, d, j * L + lane],
                        )
        for i in T.unroll(n_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    s[i, at + j * L + lane] = acc[i, j * L + lane]

    @T.inline
    def write(mixed, r, at, inverse, i, gate, out, b, row, col, n):
        # n columns of a row's output
        for lane in T.vectorized(n):
            value = T.meta_var(mixed[r, at + lane] * inverse[i])
            if has_gate:
                out[b, row, col + lane] = gate[b, row, g_off + col + lane] * value
            else:
                out[b, row, col + lane] = value

    @T.inline
    def mix_group(s, v, gate, out, o, factor, b, row, r, first, n_keys, n_rows, col, n, step):
        # o[r:r+n_rows, col:col+n] += s @ v, in vectors of `step` columns; of one span, the output.
        # A span is summed by itself first: one chain of additions over all keys would round like
        # one.
        acc = T.alloc_buffer((n_rows, n), "float32", scope="local")
        for i in T.unroll(n_rows):
            for j in T.unroll(n // step):
                for lane in T.vectorized(step):
                    acc[i, j * step + lane] = T.float32(0)
        for key in T.serial(n_keys):
            for i in T.unroll(n_rows):
                for j in T.unroll(n // step):
                    for lane in T.vectorized(step):
                        acc[i, j * step + lane] = (
                            acc[i, j * step + lane]
                            + s[i, key] * v[b, first + key, v_off + col + j * step + lane]
                        )
        for i in T.unroll(n_rows):
            for j in T.unroll(n // step):
                if one_span:
                    at = T.meta_var(j * step)
                    write(acc, i, at, factor, i, gate, out, b, row + i, col + at, step)
                elif first == 0:
                    for lane in T.vectorized(step):
                        o[r + i, col + j * step + lane] = acc[i, j * step + lane]
                else:
                    for lane in T.vectorized(step):
                        if rescales:
                            o[r + i, col + j * step + lane] = (
                                o[r + i, col + j * step + lane] * factor[i]
                                + acc[i, j * step + lane]
                            )
                        else:
                            o[r + i, col + j * step + lane] = (
                                o[r + i, col + j * step + lane] + acc[i, j * step + lane]
                            )

    @T.inline
    def mix(*arguments):
        for c in T.serial(groups):
            mix_group(*arguments, c * group, group, step)
        if tail >= L:
            mix_group(*arguments, groups * group, tail // L * L, L)
        if tail % L > 0:
            mix_group(*arguments, V - tail % L, tail % L, tail % L)

    def score_panel(*arguments, seen, vectors=1):
        # On the diagonal, no more vectors of a panel than a query of the tile may see.
        if not causal or vectors == blocking.panel_vectors:
            return score(*arguments, blocking.panel_vectors)
        with T.If(seen <= vectors * L):
            with T.Then():
                score(*arguments, vectors)
            with T.Else():
                score_panel(*arguments, seen=seen, vectors=vectors + 1)
        return None

    @T.inline
    def tile(q, kt, v, gate, out, s, o, peak, total, b, row, r, first, n_rows):
        # Keys of this span that the tile's last row may see.
        seen = T.meta_var(hide(T.min(span, (first_pos + row + n_rows if causal else K) - first)))
        if seen > 0:
            factor = T.alloc_buffer((n_rows,), "float32", scope="local")
            base = T.meta_var(0 if span_by_span else b * panels + first // panel)
            if span_panels == 1:
                score_panel(q, kt, s, b, row, base, 0, n_rows, seen=seen)
            else:
                for p in T.serial((seen + panel - 1) // panel):
                    at = T.meta_var(p * panel)
                    score_panel(q, kt, s, b, row, base + p, at, n_rows, seen=seen - at)
            for i in T.serial(n_rows):
                limit = T.meta_var(first_pos + row + i + 1 if causal else K)
                vectors = T.meta_var((seen + L - 1) // L)
                weigh(s, peak, total, factor, r + i, i, first, limit, vectors)
                if one_span:
                    factor[i] = T.float32(1) / (total[r + i] + T.float32(ATTENTION_EPS))
            mix(s, v, gate, out, o, factor, b, row, r, first, seen, n_rows)

    @T.inline
    def finish(o, total, gate, out, b, row, r):
        inverse = T.alloc_buffer((1,), "float32", scope="local")
        inverse[0] = T.float32(1) / (total[r] + T.float32(ATTENTION_EPS))
        for d in T.serial(V // L):
            write(o, r, d * L, inverse, 0, gate, out, b, row, d * L, L)
        if V % L > 0:
            write(o, r, V - V % L, inverse, 0, gate, out, b, row, V - V % L, V % L)

    def rows_of(tiles, nth, block_tiles):
        # First tile, tiles, first row and rows of a block.
        if span_by_span:
            return 0, tiles.count, 0, Q
        first = hide(nth * block_tiles)
        n_tiles = hide(T.min(block_tiles, tiles.count - first))
        row0 = hide(tiles.start(first))
        return first, n_tiles, row0, hide(tiles.start(first + n_tiles) - row0)

    @T.inline
    def block(q, k, kt, v, gate, out, tiles, b, nth, block_tiles):
        # Of one span, nothing is written there.
        scope = T.meta_var("global" if span_by_span else "local")  # no stack holds 256 rows
        o = T.alloc_buffer((1 if one_span else block_rows, V), "float32", scope=scope)
        s = T.alloc_buffer((tile_q, span), "float32", scope="local")
        peak = T.alloc_buffer((block_rows,), "float32", scope="local")
        total = T.alloc_buffer((block_rows,), "float32", scope="local")
        first, n_tiles, row0, n_rows = T.meta_var(rows_of(tiles, nth, block_tiles))
        for r in T.serial(n_rows):
            start(peak, total, r)
        last_key = T.meta_var(first_pos + row0 + n_rows if causal else K)
        for p in T.serial(hide(ceil_div(last_key, span))):
            if span_by_span:
                left = T.meta_var(hide(ceil_div(last_key, panel) - p * span_panels))
                for i in T.serial(T.min(span_panels, left)):
                    pack_panel(k, kt, b, p * span_panels + i, i)
            for t in T.serial(n_tiles):
                row = T.meta_var(hide(tiles.start(first + t)))
                r = T.meta_var(hide(row - row0))
                tiles.emit(
                    first + t, tile, q, kt, v, gate, out, s, o, peak, total, b, row, r, p * span
                )
        if not one_span:
            for r in T.serial(n_rows):
                finish(o, total, gate, out, b, row0 + r, r)

    @T.inline
    def body(q, k, v, gate, out):
        tiles = T.meta_var(RowTiles(Q, tile_q))
        if span_by_span:
            kt = T.alloc_buffer((span_panels, W, panel), "float32")
            for b in T.serial(B):
                block(q, k, kt, v, gate, out, tiles, b, 0, tiles.count)
        else:
            kt = T.alloc_buffer((B * panels, W, panel), "float32")
            most = T.meta_var(blocking.block_tiles)
            block_tiles = T.meta_var(hide(balanced_tiles(tiles.count, most, causal)))
            blocks = T.meta_var(hide(ceil_div(tiles.count, block_tiles)))
            for g in T.parallel(B * panels):
                pack_panel(k, kt, hide(g // panels), hide(g % panels), g)
            for g in T.parallel(B * blocks):
                u = T.meta_var(g % blocks)
                nth = T.meta_var(hide(T.if_then_else(u % 2 == 0, u // 2, blocks - 1 - u // 2)))
                block(q, k, kt, v, gate, out, tiles, hide(g // blocks), nth, block_tiles)

    return attention_prim_func(spec, dims, body)


def balanced_tiles(tiles: Extent, most: int, causal: bool) -> Extent:
    """Return the tiles of a block: no more than ``most``, and so that two cores have equal work.

    Threads take contiguous ranges of blocks. A causal block costs more the later it lies; the
    order is the first, the last, the second, the last but one, ..., so that many blocks split
    evenly. Of few tiles the blocks must be small: 10 tiles in blocks of 5 would give one thread 40
    of 55 units of work, and in blocks of 2 at most 29.
    """
    if not isinstance(tiles, int):
        return T.min(most, ceil_div(tiles, 2))

    def longest(block_tiles: int) -> int:
        blocks = ceil_div(tiles, block_tiles)
        order = [u // 2 if u % 2 == 0 else blocks - 1 - u // 2 for u in range(blocks)]
        work = [
            sum(t + 1 if causal else 1 for t in range(nth * block_tiles, tiles)[:block_tiles])
            for nth in order
        ]
        half = ceil_div(blocks, 2)
        return max(sum(work[:half]), sum(work[half:]))

    choices = {n: longest(n) for n in range(1, min(most, tiles) + 1)}
    # 2% of balance are not worth a second pass over the keys.
    return max(n for n, cost in choices.items() if cost <= 1.02 * min(choices.values()))


def attention_prim_func(
    spec: AttentionSpec, dims: DimVars, body: Callable[..., None]
) -> tirx.PrimFunc:
    """Wrap ``body(q, k, v, gate, out)`` in the PrimFunc of a spec, with or without a gate."""
    B, Q, K = dims.shape((spec.batch, spec.q_len, spec.k_len))
    V = spec.value_width
    q_shape, k_shape, v_shape = (B, Q, spec.q_stride), (B, K, spec.k_stride), (B, K, spec.v_stride)
    gate_shape = (B, Q, spec.gate_stride)
    if spec.has_gate:

        @T.prim_func(s_tir=True, private=True)
        def gated(
            q: T.Buffer(q_shape, "float32"),
            k: T.Buffer(k_shape, "float32"),
            v: T.Buffer(v_shape, "float32"),
            gate: T.Buffer(gate_shape, "float32"),
            out: T.Buffer((B, Q, V), "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            body(q, k, v, gate, out)

        return gated

    @T.prim_func(s_tir=True, private=True)
    def ungated(
        q: T.Buffer(q_shape, "float32"),
        k: T.Buffer(k_shape, "float32"),
        v: T.Buffer(v_shape, "float32"),
        out: T.Buffer((B, Q, V), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        body(q, k, v, q, out)

    return ungated
