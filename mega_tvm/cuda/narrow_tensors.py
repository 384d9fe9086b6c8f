"""The graph pass of ``--dtype float16`` and ``bfloat16``: which tensors are, and conversions.

Mega's operators read and write activations and weights of that type. Biases, decays and the affine
part of a layer norm stay float32, as do all sums, states and statistics within kernels. All other
operators, and the input and output of an entry, stay float32; values are converted between.
"""

from __future__ import annotations

import functools
from typing import Any

import ml_dtypes  # noqa: F401 (tells NumPy of bfloat16)
import numpy as np
import tvm
from tvm import relax
from tvm.ir.expr import GenericConst

from ..passes.rewrite import Graph, constant64, to_constant

FLOAT32 = "float32"
# Which argument of an operator is a matrix of weights.
_WEIGHTS = {"dense": 1, "normed_dense": 1, "ema_scan_dense": 2}
_PREFIX = "relax.mega."


def narrow_tensors(dtype: str) -> tvm.transform.Pass:
    """Return the pass that stores activations and weights as ``dtype``."""

    def transform(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
        mod = mod.clone()
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mod.update_func(gvar, _narrowed(Graph(func), gvar.name_hint, dtype))
        return relax.transform.DeadCodeElimination()(mod)

    return tvm.transform.module_pass(transform, opt_level=0, name="narrow_tensors")


def _narrowed(graph: Graph, name: str, dtype: str) -> relax.Function:
    builder = graph.builder

    @functools.cache
    def converted(var: relax.Var, wanted: str) -> relax.Expr:
        if str(getattr(var.ty, "dtype", "")) not in {FLOAT32, dtype} - {wanted}:
            return var
        return builder.emit(relax.op.astype(var, wanted))

    def argument(op: str, index: int, arg: relax.Expr) -> relax.Expr:
        if isinstance(arg, relax.Var):
            return converted(arg, dtype if op else FLOAT32)
        if isinstance(arg, relax.Tuple):
            return relax.Tuple([argument(op, index, field) for field in arg.fields])
        if isinstance(arg, GenericConst) and _WEIGHTS.get(op) == index:
            return to_constant(constant64(arg).astype(np.dtype(dtype)))
        return arg

    with builder.function(name, graph.func.params, dict(graph.func.attrs)):
        with builder.dataflow():
            for var, value in graph.bindings:
                new = graph.renew(value)
                if isinstance(new, relax.Call):
                    op = str(getattr(new.op, "name", ""))
                    own = op.removeprefix(_PREFIX) if op.startswith(_PREFIX) else ""
                    args = [argument(own, i, arg) for i, arg in enumerate(new.args)]
                    new = relax.Call(new.op, args, new.attrs, new.ty_args)
                graph.env[var] = (
                    new if isinstance(new, relax.Var | GenericConst) else builder.emit(new)
                )
            result = graph.renew(graph.func.body.body)
            if isinstance(result, relax.Var):
                result = converted(result, FLOAT32)
            result = builder.emit_output(result)
        builder.emit_func_output(result)
    return builder.get()[name]
