"""The blocked attention kernel on x86, shared by both attention forms.

1. Keys are transposed into panels ``[width, panel]``, so that a vector holds one component of a
   vector's worth of keys.
2. The grid is (batch, query block). A block walks over spans of ``span_panels`` key panels; within
   a span, register tiles of ``tile_q`` queries by one panel of keys accumulate their scores over
   the width (`attention_scores`). A panel of keys and values takes 128 KB at width 256, and a span
   of them stays in L2 for all tiles of the block.
3. Scores of a span become weights, all rows of a tile together (the one step in which the two
   forms differ).
4. Weights times values: register tiles of ``tile_q`` queries by one group of value columns
   accumulate over the span's keys, onto the block's running output.
5. After the last span: times the inverse of the sum of weights, and the gate. Where one span holds
   all keys there is no running output, and a tile's accumulators become the output at once.

Of few keys each block can transpose those that it sees by itself (``own_keys``): threads then need
not wait for each other in between, nor fetch keys from each other's cache.

A piece of a long sequence (`mega_tvm.passes.split_rows`) transposes the keys of one span at a time.

Memory beside inputs and output: the transposed keys, and per thread one block of output. A causal
form skips panels, and keys within a panel, that no query of a tile may see.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T

from .attention import ATTENTION_EPS, AttentionSpec
from .attention_blocks import balanced_tiles, split_tiles, splits
from .attention_panels import key_packer
from .attention_scores import SUMS, key_summer, panel_rows, query_summer, tile_scorer
from .attention_scoring import Scoring
from .attention_tiles import Blocking
from .dims import DimVars, ceil_div
from .reduce import clear
from .row_tiles import RowTiles, opaque


def blocked_attention(spec: AttentionSpec, blocking: Blocking, scoring: Scoring) -> tirx.PrimFunc:
    """Return the blocked kernel ``(q, k, v[, gate], out)``."""
    dims = DimVars()
    B, Q, K = dims.shape((spec.batch, spec.q_len, spec.k_len))
    W, V, L, value_lanes = spec.width, spec.value_width, blocking.lanes, blocking.value_lanes
    tile_q = min(blocking.tile_q, Q) if isinstance(Q, int) else blocking.tile_q
    panel = blocking.panel_vectors * L
    span_panels = blocking.span_panels
    if isinstance(K, int):
        span_panels = min(span_panels, ceil_div(K, panel))
    span = span_panels * panel
    first_pos = K - Q  # position of query row 0
    block_rows = blocking.block_tiles * tile_q  # of a block's memory
    # Queries of a known number among keys that a call brings: a piece of a long sequence, which one
    # thread runs.
    span_by_span = isinstance(Q, int) and not isinstance(K, int)
    hide = opaque if not (isinstance(Q, int) and isinstance(K, int)) else lambda value: value
    # value columns of a register tile
    most = blocking.panel_vectors * L
    group = min(max(most, value_lanes), V // value_lanes * value_lanes) if value_lanes <= V else V
    groups, tail = V // group, V % group
    step = min(value_lanes, group)
    panels = ceil_div(K, panel)
    own_keys = blocking.own_keys
    whole = own_keys and not splits(spec)
    one_span = isinstance(K, int) and ceil_div(K, panel) <= blocking.span_panels
    v_off, g_off = spec.v_offset, spec.gate_offset
    has_gate, causal, rescales = spec.has_gate, scoring.causal, scoring.rescales
    start, weigh = scoring.start, scoring.weigh

    pack_keys = key_packer(spec, K, panel, L)
    score = tile_scorer(spec, scoring, L)
    sum_keys = key_summer(spec, blocking.panel_vectors, L)
    sum_query = query_summer(spec, value_lanes)
    summed, rows = scoring.shortcut is not None, panel_rows(W, scoring)

    @T.inline
    def pack_panel(k, kt, b, to, p, slot, vectors):
        pack_keys(k, kt, b, to, p, slot, vectors)
        if summed:
            sum_keys(kt, to, slot)

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
        clear(acc, n_rows, n // step, step)
        # On the diagonal each of the last keys is seen by one row less.
        diagonal = T.meta_var(n_rows - 1 if causal and one_span else 0)
        for key in T.serial(n_keys - diagonal):
            for i in T.unroll(n_rows):
                for j in T.unroll(n // step):
                    for lane in T.vectorized(step):
                        acc[i, j * step + lane] = (
                            acc[i, j * step + lane]
                            + s[i, key] * v[b, first + key, v_off + col + j * step + lane]
                        )
        for t in T.unroll(diagonal):
            key = T.meta_var(n_keys - diagonal + t)
            for i in T.unroll(n_rows):
                if i > t:
                    for j in T.unroll(n // step):
                        for lane in T.vectorized(step):
                            at = T.meta_var(v_off + col + j * step + lane)
                            acc[i, j * step + lane] = (
                                acc[i, j * step + lane] + s[i, key] * v[b, first + key, at]
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
        if tail >= step:
            mix_group(*arguments, groups * group, tail // step * step, step)
        if tail % step > 0:
            mix_group(*arguments, V - tail % step, tail % step, tail % step)

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
    def tile(q, kt, v, gate, out, s, o, sums, peak, total, b, to, row, r, first, n_rows):
        # Keys of this span that the tile's last row may see.
        seen = T.meta_var(hide(T.min(span, (first_pos + row + n_rows if causal else K) - first)))
        if seen > 0:
            factor = T.alloc_buffer((n_rows,), "float32", scope="local")
            slot = T.meta_var(0 if span_by_span else first // panel)
            if span_panels == 1:
                score_panel(q, kt, sums, s, b, to, row, r, slot, 0, n_rows, seen=seen)
            else:
                for p in T.serial((seen + panel - 1) // panel):
                    at = T.meta_var(p * panel)
                    score_panel(q, kt, sums, s, b, to, row, r, slot + p, at, n_rows, seen=seen - at)
            vectors = T.meta_var((seen + L - 1) // L)
            limit = T.meta_var(first_pos + row + 1 if causal else K)
            weigh(s, peak, total, factor, r, 0, first, limit, vectors, n_rows)
            if one_span:
                for i in T.unroll(n_rows):
                    factor[i] = T.float32(1) / (total[r + i] + T.float32(ATTENTION_EPS))
            mix(s, v, gate, out, o, factor, b, row, r, first, seen, n_rows)

    @T.inline
    def finish(o, total, gate, out, b, row, r):
        inverse = T.alloc_buffer((1,), "float32", scope="local")
        inverse[0] = T.float32(1) / (total[r] + T.float32(ATTENTION_EPS))
        for d in T.serial(V // step):
            write(o, r, d * step, inverse, 0, gate, out, b, row, d * step, step)
        if V % step > 0:
            write(o, r, V - V % step, inverse, 0, gate, out, b, row, V - V % step, V % step)

    @T.inline
    def block(q, k, kt, v, gate, out, tiles, b, to, first, n_tiles, most_rows):
        # Of one span, nothing is written to o.
        scope = T.meta_var("global" if span_by_span else "local")  # no stack holds 256 rows
        o = T.alloc_buffer((1 if one_span else most_rows, V), "float32", scope=scope)
        s = T.alloc_buffer((tile_q, span), "float32", scope="local")
        peak = T.alloc_buffer((most_rows,), "float32", scope="local")
        total = T.alloc_buffer((most_rows,), "float32", scope="local")
        row0 = T.meta_var(hide(tiles.start(first)))
        n_rows = T.meta_var(hide(tiles.start(first + n_tiles) - row0))
        last_key = T.meta_var(first_pos + row0 + n_rows if causal else K)
        if own_keys:
            if panels == 1:
                pack_panel(k, kt, b, to, 0, 0, ceil_div(last_key, L))
            else:
                for p in T.serial(ceil_div(last_key, panel)):
                    pack_panel(k, kt, b, to, p, p, panel // L)
        sums = T.alloc_buffer((SUMS, most_rows if summed else 1), "float32", scope="local")
        for r in T.serial(n_rows):
            start(peak, total, r)
            if summed:
                sum_query(q, sums, b, row0 + r, r)
        for p in T.serial(hide(ceil_div(last_key, span))):
            if span_by_span:
                left = T.meta_var(hide(ceil_div(last_key, panel) - p * span_panels))
                for i in T.serial(T.min(span_panels, left)):
                    pack_panel(k, kt, b, to, p * span_panels + i, i, panel // L)
            for t in T.serial(n_tiles):
                row = T.meta_var(hide(tiles.start(first + t)))
                r = T.meta_var(hide(row - row0))
                tiles.emit(
                    first + t,
                    tile,
                    q,
                    kt,
                    v,
                    gate,
                    out,
                    s,
                    o,
                    sums,
                    peak,
                    total,
                    b,
                    to,
                    row,
                    r,
                    p * span,
                )
        if not one_span:
            for r in T.serial(n_rows):
                finish(o, total, gate, out, b, row0 + r, r)

    @T.inline
    def block_with_keys(q, k, v, gate, out, tiles, b, first, n_tiles, most_tiles):
        kt = T.alloc_buffer((1, panels, rows, panel), "float32")
        block(q, k, kt, v, gate, out, tiles, b, 0, first, n_tiles, most_tiles * tile_q)

    @T.inline
    def own(q, k, v, gate, out):
        tiles = T.meta_var(RowTiles(Q, tile_q))
        count = T.meta_var(tiles.count)
        if B == 1 and whole:
            block_with_keys(q, k, v, gate, out, tiles, 0, 0, count, count)
        elif whole or count == 1:
            for b in T.parallel(B):
                block_with_keys(q, k, v, gate, out, tiles, b, 0, count, count)
        else:
            split = T.meta_var(split_tiles(count, tile_q, causal))
            most = T.meta_var(max(split, count - split))
            for g in T.parallel(2 * B):
                first = T.meta_var(g % 2 * split)
                n_tiles = T.meta_var(split + g % 2 * (count - 2 * split))
                block_with_keys(q, k, v, gate, out, tiles, g // 2, first, n_tiles, most)

    @T.inline
    def shared(q, k, v, gate, out):
        count = T.meta_var(hide(panels))
        kt = T.alloc_buffer((B, panels, rows, panel), "float32")
        tiles = T.meta_var(RowTiles(Q, tile_q))
        block_tiles = T.meta_var(hide(balanced_tiles(tiles.count, blocking.block_tiles, causal)))
        blocks = T.meta_var(hide(ceil_div(tiles.count, block_tiles)))
        for g in T.parallel(B * count):
            b = T.meta_var(hide(g // count))
            p = T.meta_var(hide(g % count))
            pack_panel(k, kt, b, b, p, p, panel // L)
        for g in T.parallel(B * blocks):
            u = T.meta_var(g % blocks)
            nth = T.meta_var(hide(T.if_then_else(u % 2 == 0, u // 2, blocks - 1 - u // 2)))
            first = T.meta_var(hide(nth * block_tiles))
            n_tiles = T.meta_var(hide(T.min(block_tiles, tiles.count - first)))
            b = T.meta_var(hide(g // blocks))
            block(q, k, kt, v, gate, out, tiles, b, b, first, n_tiles, block_rows)

    @T.inline
    def in_spans(q, k, v, gate, out):
        kt = T.alloc_buffer((1, span_panels, rows, panel), "float32")
        tiles = T.meta_var(RowTiles(Q, tile_q))
        for b in T.serial(B):
            block(q, k, kt, v, gate, out, tiles, b, 0, 0, tiles.count, Q)

    body = own if own_keys else in_spans if span_by_span else shared

    return attention_prim_func(spec, dims, body)


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
