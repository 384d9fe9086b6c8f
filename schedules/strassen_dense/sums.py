"""The sums of quarters of x: left factors of four of the seven products."""

from __future__ import annotations

from collections.abc import Callable

from tvm.script import tirx as T

from ..common.dims import known_rows
from .packing import StrassenLayout


def pair_sums(layout: StrassenLayout) -> Callable[..., None]:
    """Return the inline ``(x, s, r, at)``: store the sums of the r-th pair of rows.

    ``s [4, pairs, upper half of k]`` gets S1 to S4 of `cpu` at the place ``at``.
    """
    M, L = known_rows(layout.spec.lead), layout.lanes
    upper, lower = layout.halves_k

    @T.inline
    def some(x, s, r, at, k, n, bottom, right):
        # n of k; what x lacks counts as zero
        for lane in T.vectorized(n):
            a11 = T.meta_var(x[2 * r, k + lane])
            a12 = T.meta_var(x[2 * r, upper + k + lane] if right else T.float32(0))
            a21 = T.meta_var(x[2 * r + 1, k + lane] if bottom else T.float32(0))
            a22 = T.meta_var(x[2 * r + 1, upper + k + lane] if bottom and right else T.float32(0))
            s[0, at, k + lane] = a21 + a22
            s[1, at, k + lane] = a21 + a22 - a11
            s[2, at, k + lane] = a11 - a21
            s[3, at, k + lane] = a12 - (a21 + a22 - a11)

    @T.inline
    def whole(x, s, r, at, bottom):
        for c in T.serial(lower // L):
            some(x, s, r, at, c * L, L, bottom, True)
        if lower % L > 0:
            some(x, s, r, at, lower - lower % L, lower % L, bottom, True)
        if upper > lower:
            some(x, s, r, at, lower, 1, bottom, False)

    @T.inline
    def sums(x, s, r, at):
        if M % 2 == 0:
            whole(x, s, r, at, True)
        else:  # the last row has no partner
            if r < M // 2:
                whole(x, s, r, at, True)
            else:
                whole(x, s, r, at, False)

    return sums
