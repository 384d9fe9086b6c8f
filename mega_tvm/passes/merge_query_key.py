"""Merge the query and key projections of softmax attention into one.

With ``q = y Wq + bq`` and ``k = y Wk + bk`` the scores are

    s_ij = scale * (y_i Wq + bq) (y_j Wk + bk)^T
         = [scale * (y_i Wq + bq) Wk^T] y_j^T + scale * (y_i Wq + bq) bk^T

and the last term does not depend on j: softmax over j cancels it. So the keys are ``y`` itself and
the queries ``y A + c`` with ``A = scale Wq Wk^T``, ``c = scale bq Wk^T``, both computed in
float64. It saves the key product wherever ``y`` is not wider than the keys.

Rounding. In float32 (unit roundoff u) the two products of q and k carry errors of order
``u |Wq|_F |Wk|_F |y_i| |y_j|`` into a score, the merged one ``u |A|_F |y_i| |y_j|``; since
``|Wq Wk^T|_F <= |Wq|_F |Wk|_F``, the merged form's bound is never the larger one, however badly the
weights are conditioned. Rounding A to float32 adds a term of the same form.
"""

from __future__ import annotations

from tvm import relax

from .. import relax_ops
from ..relax_ops import OPERANDS, is_op, shape_of
from .fold_scale import is_plain_dense
from .rewrite import Rule, Site, constant64, graph_pass, to_constant


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        call = site.call
        if not is_op(call, "mega.attention") or call.attrs["laplace"]:
            return None
        query, key = site.producer(0), site.producer(1)
        if query is None or key is None or not (is_plain_dense(query) and is_plain_dense(key)):
            return None
        y = query.args[0]
        width = shape_of(y)[-1]
        whole = all(int(call.attrs[f"{name}_offset"]) == 0 for name in OPERANDS[:2])
        if y != key.args[0] or width > int(call.attrs["width"]) or not whole:
            return None
        if not (site.is_only_use(0) and site.is_only_use(1)):
            return None
        scale = float(call.attrs["scale"])
        wq, bq, wk = (constant64(c) for c in (query.args[1], query.args[2], key.args[1]))
        merged = relax_ops.dense(y, to_constant(scale * wq @ wk.T), to_constant(scale * bq @ wk.T))
        return relax_ops.attention(
            [site.emit(merged), y, *call.args[2:]],
            laplace=False,
            scale=1.0,
            width=width,
            value_width=int(call.attrs["value_width"]),
            offsets=[int(call.attrs[f"{name}_offset"]) for name in OPERANDS],
        )

    return rule


merge_query_key = graph_pass("merge_query_key", _rule)
