"""Fold the affine part of a layer norm into the dense layers that read it.

``(n * gamma + beta) W + b = n (diag(gamma) W) + (beta W + b)``, computed in float64, with ``n`` the
plain normalized row. Readers that are no dense layer keep the affine form.
"""

from __future__ import annotations

from tvm import relax

from .. import relax_ops
from ..relax_ops import is_op
from .fold_scale import is_plain_dense
from .rewrite import Rule, Site, constant64, graph_pass, to_constant


def _rule() -> Rule:
    plain: dict[relax.Var, relax.Var] = {}

    def rule(site: Site) -> relax.Expr | None:
        if not is_plain_dense(site.call):
            return None
        norm = site.producer(0)
        if norm is None or not is_op(norm, "mega.layer_norm") or len(norm.args) != 3:
            return None
        x, w, b = site.call.args
        if x not in plain:
            attrs = norm.attrs
            plain[x] = site.emit(
                relax_ops.layer_norm(
                    norm.args[0],
                    eps=float(attrs["eps"]),
                    clamp_variance=bool(attrs["clamp_variance"]),
                )
            )
        gamma, beta = constant64(norm.args[1]), constant64(norm.args[2])
        weights = constant64(w)
        return relax_ops.dense(
            plain[x],
            to_constant(gamma[:, None] * weights),
            to_constant(beta @ weights + constant64(b)),
        )

    return rule


fold_layer_norm = graph_pass("fold_layer_norm", _rule)
