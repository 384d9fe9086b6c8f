"""Dimensions that are numbers, or names whose values a call brings.

A specification holds dimensions as data: 60, or ``"seq_len"``. Within one PrimFunc each name is one
variable, bound by the shapes of its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from tvm import tirx

Dim = int | str
# What a dimension is within a PrimFunc: an int, or one of TVM's expressions.
Extent = Any


class DimVars:
    """The variables of one PrimFunc that stand for named dimensions.

    Parameters
    ----------
    **known : int or expression
        Dimensions that are no variables of their own.
    """

    def __init__(self, **known: Extent) -> None:
        self._vars: dict[str, Extent] = dict(known)

    def __call__(self, dim: Dim) -> Extent:
        """Return a dimension as a number or a variable."""
        if isinstance(dim, int):
            return dim
        if dim not in self._vars:
            self._vars[dim] = tirx.Var(dim, "int64")
        return self._vars[dim]

    def shape(self, dims: Iterable[Dim]) -> tuple[Extent, ...]:
        """Return several dimensions as numbers or variables."""
        return tuple(map(self, dims))

    def rows(self, lead: Iterable[Dim]) -> Extent:
        """Return the number of rows that leading dimensions make."""
        return math.prod(self.shape(lead))


def known(dims: Iterable[Dim]) -> tuple[int, ...]:
    """Return dimensions that must be numbers.

    Raises
    ------
    ValueError
        If one is a name.
    """
    dims = tuple(dims)
    if named := [dim for dim in dims if isinstance(dim, str)]:
        raise ValueError(f"expected known dimensions, found {', '.join(named)}")
    return tuple(map(int, dims))


def known_rows(lead: Iterable[Dim]) -> int:
    """Return the number of rows that leading dimensions make, which must be numbers."""
    return math.prod(known(lead))


def ceil_div(extent: Extent, divisor: Extent) -> Extent:
    """Return ``extent / divisor``, rounded up; both are positive."""
    return (extent + divisor - 1) // divisor
