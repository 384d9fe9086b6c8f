"""Compute only what reaches the last timestep.

``last_timestep`` is pushed up through every operator that treats rows alone: dense, layer norm,
elementwise. At the attention it takes the last row of queries and gate, while keys and values stay
whole; at the EMA scan, at anything else, and at a value that something needs whole anyway, it stops
and slices.

``last(f(x)) = f(last(x))`` for a row-wise f, and row i of an attention depends on row i of the
queries alone.
"""

from __future__ import annotations

from tvm import relax
from tvm.ir.expr import GenericConst

from .. import relax_ops
from ..relax_ops import is_op, shape_of
from .rewrite import Graph, Rule, Site, graph_pass, variables

_ELEMENTWISE = (
    "add", "subtract", "multiply", "divide", "negative", "sigmoid", "tanh", "exp", "sqrt", "abs",
    "nn.silu", "nn.relu", "nn.gelu", "maximum", "minimum", "clip",
)  # fmt: skip


def _rule() -> Rule:
    rows: dict[relax.Var, relax.Expr] = {}
    whole: set[relax.Var] = set()

    def last_row(site: Site, x: relax.Var) -> relax.Expr:
        """Return the last timestep of a variable of the original graph."""
        if x not in rows:
            rows[x] = site.emit(compute(site, x))
        return rows[x]

    def compute(site: Site, x: relax.Var) -> relax.Expr:
        graph = site.graph
        call = graph.values.get(x)
        roles = None if call is None or x in whole else argument_roles(call)
        if call is None or roles is None:
            return relax_ops.last_timestep(graph.renew(x))
        args = [
            last_row(site, arg) if role == "last" else graph.renew(arg)
            for arg, role in zip(call.args, roles, strict=True)
        ]
        return relax.Call(call.op, args, call.attrs)

    def rule(site: Site) -> relax.Expr | None:
        if not is_op(site.original, "mega.last_timestep"):
            return None
        if not whole:
            whole.update(_needed_whole(site.graph))
        x = site.original.args[0]
        return last_row(site, x) if isinstance(x, relax.Var) else None

    return rule


def argument_roles(call: relax.Expr) -> list[str] | None:
    """Say what the last timestep of a call's result needs of each argument.

    ``"last"``: its last timestep; ``"whole"``: all of it, as keys and weights. None if the call
    does not treat rows alone.
    """
    if is_op(call, "mega.dense"):
        return ["last", "whole", "whole", "last"][: len(call.args)]
    if is_op(call, "mega.layer_norm"):
        return ["last", "whole", "whole"][: len(call.args)]
    if is_op(call, "mega.attention"):
        return ["last", "whole", "whole", "last"][: len(call.args)]
    if any(is_op(call, name) for name in _ELEMENTWISE):
        ndim = len(shape_of(call))
        roles = [_elementwise_role(arg, ndim) for arg in call.args]
        return None if None in roles else [role for role in roles if role is not None]
    return None


def _elementwise_role(arg: relax.Expr, ndim: int) -> str | None:
    if isinstance(arg, relax.Var):
        return "last" if len(shape_of(arg)) == ndim else None
    if isinstance(arg, GenericConst) and len(shape_of(arg)) >= ndim - 1:
        return "whole" if shape_of(arg)[1 - ndim] == 1 else None  # it must not vary over time
    return "whole"


def _needed_whole(graph: Graph) -> set[relax.Var]:
    """Return the variables that something needs at every timestep."""
    whole = set(variables(graph.func.body.body))
    touched = set(whole)
    for var, value in reversed(graph.bindings):
        if var not in touched:
            continue  # dead
        if is_op(value, "mega.last_timestep"):
            roles: list[str] | None = ["last"]
        else:
            roles = None if var in whole else argument_roles(value)
        for index, arg in enumerate(getattr(value, "args", [value])):
            used = set(variables(arg))
            touched |= used
            if roles is None or roles[index] == "whole":
                whole |= used
    return whole


prune_last_timestep = graph_pass("prune_last_timestep", _rule)
