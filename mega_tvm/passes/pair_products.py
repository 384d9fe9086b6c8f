"""Scale the weights of dense layers, so that their kernels may multiply in pairs.

The algebra, its rounding and the machines that it pays on stand in `schedules.dense.pairs`:
columns of ``W`` are scaled by powers of two, ``s``, and the terms that pairs bring too much are
noted with the bias, ``x W + b = (x (W s)) / s + b``. Whether a kernel then multiplies in pairs is a
decision of its schedule; all kernels of a layer share its scaled weights.

The layer that reads the model's input stays as it is: the rounding of products in pairs goes by
the norms of rows and columns, and a user's features, in units of their own, may differ by orders of
magnitude. So do small layers, which are done before their rows are prepared.
"""

from __future__ import annotations

from tvm import relax

from schedules.dense.pairs import scaled_columns

from ..relax_ops import dense, is_op, shape_of
from .rewrite import Graph, Rule, Site, graph_pass, to_constant, variables

LEAST_SIZE = 128


def _is_input(graph: Graph, value: relax.Expr) -> bool:
    """Whether a value is the model's input, or made of it without any operator of Mega's."""
    made = graph.producer(value)
    if made is None:
        return isinstance(value, relax.Var)
    if str(getattr(made.op, "name", "")).startswith("relax.mega."):
        return is_op(made, "mega.last_timestep") and _is_input(graph, made.args[0])
    return any(_is_input(graph, var) for var in variables(made))


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        call = site.call
        if not is_op(call, "mega.dense"):
            return None
        x, w, b, *residual = call.args
        if min(shape_of(w)) < LEAST_SIZE or _is_input(site.graph, x):
            return None
        weights, rows = scaled_columns(w.value.numpy(), b.value.numpy())
        return dense(
            x,
            to_constant(weights),
            to_constant(rows),
            *residual,
            swiglu=bool(call.attrs["swiglu"]),
            sigmoid_from=int(call.attrs["sigmoid_from"]),
            paired=True,
        )

    return rule


pair_products = graph_pass("pair_products", _rule)
