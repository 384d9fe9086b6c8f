"""How a register tile of a dense kernel leaves its registers on x86: epilogue and store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm.script import tirx as T

from ..common.prefetch import INTO_L1, READ, WRITE
from ..common.prefetch import prefetch as fetch_line
from ..common.vector_math import sigmoid, silu
from .packing import PanelLayout


def storing(layout: PanelLayout) -> Callable[..., None]:
    """Return the inline ``(acc, b, residual, y, m, first, tile_rows, vectors)``.

    It stores what the accumulators make of ``tile_rows`` rows from ``m`` and ``vectors`` vectors of
    packed columns from ``first``.
    """
    spec, L, padded_n = layout.spec, layout.lanes, layout.padded_n
    out_n, swiglu, sigmoid_from = spec.out_n, spec.swiglu, spec.sigmoid_from
    has_residual, has_sigmoid = spec.residual, 0 <= sigmoid_from < spec.n
    step = vectors_of_output(layout)
    ragged = out_n % L  # columns of the last, partly filled output vector
    mixed = sigmoid_from % L > 0  # a vector of which some columns have a sigmoid

    def sum_of(acc: Any, b: Any, i: Any, at: Any, first: Any) -> Any:
        # The bias of scaled weights is not scaled: it comes last, and starts no accumulator.
        if not spec.paired:
            return acc[i, at]
        return acc[i, at] * b[padded_n + first + at] + b[first + at]

    def epilogue(acc, b, i, at, first, col, activate):
        value = sum_of(acc, b, i, at, first)
        if swiglu:
            return silu(value) * sum_of(acc, b, i, at + L, first)
        if not activate:
            return value
        # Of a vector that begins with columns of a sigmoid all have one.
        return T.Select(col >= sigmoid_from, sigmoid(value), value) if mixed else sigmoid(value)

    @T.inline
    def store_vector(acc, b, residual, y, m, i, j, first, n, activate):
        # n columns of output vector j of row i
        for lane in T.vectorized(n):
            col = T.meta_var(first // step + j * L + lane)
            value = T.meta_var(epilogue(acc, b, i, j * step * L + lane, first, col, activate))
            if has_residual:
                y[m + i, col] = residual[m + i, col] + value
            else:
                y[m + i, col] = value

    @T.inline
    def store_columns(acc, b, residual, y, m, i, j, first, n):
        if has_sigmoid:
            # Columns without one are spared its 25 instructions.
            if first + j * L + n <= sigmoid_from:
                store_vector(acc, b, residual, y, m, i, j, first, n, False)
            else:
                store_vector(acc, b, residual, y, m, i, j, first, n, True)
        else:
            store_vector(acc, b, residual, y, m, i, j, first, n, False)

    @T.inline
    def store(acc, b, residual, y, m, first, tile_rows, vectors):
        for i in T.unroll(tile_rows):
            for j in T.unroll(vectors // step):
                if ragged == 0:
                    store_columns(acc, b, residual, y, m, i, j, first, L)
                else:
                    if first // step + j * L + L <= out_n:
                        store_columns(acc, b, residual, y, m, i, j, first, L)
                    else:
                        store_columns(acc, b, residual, y, m, i, j, first, ragged)

    return store


def fetching(layout: PanelLayout) -> Callable[..., None]:
    """Return the inline ``(residual, y, m, first, tile_rows, vectors)``, ahead of `storing`."""
    L, step, has_residual = layout.lanes, vectors_of_output(layout), layout.spec.residual

    @T.inline
    def fetch(residual, y, m, first, tile_rows, vectors):
        for i in T.unroll(tile_rows):
            for j in T.unroll(vectors // step):
                fetch_line(y[m + i, first // step + j * L], WRITE, INTO_L1)
                if has_residual:
                    fetch_line(residual[m + i, first // step + j * L], READ, INTO_L1)

    return fetch


def vectors_of_output(layout: PanelLayout) -> int:
    """Return how many accumulator vectors make one output vector."""
    return 2 if layout.spec.swiglu else 1
