"""Fold a constant scale of a dense output into its weights.

``(x W + b) * c = x (W diag(c)) + b * c``, computed in float64. This is how the gain ``1 - a`` of
the moving average vanishes into the projection before it.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir.expr import GenericConst

from .. import relax_ops
from ..relax_ops import is_op, shape_of
from .rewrite import Rule, Site, constant64, graph_pass, to_constant


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        if not is_op(site.call, "multiply"):
            return None
        for at, other in ((0, 1), (1, 0)):
            dense, scale = site.producer(at), site.call.args[other]
            if (
                dense is not None
                and is_plain_dense(dense)
                and isinstance(scale, GenericConst)
                and shape_of(scale) in (shape_of(dense.args[2]), (1,), ())
                and site.is_only_use(at)
            ):
                x, w, b = dense.args
                c = constant64(scale)
                return relax_ops.dense(
                    x, to_constant(constant64(w) * c), to_constant(constant64(b) * c)
                )
        return None

    return rule


def is_plain_dense(expr: relax.Expr) -> bool:
    """Whether an expression is a dense layer without any epilogue."""
    return (
        is_op(expr, "mega.dense")
        and len(expr.args) == 3
        and not expr.attrs["swiglu"]
        and int(expr.attrs["sigmoid_from"]) < 0
    )


fold_scale = graph_pass("fold_scale", _rule)
