"""Move elementwise work into the epilogue of the dense layer before it.

- ``silu(x Wg + bg) * (x Wu + bu)`` -> one dense layer of both weights with a SwiGLU epilogue;
- ``sigmoid(x W + b)`` -> a sigmoid epilogue;
- ``r + (x W + b)`` -> a residual epilogue.

Only a dense layer that nothing else reads is fused; else it would be computed twice.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from .. import relax_ops
from ..relax_ops import is_op, shape_of
from .fold_scale import is_plain_dense
from .rewrite import Rule, Site, constant64, graph_pass, to_constant


def _swiglu_rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        if not is_op(site.call, "multiply"):
            return None
        for at, other in ((0, 1), (1, 0)):
            gate, up = _silu_argument(site, site.producer(at)), site.producer(other)
            if gate is None or up is None or not (is_plain_dense(gate) and is_plain_dense(up)):
                continue
            alike = gate.args[0] == up.args[0] and shape_of(gate) == shape_of(up)
            if alike and site.is_only_use(at) and site.is_only_use(other):
                pairs = zip(gate.args[1:], up.args[1:], strict=True)
                both = (np.concatenate([constant64(g), constant64(u)], axis=-1) for g, u in pairs)
                weights, bias = map(to_constant, both)
                return relax_ops.dense(gate.args[0], weights, bias, swiglu=True)
        return None

    return rule


def _silu_argument(site: Site, expr: relax.Expr | None) -> relax.Expr | None:
    """Return what binds x in ``x * sigmoid(x)`` or ``silu(x)``."""
    if expr is None:
        return None
    if is_op(expr, "nn.silu"):
        return site.graph.producer(expr.args[0])
    if is_op(expr, "multiply"):
        for x, other in (tuple(expr.args), tuple(expr.args)[::-1]):
            sigmoid = site.graph.producer(other)
            if sigmoid is not None and is_op(sigmoid, "sigmoid") and sigmoid.args[0] == x:
                return site.graph.producer(x)
    return None


def _sigmoid_rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        if not is_op(site.call, "sigmoid") or not site.is_only_use(0):
            return None
        dense = site.producer(0)
        if dense is None or not is_plain_dense(dense):
            return None
        x, w, b = dense.args
        return relax_ops.dense(x, w, b, sigmoid_from=0)

    return rule


def _residual_rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        if not is_op(site.call, "add"):
            return None
        for at, other in ((1, 0), (0, 1)):
            dense, residual = site.producer(at), site.call.args[other]
            if (
                dense is not None
                and is_plain_dense(dense)
                and site.is_only_use(at)
                and isinstance(residual, relax.Var)
                and shape_of(residual) == shape_of(dense)
            ):
                x, w, b = dense.args
                return relax_ops.dense(x, w, b, residual)
        return None

    return rule


fuse_swiglu = graph_pass("fuse_swiglu", _swiglu_rule)
fuse_sigmoid = graph_pass("fuse_sigmoid", _sigmoid_rule)
fuse_residual = graph_pass("fuse_residual", _residual_rule)
