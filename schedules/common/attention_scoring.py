"""How scores become weights: what the softmax and the L1-Laplace attention on x86 differ in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm import tirx
from tvm.script import tirx as T


@dataclasses.dataclass(frozen=True)
class Shortcut:
    """A cheaper way to a score, where it does not cancel.

    Parameters
    ----------
    accumulate : callable
        ``(acc, q, k) -> acc`` for one component of the width.
    score : callable
        ``(acc, half) -> score``, where ``half`` is half the sum of all components of both vectors.
    holds : callable
        ``(score, magnitude) -> condition``: whether the score is good enough, where ``magnitude``
        is the sum of the magnitudes of all components. False for NaN.
    """

    accumulate: Callable[[tirx.PrimExpr, tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    score: Callable[[tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    holds: Callable[[tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]


def sees(first: tirx.PrimExpr, lane: tirx.PrimExpr, limit: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return whether the key in a lane of a vector from ``first`` on stands before ``limit``.

    Lanes are compared as int32: indices of 64 bits would take two vectors.
    """
    return T.Cast("int32", lane) < T.Cast("int32", limit - first)


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How an attention form scores a key and makes weights of scores.

    Parameters
    ----------
    accumulate : callable
        ``(acc, q, k) -> acc`` for one component of the width.
    weight : callable
        ``(score, peak) -> weight`` of one key.
    start : inline
        ``(peak, total, r)``: reset the running values of row ``r``.
    weigh : inline
        ``(s, peak, total, rescale, r, i, first, limit, vectors, n_rows)``: turn the scores
        ``s[i:i + n_rows]`` of the keys ``first, first + 1, ...``, so many vectors of them, into
        weights; those at ``limit`` and beyond become 0, where each row of a causal form has one
        key more than the row above. Updates the running values of the rows from ``r``, and stores
        in ``rescale`` from ``i`` the factors by which their earlier output must shrink. Rows go
        together: each has chains that end in one value, for which the next step waits (T = 256:
        1.5% faster).
    rescales : bool
        Whether ``rescale`` can differ from 1.
    causal : bool
        Whether a query sees only keys up to its own position.
    embeds : bool
        Whether a query's component is read from memory by each instruction that needs it, see
        `memory_operands.apart`; else once into a register, for all vectors of keys. Blocked only.
    shortcut : Shortcut or None
        Tried first; ``accumulate`` then makes the scores that it does not give. Blocked only.
    """

    accumulate: Callable[[tirx.PrimExpr, tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    weight: Callable[[tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    start: Callable[..., None]
    weigh: Callable[..., None]
    rescales: bool
    causal: bool
    embeds: bool = False
    shortcut: Shortcut | None = None
