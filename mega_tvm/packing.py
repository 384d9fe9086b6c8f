"""The pack phase: constants into their kernels' layouts, and out of the module.

Constants could stay in the VM's executable, but then they lie in the library's data and again on
the heap, each entry has its own, and TVM writes a line to standard error for each one that it
loads. Passed in by the caller, they are read once, and all entries share them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx
from tvm.ir import GlobalVar
from tvm.ir.expr import GenericConst

from schedules.common.kernel import ScheduledKernel

from .errors import CompileError
from .passes.carry_state import carries_state
from .passes.rewrite import Graph
from .relax_ops import is_op

Array = npt.NDArray[Any]
LINE = 64  # bytes of a cache line
_LINE_TYPE = np.dtype((np.void, LINE))


def pack_phase(
    mod: tvm.IRModule, scheduled: Mapping[str, ScheduledKernel]
) -> tuple[tvm.IRModule, list[Array]]:
    """Pack constants as their kernels' schedules want them, and move them out of the module.

    Parameters
    ----------
    mod : tvm.IRModule
        Relax functions of ``call_tir`` and ``reshape``, and scheduled PrimFuncs.
    scheduled : mapping of str to ScheduledKernel
        Mega's kernels, by name.

    Returns
    -------
    tvm.IRModule
        Each entry takes a tuple of all tensors as its last parameter.
    list of array
        The tensors; equal ones are there once, whichever layers and entries use them.
    """
    pool = _TensorPool()
    builder = relax.BlockBuilder()
    # A packed kernel has another signature, and a GlobalVar carries its function's type: kernels
    # are added anew, calls pointed at them.
    kernels = {
        gvar.name_hint: builder.add_func(func, gvar.name_hint)
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }
    graphs = {
        gvar.name_hint: Graph(func)
        for gvar, func in mod.functions_items()
        if isinstance(func, relax.Function)
    }
    # Those that carry state last: they find their tensors within others' (`_TensorPool.find`).
    graphs = dict(sorted(graphs.items(), key=lambda item: carries_state(item[1].func)))
    places = {name: _collect(graph, scheduled, pool) for name, graph in graphs.items()}
    for name, graph in graphs.items():
        builder.add_func(_rebuild(name, graph, places[name], pool.arrays, kernels), name)
    return builder.get(), pool.arrays


class _TensorPool:
    """The tensors of a module, each content once."""

    def __init__(self) -> None:
        self.arrays: list[Array] = []
        self._indices: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def find(self, array: Array) -> _Place | None:
        """Return where the bytes of an array lie within a larger one, at a cache line."""
        wanted = np.frombuffer(array.tobytes(), np.uint8)
        if wanted.size % LINE:
            return None
        lines = wanted.view(_LINE_TYPE)
        for index, other in enumerate(self.arrays):
            if other.dtype != array.dtype or other.nbytes <= array.nbytes:
                continue
            whole = np.frombuffer(other.tobytes(), np.uint8)
            there = whole[: whole.size // LINE * LINE].view(_LINE_TYPE)
            for line in np.flatnonzero(there == lines[0]):
                if np.array_equal(there[line : line + lines.size], lines):
                    return _Place(index, int(line) * LINE, array.shape)
        return None

    def add(self, array: Array) -> int:
        """Return the index of an array."""
        array = np.asarray(array, order="C")  # np.ascontiguousarray would make a scalar [1]
        key = (str(array.dtype), array.shape, hashlib.sha256(array.tobytes()).digest())
        index = self._indices.setdefault(key, len(self.arrays))
        if index == len(self.arrays):
            self.arrays.append(array)
        return index


class _Place(NamedTuple):
    """Where a constant lies: from a byte of a tensor."""

    tensor: int
    byte: int
    shape: tuple[int, ...]


# For each binding of a function, the places of its constant arguments.
_Places = list[dict[int, _Place]]


def _collect(graph: Graph, scheduled: Mapping[str, ScheduledKernel], pool: _TensorPool) -> _Places:
    # The merged projections of other entries hold those of a function that carries state; the
    # Relax VM, for which there is no such function, could not read a part of a tensor.
    shares = carries_state(graph.func)
    places: _Places = []
    for _, value in graph.bindings:
        place: dict[int, _Place] = {}
        if is_op(value, "call_tir"):
            name = value.args[0].name_hint
            pack = scheduled[name].pack if name in scheduled else {}
            for index, field in enumerate(value.args[1].fields):
                if isinstance(field, GenericConst):
                    array = field.value.numpy()
                    if index in pack:
                        array = pack[index](array)
                    found = pool.find(array) if shares else None
                    place[index] = found or _Place(pool.add(array), 0, array.shape)
                elif index in pack:
                    raise CompileError(f"kernel {name}: argument {index} must be constant weights")
        places.append(place)
    return places


def _rebuild(
    name: str,
    graph: Graph,
    places: _Places,
    arrays: list[Array],
    kernels: Mapping[str, GlobalVar],
) -> relax.Function:
    builder, params = graph.builder, graph.func.params
    # An untyped object: the VM would check the type of each field of a tuple on every call (0.5 us
    # a tensor, measured). The manifest and its digests vouch for them.
    pool = relax.Var("tensors", relax.ObjectType())
    fetched: dict[_Place, relax.Var] = {}

    def fetch(place: _Place) -> relax.Var:
        if place not in fetched:
            index, byte, shape = place
            fetched[place] = builder.emit(
                relax.call_pure_packed(
                    "vm.builtin.tuple_getitem",
                    pool,
                    *map(relax.prim_value, (index, byte) if byte else (index,)),
                    ty_args=[relax.TensorType(list(shape), str(arrays[index].dtype))],
                )
            )
        return fetched[place]

    # Kernels are in the other builder's module: their types are told, not inferred.
    attrs = dict(graph.func.attrs or {})
    with builder.function(name, [*params, pool] if arrays else params, attrs):
        with builder.dataflow():
            for (var, value), place in zip(graph.bindings, places, strict=True):
                new = graph.renew(value)
                if is_op(value, "call_tir"):
                    fields = list(new.args[1].fields)
                    for index, tensor in place.items():
                        fields[index] = fetch(tensor)
                    kernel = kernels[value.args[0].name_hint]
                    new = relax.Call(new.op, [kernel, relax.Tuple(fields)], new.attrs, new.ty_args)
                graph.env[var] = new if isinstance(new, relax.Var) else builder.emit(new)
            result = builder.emit_output(graph.renew(graph.func.body.body))
        builder.emit_func_output(result)
    return builder.get()[name]
