"""Tensors of another type than the arithmetic: loads are widened to float32, stores are rounded.

A kernel is written once, in float32. `stored_as` gives the same kernel on tensors of, say,
bfloat16: sums, states, statistics and weights of an attention stay float32 registers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import tvm_ffi
from tvm import tirx
from tvm.ir.expr import Call, TensorLoad, TensorRegion

from .half_types import HALF_TYPES

FLOAT32 = "float32"
_DATA = "tirx.buffer_data"
# On a naive PrimFunc: the types of the tensors that its schedule shall take, in order.
STORAGE_ATTR = "mega.storage"


def storage_of(func: tirx.PrimFunc) -> tuple[str, ...]:
    """Return the types of a PrimFunc's tensors that differ from what it is written in, or ()."""
    return tuple(json.loads(str(func.attrs[STORAGE_ATTR]))) if STORAGE_ATTR in func.attrs else ()


def half_type(func: tirx.PrimFunc, *tensors: int) -> str | None:
    """Return the half type that the tensors of these indices, or else all, have, or None."""
    dtypes = storage_of(func)
    chosen = {dtypes[i] for i in tensors} if tensors and dtypes else set(dtypes)
    dtype = chosen.pop() if len(chosen) == 1 else ""
    return dtype if dtype in HALF_TYPES else None


def stored_as(func: tirx.PrimFunc, dtypes: Sequence[str]) -> tirx.PrimFunc:
    """Return a PrimFunc of float32 tensors for tensors of other types.

    Parameters
    ----------
    func : PrimFunc
        Unscheduled or written out; tensors whose type is said to be float32 stay as they are.
    dtypes : sequence of str
        The type of each parameter.

    Returns
    -------
    PrimFunc
        With ``dtypes`` noted on it.
    """
    if len(dtypes) != len(func.params):
        raise ValueError(f"expected {len(func.params)} types, found {len(dtypes)}")
    buffers: dict[tirx.Var, tirx.Var] = {
        param: param if dtype == FLOAT32 else param.with_dtype(dtype)
        for param, dtype in zip(func.params, dtypes, strict=True)
    }

    def renew(old: tirx.Var) -> tirx.Var:
        return buffers.get(old, old)

    def load(node: TensorLoad) -> tirx.PrimExpr:
        new = renew(node.source)
        if new.same_as(node.source):
            return node
        return tirx.Cast(FLOAT32, tirx.BufferLoad(new, node.indices))

    def store(node: tirx.BufferStore) -> tirx.Stmt:
        new = renew(node.buffer)
        if new.same_as(node.buffer):
            return node
        return tirx.BufferStore(new, tirx.Cast(new.ty.dtype, node.value), node.indices)

    def declare(node: tirx.DeclBuffer) -> tirx.Stmt:
        # The memory of a parameter in another shape.
        source = renew(node.data.args[0])
        if source.same_as(node.data.args[0]):
            return node
        buffers[node.buffer] = node.buffer.with_dtype(source.ty.dtype)
        return tirx.DeclBuffer(buffers[node.buffer], data=source.data)

    def loop(node: tirx.For) -> tirx.Stmt:
        # TVM's code generator keeps the source of a vector that it converts, and takes it again for
        # the same text, though a local buffer may have changed: stores are converted one by one.
        if node.kind != tirx.ForKind.VECTORIZED:
            return node
        rounds = []

        def look(store: tirx.BufferStore) -> tirx.Stmt:
            rounds.append(not renew(store.buffer).same_as(store.buffer))
            return store

        tvm_ffi.structural_map(node.body, [(tirx.BufferStore, look)])
        if not any(rounds):
            return node
        unrolled = tirx.ForKind.UNROLLED
        return tirx.For(node.loop_var, node.min, node.extent, unrolled, node.body)

    def address(node: Call) -> tirx.PrimExpr:
        if getattr(node.op, "name", "") != _DATA or renew(node.args[0]).same_as(node.args[0]):
            return node
        return renew(node.args[0]).data

    body = tvm_ffi.structural_map(
        func.body,
        [
            (tirx.For, loop),
            (TensorLoad, load),
            (tirx.BufferStore, store),
            (TensorRegion, lambda node: tirx.BufferRegion(renew(node.source), node.region)),
            (tirx.DeclBuffer, declare),
            (Call, address),
        ],
        order="pre",
    )
    params = [buffers[param] for param in func.params]
    new = tirx.PrimFunc(params, body, func.ret_type, func.attrs)
    return new.with_attr(STORAGE_ATTR, json.dumps(list(dtypes)))
