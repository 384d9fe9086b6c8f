"""Multiply by Strassen's method where that pays: seven products of halves in place of eight.

The algebra and its rounding stand in `schedules.strassen_dense.cpu`. No pass of the graph phase by
itself: it runs where ``fast_products`` asks for it, on CPUs, after all that rewrites dense layers.
"""

from __future__ import annotations

from tvm import relax

from schedules.strassen_dense.cpu import pays
from schedules.strassen_dense.naive import StrassenDenseSpec
from schedules.strassen_dense.naive import strassen_dense as naive_strassen_dense

from ..relax_ops import call_kernel, dense_fields, infer_dense, is_op, register_operator
from .rewrite import Rule, Site, graph_pass


def _legalize(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    spec = StrassenDenseSpec(**dense_fields(call))
    return call_kernel(bb, spec, naive_strassen_dense(spec), call)


_STRASSEN_DENSE = register_operator(
    "strassen_dense", ["x", "w", "b", "residual"], infer_dense, _legalize
)


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        call = site.call
        if not is_op(call, "mega.dense") or not pays(StrassenDenseSpec(**dense_fields(call))):
            return None
        return relax.Call(_STRASSEN_DENSE, list(call.args), call.attrs)

    return rule


fast_products = graph_pass("fast_products", _rule)
