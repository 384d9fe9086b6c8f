"""Sums and maxima over one row, in vector registers."""

from __future__ import annotations

from tvm.script import tirx as T


@T.inline
def fold_sum(buffer, row, size):  # type: ignore[no-untyped-def]
    """Add the ``size`` elements of ``buffer[row]`` (a power of two) into ``buffer[row, 0]``.

    Halves are added as vectors: log2(size) steps, in place of a chain of size - 1 additions.
    """
    if size > 1:
        for l in T.vectorized(size // 2):
            buffer[row, l] = buffer[row, l] + buffer[row, size // 2 + l]
        fold_sum(buffer, row, size // 2)


@T.inline
def fold_max(buffer, row, size):  # type: ignore[no-untyped-def]
    """Take the maximum of the ``size`` elements of ``buffer[row]`` into ``buffer[row, 0]``."""
    if size > 1:
        for l in T.vectorized(size // 2):
            buffer[row, l] = T.max(buffer[row, l], buffer[row, size // 2 + l])
        fold_max(buffer, row, size // 2)
