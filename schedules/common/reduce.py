"""Sums and maxima over rows of a local buffer, in vector registers."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T


@T.inline
def clear(sums, rows, vectors, lanes):
    """Start the sums of a local buffer: ``rows`` rows of so many vectors."""
    for i in T.unroll(rows):
        for j in T.unroll(vectors):
            for lane in T.vectorized(lanes):
                sums[i, j * lanes + lane] = T.float32(0)


@T.inline
def _add_halves(buffer, row, half):
    for lane in T.vectorized(half):
        buffer[row, lane] = buffer[row, lane] + buffer[row, half + lane]


@T.inline
def _max_halves(buffer, row, half):
    for lane in T.vectorized(half):
        buffer[row, lane] = T.max(buffer[row, lane], buffer[row, half + lane])


def fold_sum(buffer: tirx.Buffer, row: tirx.PrimExpr, size: int, left: int = 1) -> None:
    """Add the ``size`` elements of ``buffer[row]`` (a power of two) into its first ``left``.

    Halves are added as vectors: log2(size) steps, in place of a chain of size - 1 additions.
    """
    while size > left:
        size //= 2
        _add_halves(buffer, row, size)


def row_sums(rows: list[tirx.Expr]) -> tirx.Expr:
    """Return the vector whose lane ``i`` is the sum of vector ``i``.

    Parameters
    ----------
    rows : list of expression
        As many vectors as each has lanes, a power of two.

    Returns
    -------
    expression
        Of ``lanes - 1`` additions and twice as many shuffles, where folding each by itself takes
        ``log2(lanes)`` of either a row. Each round adds pairs of vectors: of lanes that are
        ``distance`` apart, the sums of the first stand where the second's were not.
    """
    distance, lanes = 1, len(rows)
    while len(rows) > 1:
        low = [i + (lanes - distance if i & distance else 0) for i in range(lanes)]
        high = [i + (lanes if i & distance else distance) for i in range(lanes)]
        pairs = zip(rows[::2], rows[1::2], strict=True)
        rows = [tirx.Shuffle([a, b], low) + tirx.Shuffle([a, b], high) for a, b in pairs]
        distance *= 2
    return rows[0]


def fold_max(buffer: tirx.Buffer, row: tirx.PrimExpr, size: int) -> None:
    """Take the maximum of the ``size`` elements of ``buffer[row]`` into ``buffer[row, 0]``."""
    while size > 1:
        size //= 2
        _max_halves(buffer, row, size)
