"""Project attended values after the attention, where few query rows are left.

``A (y W + 1 b) = (A y) W + (A 1) b``: with one query row, the right side projects one row in place
of all keys. ``A 1`` is 1 for softmax: the sum of weights over itself plus 1e-8, and the sum is at
least 1 (the largest weight is exp(0)), so ``A 1`` differs from 1 by at most 1e-8, below float32's
unit roundoff of 6e-8. L1-Laplace sums can be small, so the rewrite leaves that form alone.

In a function that carries state (`carry_state`), or runs some rows at a time (`split_rows`), it is
done for any number of query rows: both sides then project as many rows, but on the right side keys
and values may be the same rows, and the cache, or what is kept of all rows, half as large.

The gate moves behind the projection, where it multiplies the same columns as before.
"""

from __future__ import annotations

from tvm import relax

from .. import relax_ops
from ..relax_ops import OPERANDS, is_op, shape_of
from .carry_state import carries_state
from .fold_scale import is_plain_dense
from .rewrite import Rule, Site, graph_pass
from .split_rows import rows_of_a_piece


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        call = site.call
        if not is_op(call, "mega.attention") or call.attrs["laplace"]:
            return None
        value = site.producer(2)
        plain = all(int(call.attrs[f"{name}_offset"]) == 0 for name in OPERANDS)
        if value is None or not is_plain_dense(value) or not plain or not site.is_only_use(2):
            return None
        q, k, _, *gate = call.args
        y, w, b = value.args
        queries, keys = shape_of(q)[1], shape_of(k)[1]
        known = isinstance(queries, int) and isinstance(keys, int)
        fewer = queries < keys if known else queries == 1
        func = site.graph.func
        if not (fewer or carries_state(func) or rows_of_a_piece(func)):
            return None
        mixed = relax_ops.attention(
            [q, k, y],
            laplace=False,
            scale=float(call.attrs["scale"]),
            width=int(call.attrs["width"]),
            value_width=shape_of(y)[-1],
        )
        projected = relax_ops.dense(site.emit(mixed), w, b)
        return relax.op.multiply(gate[0], site.emit(projected)) if gate else projected

    return rule


reassociate_values = graph_pass("reassociate_values", _rule)
