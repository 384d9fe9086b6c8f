"""CUDA graphs: each entry a second time, as ``<entry>__graph``, whose kernels are captured.

TVM's `RewriteCUDAGraph` moves runs of kernels that read and write memory at fixed addresses into
functions that the virtual machine captures at their first call, and launches as one graph from then
on. Weights count as fixed where they are parameters of their own, so here they are: the function is
``(x, tensor, tensor, ..)``. What reads ``x``, which lies elsewhere in each call, and what writes
the result, which is a new tensor in each call, stays outside: the first kernel and the last.

The plain entry stays, for tracing kernel by kernel, and for who wants no graph.
"""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import Op

from .graph_names import SUFFIX

_GET = "vm.builtin.tuple_getitem"


def graph_entries(mod: tvm.IRModule, shapes: list[tuple[tuple[int, ...], str]]) -> tvm.IRModule:
    """Return the functions to add to a planned module, captured where they can be.

    Parameters
    ----------
    mod : tvm.IRModule
        As the pack phase leaves it: Relax functions ``(x[, tensors])``.
    shapes : list of tuple
        Shape and dtype of each tensor.

    Returns
    -------
    IRModule
        Planned as `plan` does; the kernels are in it too.
    """
    functions = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            name = gvar.name_hint + SUFFIX
            weights = [
                relax.Var(f"tensor{i}", relax.TensorType(shape, dtype))
                for i, (shape, dtype) in enumerate(shapes)
            ]
            new = _with_parameters(func, weights)
            functions[name] = new.with_attr({"global_symbol": name, "num_input": 1})
        else:
            functions[gvar] = func
    with tvm.transform.PassContext(config={"relax.backend.use_cuda_graph": True}):
        return tvm.transform.Sequential(
            [
                relax.transform.CanonicalizeBindings(),
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
                relax.transform.RewriteCUDAGraph(),
            ]
        )(tvm.IRModule(functions))


def _with_parameters(func: relax.Function, weights: list[relax.Var]) -> relax.Function:
    """Return ``(x, tensors)`` as a function of every tensor."""
    blocks = []
    for block in func.body.blocks:
        bindings = [
            binding
            if (index := _tensor_index(binding.value)) is None
            else relax.VarBinding(binding.var, weights[index])
            for binding in block.bindings
        ]
        blocks.append(type(block)(bindings))
    body = relax.SeqExpr(blocks, func.body.body)
    new = relax.Function([func.params[0], *weights], body, func.ret_ty, func.is_pure)
    return relax.utils.copy_with_new_vars(new)


def _tensor_index(value: relax.Expr) -> int | None:
    """Return which tensor a call fetches (`mega_tvm.packing`), or None for another call."""
    if not isinstance(value, relax.Call) or value.op != Op.get("relax.call_pure_packed"):
        return None
    function, *arguments = value.args
    return int(arguments[1]) if str(function.global_symbol) == _GET else None
