"""The run function of an entry: all kernels called in a row, by one PrimFunc.

The Relax VM costs about 0.5 us a kernel (a packed call, argument checks, an allocation): a fifth of
the time of a small model. Here an entry becomes one PrimFunc

    run(x, tensors, workspace, y)

that calls the kernels as plain C functions on addresses. Tensors are one block of bytes, as the
artifact holds them; intermediates lie in a workspace whose offsets are planned from their
lifetimes, so that a call allocates nothing. The function of a symbolic entry reads batch and
length off its arguments' shapes, and hands them to the kernels. The VM's form of the entry stays in
the library beside it, for tracing; an entry that carries state, ``run(x, lengths, state...,
tensors, workspace, y)``, has none, nor have those of windows; a function of several results takes
as many outputs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx
from tvm.ir import Call, GlobalVar
from tvm.script import tirx as T

from schedules.common.dims import Dim, DimVars, Extent

from .errors import UnsupportedModelError
from .lowering import C_FUNCTION_ATTR
from .manifest_schema import ALIGNMENT, round_up, tensor_layout
from .passes.rewrite import Graph, variables
from .relax_ops import dims_of, extents, is_op, shape_of
from .symbolic_entry import region_name

RUN_SUFFIX = "__run"

# A kind of row: the names whose product is their number, none for what has a known size.
Region = tuple[str, ...]
# A byte of the workspace: the region, and the bytes a row ahead of it there.
_Offset = tuple[Region, int]
# Where a variable lies: in which parameter ("x", "y", "tensors", "workspace"), from which byte.
_Place = tuple[str, _Offset]
# A kernel's name, where its arguments lie, and their dimensions.
_KernelCall = tuple[str, list[_Place], list[tuple[Dim, ...]]]
_START: _Offset = ((), 0)


@dataclasses.dataclass(frozen=True)
class RunFunction:
    """An entry as one PrimFunc, and the bytes of workspace that it needs: a row, by region."""

    func: tirx.PrimFunc
    workspace: dict[str, int]


@dataclasses.dataclass(frozen=True)
class CFunction:
    """A kernel on addresses, and the shapes of its arguments, which tell what its variables are.

    It takes the variables behind the addresses.
    """

    func: tirx.PrimFunc
    shapes: list[tuple[Extent, ...]]

    def values(self, shapes: list[tuple[Extent, ...]]) -> list[Extent]:
        """Return the variables' values for arguments of the given shapes."""
        found: dict[tirx.Var, Extent] = {}
        for own, given in zip(self.shapes, shapes, strict=True):
            for extent, value in zip(own, given, strict=True):
                if isinstance(extent, tirx.Var):
                    found[extent] = value
        variables = self.func.params[len(self.shapes) :]
        return [found[variable] for variable in variables]


@dataclasses.dataclass(frozen=True)
class _TensorBlock:
    """Where tensors start in their block, and its size, which a call checks (at least 1)."""

    starts: list[int]
    bytes: int


def add_run_functions(
    mod: tvm.IRModule, tensors: list[npt.NDArray[Any]]
) -> tuple[tvm.IRModule, dict[str, dict[str, int]]]:
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
    dict of str to dict
        By entry, bytes of workspace by region, see `mega_tvm.symbolic_entry`.
    """
    builder = relax.BlockBuilder(mod)
    plain = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            kernel = as_c_function(func)
            name = f"{gvar.name_hint}__c"
            plain[gvar.name_hint] = (builder.add_func(kernel.func, name), kernel)
            builder.update_func(gvar, _packed_form(func, *plain[gvar.name_hint]))
    starts, end = tensor_layout(array.nbytes for array in tensors)
    layout = _TensorBlock(starts, max(end, 1))
    workspaces = {}
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            name = f"{gvar.name_hint}{RUN_SUFFIX}"
            run = _run_function(Graph(func), plain, layout)
            builder.add_func(run.func.with_attr("global_symbol", name), name)
            workspaces[gvar.name_hint] = run.workspace
    return builder.get(), workspaces


def tensor_block(tensors: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Return the tensors' bytes as an artifact holds them."""
    starts, end = tensor_layout(array.nbytes for array in tensors)
    block = np.zeros(max(end, 1), np.uint8)
    for start, array in zip(starts, tensors, strict=True):
        block[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    return block


def as_c_function(func: tirx.PrimFunc) -> CFunction:
    """Return a kernel that takes bare addresses in place of tensors; it returns 0."""
    shapes = [extents(buffer.shape) for buffer in func.params]
    named = [extent for shape in shapes for extent in shape if isinstance(extent, tirx.Var)]
    variables = list(dict.fromkeys(named))
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
    plain = tirx.PrimFunc(
        [*pointers, *variables],
        body,
        tvm.ir.PrimType("int32"),
        tvm.ir.make_node("ir.DictAttrs", **attrs),
    )
    return CFunction(plain, shapes)


def _packed_form(func: tirx.PrimFunc, function: GlobalVar, kernel: CFunction) -> tirx.PrimFunc:
    """Return a kernel for the VM, which calls the one on addresses: the code is there once."""
    variables = kernel.func.params[len(kernel.shapes) :]
    call = Call(function, [*(buffer.data for buffer in func.params), *variables], ret_ty="int32")
    error, message = map(tvm.ir.StringImm, ("RuntimeError", "a kernel failed: out of memory"))
    return tirx.PrimFunc(
        func.params,
        tirx.AssertStmt(call == 0, error, [message]),  # TVM 0.27 names the first two the other way
        None,
        tvm.ir.make_node("ir.DictAttrs", **{"tirx.is_scheduled": True}),
    )


class _Workspace:
    """Offsets of intermediates: first fit among those that live at the same time.

    Intermediates whose rows a call brings lie in regions, one for each kind of row (``batch``,
    ``batch * seq_len``), and are planned by their bytes a row: offsets scale with the rows.
    """

    def __init__(self) -> None:
        self.sizes: dict[Region, int] = {}
        self._live: dict[relax.Var, tuple[Region, int, int]] = {}

    def place(self, var: relax.Var) -> _Offset:
        """Reserve memory for a variable."""
        dims = dims_of(shape_of(var))
        region = tuple(sorted(dim for dim in dims if isinstance(dim, str)))
        elements = math.prod(dim for dim in dims if isinstance(dim, int))
        size = round_up(max(elements * np.dtype(str(var.ty.dtype)).itemsize, 1))
        start = 0
        for other, begin, end in sorted(self._live.values()):
            if other != region:
                continue
            if start + size <= begin:
                break
            start = max(start, end)
        self._live[var] = (region, start, start + size)
        self.sizes[region] = max(self.sizes.get(region, ALIGNMENT), start + size)
        return region, start

    def release(self, var: relax.Var) -> None:
        """Give a variable's bytes back."""
        self._live.pop(var, None)

    def by_name(self) -> dict[str, int]:
        """Return the bytes a row of each region, as the manifest holds them."""
        return {region_name(region): self.sizes[region] for region in sorted(self.sizes)}


_Kernel = tuple[GlobalVar, CFunction]


def _run_function(
    graph: Graph, kernels: Mapping[str, _Kernel], tensors: _TensorBlock
) -> RunFunction:
    func = graph.func
    results = {_resolve(expr, graph): name for name, expr in _results(graph).items()}
    last_use: dict[relax.Var, int] = {}
    for step, (_, value) in enumerate(graph.bindings):
        for var in variables(value):
            last_use[_resolve(var, graph)] = step
    last_use.update(dict.fromkeys(results, len(graph.bindings)))

    workspace = _Workspace()
    places: dict[relax.Var, _Place] = {
        param: (name, _START) for name, param in _inputs(func).items()
    }
    calls: list[_KernelCall] = []
    for step, (var, value) in enumerate(graph.bindings):
        if is_op(value, "call_tir"):
            if var in results:
                places[var] = (results[var], _START)
            else:
                places[var] = ("workspace", workspace.place(var))
            arguments = [*value.args[1].fields, var]
            calls.append(
                (
                    value.args[0].name_hint,
                    [places[_resolve(arg, graph)] for arg in arguments],
                    [dims_of(shape_of(arg)) for arg in arguments],
                )
            )
        elif is_op(value, "call_pure_packed"):  # a fetch of a packed tensor
            index, *byte = (int(arg.value) for arg in value.args[2:])
            places[var] = ("tensors", ((), tensors.starts[index] + sum(byte)))
        for read in {_resolve(v, graph) for v in variables(value)}:
            if last_use.get(read) == step:
                workspace.release(read)
    if any(places.get(var, ("", _START))[0] != name for var, name in results.items()):
        raise UnsupportedModelError("the model runs no kernel: its output is its input or constant")
    workspace.sizes = workspace.sizes or {(): ALIGNMENT}
    return RunFunction(_emit(graph, calls, kernels, tensors.bytes, workspace), workspace.by_name())


def _emit(
    graph: Graph,
    calls: list[_KernelCall],
    kernels: Mapping[str, _Kernel],
    tensor_bytes: int,
    workspace: _Workspace,
) -> tirx.PrimFunc:
    dims = DimVars()
    starts: dict[Region, Extent] = {}
    end: Extent = 0
    for region in sorted(workspace.sizes):
        starts[region] = end
        end = end + workspace.sizes[region] * dims.rows(region)
    known = isinstance(end, int)
    workspace_bytes = end if known else tirx.Var("workspace_bytes", "int64")
    buffers = {
        **{name: _buffer(name, param, dims) for name, param in _inputs(graph.func).items()},
        "tensors": tirx.decl_buffer((tensor_bytes,), "uint8", "tensors"),
        "workspace": tirx.decl_buffer((workspace_bytes,), "uint8", "workspace"),
        **{name: _buffer(name, expr, dims) for name, expr in _results(graph).items()},
    }

    def address(place: _Place) -> tirx.PrimExpr:
        name, (region, start) = place
        if name not in ("tensors", "workspace"):
            return buffers[name].data
        begin = starts[region] if name == "workspace" else 0
        return T.address_of(buffers[name][begin + start * dims.rows(region)])

    failed = tirx.stmt.Return(tirx.const(1, "int32"))
    # A workspace of a known size is checked with the other arguments' shapes.
    steps: list[tirx.Stmt] = [] if known else [tirx.IfThenElse(workspace_bytes < end, failed, None)]
    for name, places, shapes in calls:
        function, kernel = kernels[name]
        values = kernel.values([dims.shape(shape) for shape in shapes])
        arguments = [
            *map(address, places),
            *(tirx.const(v, "int64") if isinstance(v, int) else v for v in values),
        ]
        call = Call(function, arguments, ret_ty="int32")
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


def _results(graph: Graph) -> dict[str, relax.Expr]:
    """Return what a function returns, by the name of its argument: ``y``, or ``y_0``, ``y_1``.."""
    expr: relax.Expr = graph.func.body.body
    while isinstance(graph.values.get(expr), relax.Var | relax.Tuple):
        expr = graph.values[expr]
    if isinstance(expr, relax.Tuple):
        return {f"y_{i}": field for i, field in enumerate(expr.fields)}
    return {"y": expr}


def _buffer(name: str, expr: relax.Expr, dims: DimVars) -> tirx.Buffer:
    return tirx.decl_buffer(dims.shape(dims_of(shape_of(expr))), str(expr.ty.dtype), name)


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
