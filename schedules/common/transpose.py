"""Transposes a square of floats in vector registers."""

from __future__ import annotations

from tvm import tirx


def transposed(rows: list[tirx.Expr]) -> list[tirx.Expr]:
    """Return the columns of a square of vectors.

    Parameters
    ----------
    rows : list of expression
        As many vectors as each has lanes, a power of two.

    Returns
    -------
    list of expression
        Vector ``i`` holds lane ``i`` of every row. ``log2(lanes)`` rounds exchange ever larger
        off-diagonal squares, each by shuffles of two vectors.
    """
    lanes = len(rows)
    distance = 1
    while distance < lanes:
        low = [i + (lanes - distance if i & distance else 0) for i in range(lanes)]
        high = [i + (lanes if i & distance else distance) for i in range(lanes)]
        after = list(rows)
        for i in range(lanes):
            if not i & distance:
                pair = [rows[i], rows[i + distance]]
                after[i] = tirx.Shuffle(pair, low)
                after[i + distance] = tirx.Shuffle(pair, high)
        rows = after
        distance *= 2
    return rows
