"""What the graph passes share: one forward walk that rebuilds a Relax function.

A rule sees each call with its arguments already rewritten and may return a replacement. What no
longer reaches the output is removed afterwards.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst


@dataclasses.dataclass
class Site:
    """One call of a function that is being rebuilt.

    Parameters
    ----------
    call : Call
        The call, with rewritten arguments.
    original : Call
        The call as it was.
    graph : Graph
        The function as it was, and what became of it so far.
    """

    call: relax.Call
    original: relax.Call
    graph: Graph

    def producer(self, index: int) -> relax.Expr | None:
        """Return the rewritten expression that argument ``index`` is bound to."""
        return self.graph.producer(self.call.args[index])

    def is_only_use(self, index: int) -> bool:
        """Whether this call is the only one that reads argument ``index``."""
        return self.graph.uses[self.original.args[index]] == 1

    def emit(self, expr: relax.Expr) -> relax.Var:
        """Bind an expression ahead of this call."""
        return self.graph.builder.emit(expr)


Rule = Callable[[Site], relax.Expr | None]


class Graph:
    """A Relax function of one dataflow block, as it was and as it becomes."""

    def __init__(self, func: relax.Function) -> None:
        self.func = func
        self.builder = relax.BlockBuilder()
        self.bindings: list[tuple[relax.Var, relax.Expr]] = [
            (binding.var, binding.value) for block in func.body.blocks for binding in block.bindings
        ]
        self.values: dict[relax.Var, relax.Expr] = dict(self.bindings)
        self.uses: Counter[relax.Var] = Counter()
        for _, value in self.bindings:
            self.uses.update(variables(value))
        self.uses.update(variables(func.body.body))
        self.env: dict[relax.Var, relax.Expr] = {}

    def producer(self, expr: relax.Expr) -> relax.Expr | None:
        """Return what a rewritten variable is bound to, or None for parameters and constants."""
        return self.builder.lookup_binding(expr) if isinstance(expr, relax.Var) else None

    def renew(self, expr: relax.Expr) -> relax.Expr:
        """Return an expression of the original function in terms of the rewritten one."""
        if isinstance(expr, relax.Var):
            return self.env.get(expr, expr)
        if isinstance(expr, relax.Call):
            args = [self.renew(arg) for arg in expr.args]
            return relax.Call(expr.op, args, expr.attrs, expr.ty_args, expr.span)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.renew(field) for field in expr.fields])
        if isinstance(expr, relax.TupleGetItem):
            return relax.TupleGetItem(self.renew(expr.tuple_value), expr.index)
        return expr

    def rebuild(self, name: str, rule: Rule) -> relax.Function:
        """Return the function with ``rule`` applied to every call, in order."""
        with self.builder.function(name, self.func.params, dict(self.func.attrs)):
            with self.builder.dataflow():
                for var, value in self.bindings:
                    new = self.renew(value)
                    if isinstance(new, relax.Call):
                        replacement = rule(Site(new, value, self))
                        new = new if replacement is None else replacement
                    is_leaf = isinstance(new, relax.Var | GenericConst)
                    self.env[var] = new if is_leaf else self.builder.emit(new)
                result = self.builder.emit_output(self.renew(self.func.body.body))
            self.builder.emit_func_output(result)
        return self.builder.get()[name]


def variables(expr: relax.Expr) -> list[relax.Var]:
    """Return the variables that an expression reads, once for each reading."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Call):
        return [var for arg in expr.args for var in variables(arg)]
    if isinstance(expr, relax.Tuple):
        return [var for field in expr.fields for var in variables(field)]
    if isinstance(expr, relax.TupleGetItem):
        return variables(expr.tuple_value)
    return []


def graph_pass(name: str, rule_factory: Callable[[], Rule]) -> tvm.transform.Pass:
    """Make a module pass of a rule.

    Parameters
    ----------
    name : str
        The pass's name, as it stands in dumps and in ``disabled_passes``.
    rule_factory : callable
        Returns a new rule, with its own state, for each function.
    """

    def transform(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        mod = mod.clone()  # the caller's stays as it was
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mod.update_func(gvar, Graph(func).rebuild(gvar.name_hint, rule_factory()))
        return relax.transform.DeadCodeElimination()(mod)

    return tvm.transform.module_pass(transform, opt_level=0, name=name)


def constant64(expr: relax.Expr) -> npt.NDArray[np.float64]:
    """Return a constant's values in float64."""
    return np.asarray(expr.value.numpy(), dtype=np.float64)


def to_constant(values: npt.NDArray[Any]) -> GenericConst:
    """Return an array as a Relax constant."""
    # Not np.ascontiguousarray, which makes a scalar one-dimensional.
    return relax.const(np.asarray(values, order="C"), str(values.dtype))
