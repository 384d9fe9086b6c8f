"""Rows that start at cache lines."""

from __future__ import annotations

LINE = 16  # float32 of a cache line


def padded(width: int) -> int:
    """Return the width of a row of whole cache lines."""
    return -(-width // LINE) * LINE
