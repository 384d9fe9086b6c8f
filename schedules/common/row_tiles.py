"""Rows in register tiles: as few as hold them, of heights that differ by at most one.

A tile's accumulators are registers, so that its height must be known when code is generated. With
a known number of rows at most two heights occur. With one that only a call brings, each height has
an unrolled tile of its own and a branch picks it: no row is masked, and from a few tiles on all are
nearly full (31 rows in tiles of at most 6 are 6 + 5 + 5 + 5 + 5 + 5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm.ir import Expr
from tvm.script import tirx as T

from .dims import Extent, ceil_div


class RowTiles:
    """The tiles of a number of rows; made within a script.

    Parameters
    ----------
    rows : int or PrimExpr
    highest : int
        The height that no tile exceeds.
    least : int
        The least number of rows, where a call brings it.

    Attributes
    ----------
    count, low, high_count : int or Expr
        Number of tiles, height of the lower ones, and how many (the first ones) have a row more.
    heights : tuple of int
        The heights that occur, the highest first.
    """

    def __init__(self, rows: Extent, highest: int, least: int = 1) -> None:
        self.count = opaque(ceil_div(rows, highest))
        self.low = opaque(rows // self.count)
        self.high_count = opaque(rows - self.low * self.count)
        self.heights: tuple[int, ...]
        if isinstance(self.low, int):
            self.heights = (self.low + 1, self.low) if self.high_count else (self.low,)
        else:
            lowest = min(n // ceil_div(n, highest) for n in range(least, 2 * highest + 1))
            self.heights = tuple(range(highest, lowest - 1, -1))

    def start(self, tile: Extent) -> Extent:
        """Return the first row of a tile; of the number of tiles, the number of rows."""
        start = tile * self.low
        if isinstance(self.high_count, int) and self.high_count == 0:
            return start
        return start + T.min(tile, self.high_count)

    def emit(self, tile: Extent, write: Callable[..., None], *arguments: Any) -> None:
        """Write ``write(*arguments, height)`` for a tile's height."""
        if len(self.heights) == 1:
            return write(*arguments, self.heights[0])
        if isinstance(self.low, int):
            conditions: Sequence[Expr] = [tile < self.high_count]
        else:
            height = opaque(self.low + T.Select(tile < self.high_count, 1, 0))
            conditions = [height == candidate for candidate in self.heights[:-1]]
        return _choose(conditions, self.heights, write, arguments)


def _choose(
    conditions: Sequence[Expr],
    heights: Sequence[int],
    write: Callable[..., None],
    arguments: Sequence[Any],
) -> None:
    """Write a chain of branches; the last height needs no condition."""
    if not conditions:
        return write(*arguments, heights[0])
    with T.If(conditions[0]):
        with T.Then():
            write(*arguments, heights[0])
        with T.Else():
            _choose(conditions[1:], heights[1:], write, arguments)
    return None


def opaque(value: Extent) -> Extent:
    """Compute an expression once, and hide from TVM what it is; within a script.

    A variable would not do: TVM's analysis of buffer regions looks through it, and takes minutes
    over the quotients of an attention kernel.
    """
    if isinstance(value, int):
        return value
    hidden = T.alloc_buffer((1,), "int64", scope="local")
    T.buffer_store(hidden, value, [0])
    return hidden[0]
