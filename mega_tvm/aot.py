"""The run function of an entry: all kernels called in a row, by one PrimFunc.

The Relax VM costs about 0.5 us a kernel (a packed call, argument checks, an allocation): a fifth of
the time of a small model. Here an entry becomes one PrimFunc

    run(x, tensors, workspace, y)

that calls the kernels as plain C functions on addresses. Tensors are one block of bytes, as the
artifact holds them; intermediates lie in a workspace whose offsets are planned from their
lifetimes, so that a call allocates nothing. The function of a symbolic entry reads batch and
length off its arguments' shapes, and hands them to the kernels. The VM's form of the entry stays in
the library beside it, for tracing; an entry that carries state, ``run(x, lengths, state...,
tensors, workspace, y)``, has none, nor have those of windows, nor has one that runs its rows in
pieces (`split_rows`). A function of several results takes as many outputs.

Pieces are a parallel loop over calls of serial kernels. A piece's own intermediates lie in memory
of the thread that runs it, which TVM's runtime keeps from one call to the next.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx
from tvm.ir import Call
from tvm.script import tirx as T

from schedules.common.dims import DimVars, Extent

from .c_function import ITEM, as_c_function, overwritable, packed_form, serial_form
from .errors import UnsupportedModelError
from .kernel_list import kernels_by_caller
from .manifest_schema import ALIGNMENT, tensor_layout
from .passes.rewrite import Graph
from .passes.split_rows import KEYS, is_piece
from .relax_ops import dims_of, is_op, shape_of
from .run_function import (
    SCRATCH,
    WORKSPACE,
    Kernel,
    KernelCall,
    PieceLoop,
    Place,
    Planner,
    Step,
    resolve,
    returned,
)
from .workspace_plan import Region, Workspace

RUN_SUFFIX = "__run"


@dataclasses.dataclass(frozen=True)
class RunFunction:
    """An entry as one PrimFunc, and the bytes of workspace that it needs: a row, by region."""

    func: tirx.PrimFunc
    workspace: dict[str, int]


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
    functions = {
        gvar.name_hint: func
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function)
    }
    entries = {name: func for name, func in functions.items() if not is_piece(func)}
    in_entries, in_pieces = kernels_by_caller(mod)
    kernels: dict[str, Kernel] = {}
    serial: dict[str, Kernel] = {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        name, over = gvar.name_hint, overwritable(func)
        if name in in_entries:
            plain = as_c_function(func)
            kernels[name] = Kernel(builder.add_func(plain.func, f"{name}__c"), plain, over)
            builder.update_func(gvar, packed_form(func, kernels[name].gvar, plain))
        if name in in_pieces:
            plain = as_c_function(serial_form(func))
            serial[name] = Kernel(builder.add_func(plain.func, f"{name}__serial"), plain, over)
    starts, end = tensor_layout(array.nbytes for array in tensors)
    planner = Planner(functions, kernels, serial, starts)
    workspaces = {}
    for entry, func in entries.items():
        name = f"{entry}{RUN_SUFFIX}"
        run = _run_function(Graph(func), planner, max(end, 1))
        builder.add_func(run.func.with_attr("global_symbol", name), name)
        workspaces[entry] = run.workspace
    return builder.get(), workspaces


def tensor_block(tensors: Sequence[npt.NDArray[Any]]) -> npt.NDArray[np.uint8]:
    """Return the tensors' bytes as an artifact holds them."""
    starts, end = tensor_layout(array.nbytes for array in tensors)
    block = np.zeros(max(end, 1), np.uint8)
    for start, array in zip(starts, tensors, strict=True):
        block[start : start + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
    return block


def _run_function(graph: Graph, planner: Planner, tensor_bytes: int) -> RunFunction:
    workspace = Workspace()
    places = {param: Place(name) for name, param in _inputs(graph.func).items()}
    for name, expr in _results(graph).items():
        result = resolve(expr, graph)
        if result not in graph.values or is_op(graph.values[result], "call_pure_packed"):
            raise UnsupportedModelError(
                "the model runs no kernel: its output is its input or constant"
            )
        places[result] = Place(name)
    steps = planner.plan(graph, places, workspace)
    workspace.sizes = workspace.sizes or {(): ALIGNMENT}
    func = _Emitter(graph, workspace.sizes, tensor_bytes).emit(steps)
    return RunFunction(func, workspace.by_name())


class _Emitter:
    """Writes a run function.

    Parameters
    ----------
    graph : Graph
        The entry.
    workspace : mapping of tuple to int
        Bytes a row, by region.
    tensor_bytes : int
        Size of the block of tensors, which a call checks.
    """

    def __init__(self, graph: Graph, workspace: Mapping[Region, int], tensor_bytes: int) -> None:
        self._dims = DimVars()
        self._starts: dict[Region, Extent] = {}
        end: Extent = 0
        for region in sorted(workspace):
            self._starts[region] = end
            end = end + workspace[region] * self._dims.rows(region)
        self._workspace_bytes = end
        self._known = isinstance(end, int)
        given = end if self._known else tirx.Var("workspace_bytes", "int64")
        self._params = {
            **{name: self._buffer(name, param) for name, param in _inputs(graph.func).items()},
            "tensors": tirx.decl_buffer((tensor_bytes,), "uint8", "tensors"),
            WORKSPACE: tirx.decl_buffer((given,), "uint8", WORKSPACE),
            **{name: self._buffer(name, expr) for name, expr in _results(graph).items()},
        }
        self._failure = tirx.stmt.Return(tirx.const(1, "int32"))

    def _buffer(self, name: str, expr: relax.Expr) -> tirx.Buffer:
        shape = self._dims.shape(dims_of(shape_of(expr)))
        # Kernels take them wherever they lie, see `as_c_function`.
        return tirx.decl_buffer(shape, str(expr.ty.dtype), name, data_alignment=ITEM)

    def emit(self, steps: Sequence[Step]) -> tirx.PrimFunc:
        """Return the run function of a plan."""
        body: list[tirx.Stmt] = []
        if not self._known:  # of a known size, it is checked with the other arguments' shapes
            given = self._params[WORKSPACE].shape[0]
            body.append(tirx.IfThenElse(given < self._workspace_bytes, self._failure, None))
        for step in steps:
            if isinstance(step, PieceLoop):
                body += self._loop(step)
            else:
                status = self._call(step, self._dims, self._params, 0)
                body.append(tirx.IfThenElse(status != 0, self._failure, None))
        body.append(tirx.stmt.Return(tirx.const(0, "int32")))
        return tirx.PrimFunc(
            list(self._params.values()),
            tirx.SeqStmt(body),
            tvm.ir.PrimType("int32"),
            tvm.ir.make_node("ir.DictAttrs", **{"tirx.is_scheduled": True}),
        )

    def _loop(self, loop: PieceLoop) -> list[tirx.Stmt]:
        """Return a loop over pieces; a return would not leave it, so that failures are noted."""
        turn = tirx.Var("turn", "int64")
        piece = turn
        if loop.count > 2:
            # Causal attention costs the more the later a piece lies: in this order, contiguous
            # shares of the loop cost about the same.
            last = tirx.const(loop.count - 1, "int64")
            piece = tirx.Select(turn % 2 == 0, turn // 2, last - turn // 2)
        size = max(loop.scratch_bytes, 1)
        scratch = tirx.decl_buffer((size,), "uint8", SCRATCH)
        buffers = {**self._params, SCRATCH: scratch}
        # In memory, or TVM narrows the number to int32, which is not what kernels take.
        keys = tirx.decl_buffer((1,), "int64", KEYS, scope="local")
        dims = DimVars(**{KEYS: keys[0]})
        workspace = self._params[WORKSPACE]
        failed = self._starts[()] + loop.failed.offset[1]
        body: list[tirx.Stmt] = [tirx.AllocBuffer(scratch), tirx.AllocBuffer(keys)]
        # TVM shrinks a buffer to what it sees used, and an address is no use of what follows.
        body += [tirx.BufferStore(scratch, tirx.const(0, "uint8"), [i]) for i in (0, size - 1)]
        body.append(tirx.BufferStore(keys, (piece + 1) * loop.rows, [0]))
        body.append(tirx.BufferStore(workspace, tirx.const(0, "uint8"), [failed + turn]))
        for call in loop.calls:
            status = self._call(call, dims, buffers, piece)
            note = tirx.BufferStore(workspace, tirx.const(1, "uint8"), [failed + turn])
            body.append(tirx.IfThenElse(status != 0, note, None))
        over_pieces = tirx.For(
            turn,
            tirx.const(0, "int64"),
            tirx.const(loop.count, "int64"),
            tirx.ForKind.PARALLEL,
            tirx.SeqStmt(body),
        )
        checks = [
            tirx.IfThenElse(workspace[failed + i] != tirx.const(0, "uint8"), self._failure, None)
            for i in range(loop.count)
        ]
        return [over_pieces, *checks]

    def _call(
        self,
        call: KernelCall,
        dims: DimVars,
        buffers: Mapping[str, tirx.Buffer],
        piece: Extent,
    ) -> tirx.Expr:
        values = call.kernel.function.values([dims.shape(shape) for shape in call.dims])
        arguments = [
            *(self._address(place, buffers, piece) for place in call.places),
            *(tirx.const(v, "int64") if isinstance(v, int) else v for v in values),
        ]
        return Call(call.kernel.gvar, arguments, ret_ty="int32")

    def _address(
        self, place: Place, buffers: Mapping[str, tirx.Buffer], piece: Extent
    ) -> tirx.Expr:
        buffer = buffers[place.array]
        if place.array not in ("tensors", WORKSPACE, SCRATCH):
            if not place.rows:
                return buffer.data
            zeros = [0] * (len(buffer.shape) - 2)
            return T.address_of(buffer[(0, piece * place.rows, *zeros)])
        region, start = place.offset
        begin = self._starts[region] if place.array == WORKSPACE else 0
        begin = begin + start * self._dims.rows(region)
        return T.address_of(buffer[begin + piece * (place.rows * place.row_bytes)])


def _inputs(func: relax.Function) -> dict[str, relax.Var]:
    """Return the parameters that are arrays, by name: ``x``, and the state if there is one."""
    arrays = [param for param in func.params if isinstance(param.ty, relax.TensorType)]
    return {"x": arrays[0], **{param.name: param for param in arrays[1:]}}


def _results(graph: Graph) -> dict[str, relax.Expr]:
    """Return what a function returns, by the name of its argument: ``y``, or ``y_0``, ``y_1``.."""
    first, *others = returned(graph)
    if others or isinstance(graph.func.ret_ty, relax.TupleType):
        return {f"y_{i}": expr for i, expr in enumerate([first, *others])}
    return {"y": first}
