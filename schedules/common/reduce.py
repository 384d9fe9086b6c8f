"""Sums and maxima over one row of a local buffer, in vector registers."""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T


@T.inline
def _add_halves(buffer, row, half):  # type: ignore[no-untyped-def]
    for l in T.vectorized(half):
        buffer[row, l] = buffer[row, l] + buffer[row, half + l]


@T.inline
def _max_halves(buffer, row, half):  # type: ignore[no-untyped-def]
    for l in T.vectorized(half):
        buffer[row, l] = T.max(buffer[row, l], buffer[row, half + l])


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
