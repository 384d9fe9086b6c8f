"""The run function of an entry: all kernels called in a row, by one PrimFunc.

The Relax VM costs about 0.5 us a kernel (a packed call, argument checks, an allocation): a fifth of
the time of a small model. Here an entry becomes one PrimFunc

    run(x, tensors, workspace, y)

(with the state between ``x`` and ``tensors`` if it carries one) that calls the kernels as plain C functions on addresses. Tensors are one block of bytes, as the
artifact holds them; intermediates lie in a workspace whose offsets are planned from their
lifetimes, so that a call allocates nothing. The VM's form of the entry stays in the library beside
it, for tracing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx
from tvm.ir import Call, GlobalVar
from tvm.script import tirx as T

from .errors import UnsupportedModelError
from .lowering import C_FUNCTION_ATTR
from .manifest_schema import ALIGNMENT, round_up
from .passes.rewrite import Graph, variables
from .relax_ops import is_op, shape_of

RUN_SUFFIX = "__run"

# Where a variable lies: in which parameter ("x", "y", "tensors", "workspace"), from which byte.
_Place = tuple[str, int]
# A kernel's name, and where its arguments lie.
_KernelCall = tuple[str, list[_Place]]


@dataclasses.dataclass(frozen=True)
class RunFunction:
    """An entry as one PrimFunc, and the bytes of workspace that it needs."""

    func: tirx.PrimFunc
    workspace: int


def add_run_functions(
    mod: tvm.IRModule, tensors: list[npt.NDArray[Any]]
) -> tuple[tvm.IRModule, dict[str, int]]:
    """Add ``<entry>__run`` for each entry of a packed module.

    Parameters
    ----------
    mod : tvm.IRModule
        As the pack phase leaves it.
    tensors : list of array
        Its tensors, in the order of the artifact.

    Returns
    -------
    tvm.IRModule
    dict of str to int
        Bytes of workspace by entry.
    """
    builder = relax.BlockBuilder(mod)
    plain = {
        gvar.name_hint: builder.add_func(_as_c_function(func), f"{gvar.name_hint}__c")
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }
    offsets = list(tensor_offsets(tensors))
    workspaces = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            name = f"{gvar.name_hint}{RUN_SUFFIX}"
            run = _run_function(Graph(func), plain, offsets)
            builder.add_func(run.func.with_attr("global_symbol", name), name)
            workspaces[gvar.name_hint] = run.workspace
    return builder.get(), workspaces


def tensor_offsets(tensors: Iterable[npt.NDArray[Any]]) -> Iterable[int]:
    """Yield where each tensor starts: the first aligned byte behind the one before."""
    end = 0
    for array in tensors:
        start = round_up(end)
        yield start
        end = start + array.nbytes


def tensor_block(tensors: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Return the tensors' bytes as an artifact holds them."""
    starts = list(tensor_offsets(tensors))
    block = np.zeros(starts[-1] + tensors[-1].nbytes if tensors else 1, np.uint8)
    for start, array in zip(starts, tensors, strict=True):
        block[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    return block


def _as_c_function(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a kernel that takes bare addresses in place of tensors; it returns 0."""
    pointers = [
        tirx.Var(buffer.name, tvm.ir.PointerType(tvm.ir.PrimType(str(buffer.dtype))))
        for buffer in func.params
    ]
    declared = [
        tirx.DeclBuffer(buffer, data=pointer)
        for buffer, pointer in zip(func.params, pointers, strict=True)
    ]
    body = tirx.SeqStmt([*declared, func.body, tirx.stmt.Return(tirx.const(0, "int32"))])
    attrs = {key: value for key, value in func.attrs.items() if key != "global_symbol"}
    attrs[C_FUNCTION_ATTR] = True
    return tirx.PrimFunc(
        pointers, body, tvm.ir.PrimType("int32"), tvm.ir.make_node("ir.DictAttrs", **attrs)
    )


class _Workspace:
    """Offsets of intermediates: first fit among those that live at the same time."""

    def __init__(self) -> None:
        self.size = 0
        self._live: dict[relax.Var, tuple[int, int]] = {}

    def place(self, var: relax.Var, size: int) -> int:
        """Reserve bytes for a variable and return their offset."""
        size = round_up(max(size, 1))
        start = 0
        for begin, end in sorted(self._live.values()):
            if start + size <= begin:
                break
            start = max(start, end)
        self._live[var] = (start, start + size)
        self.size = max(self.size, start + size)
        return start

    def release(self, var: relax.Var) -> None:
        """Give a variable's bytes back."""
        self._live.pop(var, None)


def _run_function(
    graph: Graph, kernels: Mapping[str, GlobalVar], tensor_starts: list[int]
) -> RunFunction:
    func = graph.func
    result = _resolve(func.body.body, graph)
    last_use: dict[relax.Var, int] = {}
    for step, (_, value) in enumerate(graph.bindings):
        for var in variables(value):
            last_use[_resolve(var, graph)] = step
    last_use[result] = len(graph.bindings)

    workspace = _Workspace()
    places: dict[relax.Var, _Place] = {
        param: (name, 0) for name, param in _inputs(func).items()
    }
    calls: list[_KernelCall] = []
    for step, (var, value) in enumerate(graph.bindings):
        if is_op(value, "call_tir"):
            if var == result:
                places[var] = ("y", 0)
            else:
                places[var] = ("workspace", workspace.place(var, _nbytes(var)))
            operands = [places[_resolve(arg, graph)] for arg in value.args[1].fields]
            calls.append((value.args[0].name_hint, [*operands, places[var]]))
        elif is_op(value, "call_pure_packed"):  # a fetch of a packed tensor
            places[var] = ("tensors", tensor_starts[int(value.args[2].value)])
        for read in {_resolve(v, graph) for v in variables(value)}:
            if last_use.get(read) == step:
                workspace.release(read)
    if places.get(result, ("", 0))[0] != "y":
        raise UnsupportedModelError("the model runs no kernel: its output is its input or constant")
    size = max(workspace.size, ALIGNMENT)
    return RunFunction(_emit(graph, calls, kernels, size), size)


def _emit(
    graph: Graph,
    calls: list[_KernelCall],
    kernels: Mapping[str, GlobalVar],
    workspace_bytes: int,
) -> tirx.PrimFunc:
    buffers = {
        **{name: _buffer(name, param) for name, param in _inputs(graph.func).items()},
        "tensors": tirx.decl_buffer((tirx.Var("tensor_bytes", "int64"),), "uint8", "tensors"),
        "workspace": tirx.decl_buffer((workspace_bytes,), "uint8", "workspace"),
        "y": tirx.decl_buffer(shape_of(graph.func.body.body), "float32", "y"),
    }

    def address(place: _Place) -> tirx.PrimExpr:
        buffer = buffers[place[0]]
        if place[0] not in ("tensors", "workspace"):
            return buffer.data
        return T.address_of(buffer[place[1]])

    failed = tirx.stmt.Return(tirx.const(1, "int32"))
    steps: list[tirx.Stmt] = []
    for name, places in calls:
        call = Call(kernels[name], [address(place) for place in places], ret_ty="int32")
        steps.append(tirx.IfThenElse(call != 0, failed, None))
    steps.append(tirx.stmt.Return(tirx.const(0, "int32")))
    return tirx.PrimFunc(
        list(buffers.values()),
        tirx.SeqStmt(steps),
        tvm.ir.PrimType("int32"),
        tvm.ir.make_node("ir.DictAttrs", **{"tirx.is_scheduled": True}),
    )


def _inputs(func: relax.Function) -> dict[str, relax.Var]:
    """Return the parameters that are arrays, by name: ``x``, and the state if there is one."""
    arrays = [param for param in func.params if isinstance(param.ty, relax.TensorType)]
    return {"x": arrays[0], **{param.name: param for param in arrays[1:]}}


def _buffer(name: str, param: relax.Var) -> tirx.Buffer:
    return tirx.decl_buffer(shape_of(param), str(param.ty.dtype), name)


def _resolve(expr: relax.Expr, graph: Graph) -> relax.Var:
    """Follow reshapes and plain copies to the variable whose memory an expression names."""
    while isinstance(expr, relax.Var):
        value = graph.values.get(expr)
        if isinstance(value, relax.Var):
            expr = value
        elif value is not None and is_op(value, "reshape"):
            expr = value.args[0]
        else:
            break
    return expr


def _nbytes(var: relax.Var) -> int:
    return math.prod(shape_of(var)) * np.dtype(str(var.ty.dtype)).itemsize
