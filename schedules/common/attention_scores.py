"""Scores of a register tile of the blocked attention kernel on x86: queries by vectors of keys.

A form may have a shortcut (`attention_scoring.Shortcut`): a cheaper sum, which only holds where it
does not cancel. What that is measured by lies beside the operands: behind a panel's components its
keys' half sums and sums of magnitudes, and those of a block's queries in a buffer of their own.
"""

from __future__ import annotations

from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T

from .attention import AttentionSpec
from .attention_scoring import Scoring
from .memory_operands import apart
from .reduce import clear, fold_sum

HALF_SUM, MAGNITUDE = 0, 1
SUMS = 2


def panel_rows(width: int, scoring: Scoring) -> int:
    """Return the rows of a transposed panel: components of keys, and their sums where needed."""
    return width + (SUMS if scoring.shortcut else 0)


def tile_scorer(spec: AttentionSpec, scoring: Scoring, L: int) -> Callable[..., None]:
    """Return the inline ``(q, kt, sums, s, b, to, row, r, p, at, n_rows, vectors)``.

    Made within a script's function. It writes the scores of the queries ``row, row + 1, ..`` with
    the first vectors of keys of panel ``p`` to ``s[:, at:at + vectors * L]``. ``sums[:, r]`` are
    those of the first query.
    """
    W, q_off = spec.width, spec.q_offset
    shortcut = scoring.shortcut

    def add_up(accumulate: Callable[..., tirx.PrimExpr]) -> Callable[..., None]:
        @T.inline
        def added(q, kt, acc, b, to, row, p, n_rows, vectors):
            clear(acc, n_rows, vectors, L)
            again = T.meta_var(apart(vectors) if scoring.embeds else None)
            for d in T.serial(W):
                for i in T.unroll(n_rows):
                    for j in T.unroll(vectors):
                        at_d = T.meta_var(q_off + d + again[j] if scoring.embeds else q_off + d)
                        for lane in T.vectorized(L):
                            acc[i, j * L + lane] = accumulate(
                                acc[i, j * L + lane],
                                q[b, row + i, at_d],
                                kt[to, p, d, j * L + lane],
                            )

        return added

    sum_up = add_up(scoring.accumulate)

    @T.inline
    def score(q, kt, sums, s, b, to, row, r, p, at, n_rows, vectors):
        acc = T.alloc_buffer((n_rows, vectors * L), "float32", scope="local")
        sum_up(q, kt, acc, b, to, row, p, n_rows, vectors)
        for i in T.unroll(n_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    s[i, at + j * L + lane] = acc[i, j * L + lane]

    if shortcut is None:
        return score

    sum_up_quickly = add_up(shortcut.accumulate)

    @T.inline
    def try_shortcut(q, kt, sums, s, left, b, to, row, r, p, at, n_rows, vectors):
        # left[0, 0]: how many scores the shortcut does not give
        acc = T.alloc_buffer((n_rows, vectors * L), "float32", scope="local")
        sum_up_quickly(q, kt, acc, b, to, row, p, n_rows, vectors)
        clear(left, 1, 1, L)
        for i in T.unroll(n_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    s[i, at + j * L + lane] = shortcut.score(
                        acc[i, j * L + lane],
                        sums[HALF_SUM, r + i] + kt[to, p, W + HALF_SUM, j * L + lane],
                    )
                for lane in T.vectorized(L):
                    left[0, lane] = left[0, lane] + T.Select(
                        shortcut.holds(
                            s[i, at + j * L + lane],
                            sums[MAGNITUDE, r + i] + kt[to, p, W + MAGNITUDE, j * L + lane],
                        ),
                        T.float32(0),
                        T.float32(1),
                    )
        fold_sum(left, 0, L)

    @T.inline
    def fill_in(q, kt, sums, s, b, to, row, r, p, at, n_rows, vectors):
        acc = T.alloc_buffer((n_rows, vectors * L), "float32", scope="local")
        sum_up(q, kt, acc, b, to, row, p, n_rows, vectors)
        for i in T.unroll(n_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    s[i, at + j * L + lane] = T.Select(
                        shortcut.holds(
                            s[i, at + j * L + lane],
                            sums[MAGNITUDE, r + i] + kt[to, p, W + MAGNITUDE, j * L + lane],
                        ),
                        s[i, at + j * L + lane],
                        acc[i, j * L + lane],
                    )

    @T.inline
    def score_quickly(q, kt, sums, s, b, to, row, r, p, at, n_rows, vectors):
        left = T.alloc_buffer((1, L), "float32", scope="local")
        try_shortcut(q, kt, sums, s, left, b, to, row, r, p, at, n_rows, vectors)
        # Each score by itself, so that it does not depend on what shares its tile.
        if left[0, 0] > T.float32(0):
            fill_in(q, kt, sums, s, b, to, row, r, p, at, n_rows, vectors)

    return score_quickly


def key_summer(spec: AttentionSpec, vectors: int, L: int) -> Callable[..., None]:
    """Return the inline ``(kt, to, slot)``, which sums the keys of a transposed panel."""
    W = spec.width

    @T.inline
    def sum_keys(kt, to, slot):
        acc = T.alloc_buffer((SUMS, vectors * L), "float32", scope="local")
        clear(acc, SUMS, vectors, L)
        for d in T.serial(W):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    at = T.meta_var(j * L + lane)
                    acc[HALF_SUM, at] = acc[HALF_SUM, at] + kt[to, slot, d, at] * T.float32(0.5)
                for lane in T.vectorized(L):
                    at = T.meta_var(j * L + lane)
                    acc[MAGNITUDE, at] = acc[MAGNITUDE, at] + T.abs(kt[to, slot, d, at])
        for i in T.unroll(SUMS):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    kt[to, slot, W + i, j * L + lane] = acc[i, j * L + lane]

    return sum_keys


def query_summer(spec: AttentionSpec, lanes: int) -> Callable[..., None]:
    """Return the inline ``(q, sums, b, row, r)``, which sums a query's components."""
    W, q_off = spec.width, spec.q_offset
    rest = W % lanes

    @T.inline
    def add(q, acc, b, row, at, n):
        for lane in T.vectorized(n):
            acc[HALF_SUM, lane] = acc[HALF_SUM, lane] + q[b, row, q_off + at + lane] * T.float32(
                0.5
            )
        for lane in T.vectorized(n):
            acc[MAGNITUDE, lane] = acc[MAGNITUDE, lane] + T.abs(q[b, row, q_off + at + lane])

    @T.inline
    def sum_query(q, sums, b, row, r):
        acc = T.alloc_buffer((SUMS, lanes), "float32", scope="local")
        clear(acc, SUMS, 1, lanes)
        for c in T.serial(W // lanes):
            add(q, acc, b, row, c * lanes, lanes)
        if rest > 0:
            add(q, acc, b, row, W - rest, rest)
        fold_sum(acc, HALF_SUM, lanes)
        fold_sum(acc, MAGNITUDE, lanes)
        sums[HALF_SUM, r] = acc[HALF_SUM, 0]
        sums[MAGNITUDE, r] = acc[MAGNITUDE, 0]

    return sum_query
