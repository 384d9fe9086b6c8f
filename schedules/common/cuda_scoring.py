"""How scores become weights: what the softmax and the L1-Laplace attention of GPUs differ in."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm import tirx


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How scores become weights.

    Parameters
    ----------
    accumulate : callable
        ``(score, q, k)`` to the score with one more element of the width.
    weight : callable
        ``(score, peak)`` to the weight; ``peak`` is the row's maximum.
    softmax : bool
        Whether rows have a running maximum.
    causal : bool
        Whether a query sees only the keys up to its own position.
    """

    accumulate: Callable[[tirx.PrimExpr, tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    weight: Callable[[tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]
    softmax: bool
    causal: bool
