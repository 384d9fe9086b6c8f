"""Transposes a square of floats in vector registers."""

from __future__ import annotations

from tvm import tirx


def transposed(rows: list[tirx.Expr]) -> list[tirx.Expr]:
    """Return the columns of a square of vectors.

    Parameters
    ----------
    rows : list of expression
        As many vectors as each has lanes, a power of two, at least 4.

    Returns
    -------
    list of expression
        Vector ``i`` holds lane ``i`` of every row, after ``log2(lanes)`` shuffles a row.

    Each shuffle is one instruction of x86: within groups of 4 lanes, ``unpck`` interleaves single
    floats and then pairs; whole groups go where they belong by ``vshuff32x4`` or ``vperm2f128``. In
    another order of rounds LLVM gathers each column anew, in twice as many instructions.
    """
    lanes = len(rows)
    for size in (1, 2):  # of what is interleaved
        after = []
        for first in range(0, lanes, 2 * size):
            for i in range(first, first + size):
                after += [_unpack(rows[i], rows[i + size], lanes, size, half) for half in (0, 1)]
        rows = after
    # rows[4 * g + c] holds, in its group h, column 4 * h + c of the rows 4 * g, ...
    groups = lanes // 4
    by_column = [[rows[4 * g + c] for g in range(groups)] for c in range(4)]
    columns = [_exchange(vectors) for vectors in by_column]
    return [columns[c][h] for h in range(groups) for c in range(4)]


def _unpack(a: tirx.Expr, b: tirx.Expr, lanes: int, size: int, half: int) -> tirx.Expr:
    """Interleave floats, or pairs of them, of the low or high half of each group of 4 lanes."""
    indices = []
    for group in range(0, lanes, 4):
        for at in range(2 * half, 2 * half + 2, size):
            indices += [group + at + i for i in range(size)]
            indices += [lanes + group + at + i for i in range(size)]
    return tirx.Shuffle([a, b], indices)


def _exchange(vectors: list[tirx.Expr]) -> list[tirx.Expr]:
    """Transpose a square of groups of 4 lanes: as many vectors as each has groups."""
    count = len(vectors)
    if count == 1:
        return vectors
    lanes = 4 * count
    halves = []
    for odd in (0, 1):
        indices = [4 * g + i for g in range(odd, 2 * count, 2) for i in range(4)]
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        # Groups of one parity, of the first vector and then of the second.
        halves.append([tirx.Shuffle([a, b], indices) for a, b in pairs])
    assert lanes in (8, 16)
    if count == 2:
        return [halves[0][0], halves[1][0]]
    even, odd_ = (_exchange_pair(*half) for half in halves)
    return [even[0], odd_[0], even[1], odd_[1]]


def _exchange_pair(a: tirx.Expr, b: tirx.Expr) -> list[tirx.Expr]:
    return [
        tirx.Shuffle([a, b], [4 * g + i for g in range(odd, 8, 2) for i in range(4)])
        for odd in (0, 1)
    ]
