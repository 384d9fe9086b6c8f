"""Fetching a cache line ahead of its use."""

from __future__ import annotations

from tvm.script import tirx as T

# The prefetch intrinsic's arguments.
READ, WRITE = 0, 1
INTO_L2, INTO_L1 = 2, 3
_DATA = 1


@T.inline
def prefetch(element, intent, level):
    """Fetch the line of a buffer's element; one past the end does no harm."""
    T.evaluate(T.call_intrin("void", "tirx.prefetch", T.address_of(element), intent, level, _DATA))
