"""Multiply by Strassen's method where that pays: seven products of halves in place of eight.

The algebra and its rounding stand in `schedules.strassen_dense.cpu`. Only layers are changed whose
rounding stays where it is: those with a SwiGLU, and those whose result is added to the residual
stream. A score's error moves the weight of its key by as much of itself, and that of the input
projection goes through all blocks. Relative RMS of the default model against float64, fresh
weights, each kind of layer alone, median of four inputs (allowed: 2e-6; plain: 6.6e-7):

| SwiGLU | down | output | input projection | query, value, gate | all |
|---|---|---|---|---|---|
| 8.9e-7 | 9.6e-7 | 7.0e-7 | 1.1e-6 | 1.9e-6 | 2.2e-6 |

No pass of the graph phase by
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


_WITH_RESIDUAL = 4  # arguments
_STRASSEN_DENSE = register_operator(
    "strassen_dense", ["x", "w", "b", "residual"], infer_dense, _legalize
)


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        call = site.call
        if not is_op(call, "mega.dense"):
            return None
        added = len(call.args) == _WITH_RESIDUAL
        if not (added or call.attrs["swiglu"]) or not pays(StrassenDenseSpec(**dense_fields(call))):
            return None
        return relax.Call(_STRASSEN_DENSE, list(call.args), call.attrs)

    return rule


fast_products = graph_pass("fast_products", _rule)
