"""Sums and maxima over one row of a local buffer, in vector registers."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T


@T.inline
def _add_halves(buffer, row, half):
    for lane in T.vectorized(half):
        buffer[row, lane] = buffer[row, lane] + buffer[row, half + lane]


@T.inline
def _max_halves(buffer, row, half):
    for lane in T.vectorized(half):
        buffer[row, lane] = T.max(buffer[row, lane], buffer[row, half + lane])


def fold_sum(buffer: tirx.Buffer, row: tirx.PrimExpr, size: int) -> None:
    """Add the ``size`` elements of ``buffer[row]`` (a power of two) into ``buffer[row, 0]``.

    Halves are added as vectors: log2(size) steps, in place of a chain of size - 1 additions.
    """
    while size > 1:
        size //= 2
        _add_halves(buffer, row, size)


def fold_max(buffer: tirx.Buffer, row: tirx.PrimExpr, size: int) -> None:
    """Take the maximum of the ``size`` elements of ``buffer[row]`` into ``buffer[row, 0]``."""
    while size > 1:
        size //= 2
        _max_halves(buffer, row, size)
