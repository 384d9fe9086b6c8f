"""Bring an imported graph into Mega's operators.

- ``matmul`` with constant weights, and the ``add`` of its bias -> ``mega.dense``. The importer
  wraps a product, at times with its bias, in two reshapes, which would stop every later rewrite:
  they vanish, since a dense kernel takes any number of leading dimensions.
- ``nn.layer_norm`` over the last axis -> ``mega.layer_norm``.
- ``take`` of the last index of axis 1, of three or more -> ``mega.last_timestep``. A negative index
  elsewhere is made positive, since TVM's ``take`` in its fast mode reads out of bounds with it.
- Operators on constants alone are computed, in float64.

Mega's operators are float32: what a model computes in another type keeps TVM's operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir.expr import GenericConst

from .. import relax_ops
from ..errors import UnsupportedModelError
from ..relax_ops import is_op, shape_of
from .rewrite import Rule, Site, constant64, graph_pass, to_constant

_FOLDABLE: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "negative": np.negative,
    "exp": np.exp,
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
}


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        for rewrite in (_fold, _matmul, _bias, _reshape, _layer_norm, _take):
            new = rewrite(site)
            if new is not None:
                return new
        return None

    return rule


def _is_constant(expr: relax.Expr, ndim: int | None = None) -> bool:
    return isinstance(expr, GenericConst) and (ndim is None or len(shape_of(expr)) == ndim)


def _is_float(expr: relax.Expr) -> bool:
    return str(expr.ty.dtype).startswith("float")


def _is_float32(expr: relax.Expr) -> bool:
    return str(expr.ty.dtype) == "float32"


def _fold(site: Site) -> relax.Expr | None:
    args = site.call.args
    if not args or not all(_is_constant(arg) for arg in args):
        return None
    if is_op(site.call, "permute_dims"):
        axes = site.call.attrs.axes
        order = None if axes is None else [int(axis) for axis in axes]
        return to_constant(np.transpose(args[0].value.numpy(), order))
    name = str(site.call.op.name).removeprefix("relax.")
    if name not in _FOLDABLE or not all(map(_is_float, args)):
        return None
    result = _FOLDABLE[name](*map(constant64, args))
    return to_constant(result.astype(str(site.original.ty.dtype)))


def _matmul(site: Site) -> relax.Expr | None:
    if not is_op(site.call, "matmul"):
        return None
    x, w = site.call.args
    if not _is_constant(w, 2) or _is_constant(x) or len(shape_of(x)) < 2:
        return None
    if not (_is_float32(x) and _is_float32(w)):
        return None
    source = site.producer(0)
    out_shape = shape_of(site.original)
    if source is not None and is_op(source, "reshape"):
        before = shape_of(source.args[0])
        if before[-1] == shape_of(x)[-1]:
            x = source.args[0]
    weights = to_constant(constant64(w))
    bias = to_constant(np.zeros(out_shape[-1], dtype=np.float64))
    y = relax_ops.dense(x, weights, bias)
    if shape_of(x)[:-1] == out_shape[:-1]:
        return y
    return relax.op.reshape(site.emit(y), out_shape)


def _bias(site: Site) -> relax.Expr | None:
    if not is_op(site.call, "add"):
        return None
    for at, other in ((0, 1), (1, 0)):
        dense = site.producer(at)
        addend = site.call.args[other]
        if dense is not None and is_op(dense, "reshape"):
            dense = site.graph.producer(dense.args[0])
        if (
            dense is not None
            and is_op(dense, "mega.dense")
            and _is_constant(addend)
            and shape_of(addend) in (shape_of(dense.args[2]), (1,), ())
            and shape_of(dense)[-1] == shape_of(site.original)[-1]
            and site.is_only_use(at)
        ):
            x, w, b = dense.args
            y = relax_ops.dense(x, w, to_constant(constant64(b) + constant64(addend)))
            if shape_of(dense) == shape_of(site.original):
                return y
            return relax.op.reshape(site.emit(y), shape_of(site.original))
    return None


def _reshape(site: Site) -> relax.Expr | None:
    if not is_op(site.call, "reshape"):
        return None
    x = site.call.args[0]
    source = site.producer(0)
    if source is not None and is_op(source, "reshape"):
        x = source.args[0]
    target = shape_of(site.original)
    if shape_of(x) == target:
        return x
    return relax.op.reshape(x, target) if x is not site.call.args[0] else None


def _layer_norm(site: Site) -> relax.Expr | None:
    if not is_op(site.call, "nn.layer_norm"):
        return None
    x, gamma, beta = site.call.args
    attrs = site.call.attrs
    last = len(shape_of(x)) - 1
    axes = [int(axis) % (last + 1) for axis in attrs.axes]
    if axes != [last] or not (_is_constant(gamma, 1) and _is_constant(beta, 1)):
        return None
    if not _is_float32(x):
        return None
    scale = constant64(gamma) if attrs.scale else np.ones(shape_of(gamma))
    shift = constant64(beta) if attrs.center else np.zeros(shape_of(beta))
    return relax_ops.layer_norm(x, to_constant(scale), to_constant(shift), eps=float(attrs.epsilon))


def _take(site: Site) -> relax.Expr | None:
    if not is_op(site.call, "take"):
        return None
    x, index = site.call.args
    axis = site.call.attrs.axis
    if axis is None or not _is_constant(index):
        return None
    extent = shape_of(x)[int(axis)]
    at = np.asarray(index.value.numpy())
    last = at.ndim == 0 and (at == -1 or (isinstance(extent, int) and at == extent - 1))
    if last and len(shape_of(x)) >= 3 and int(axis) == 1 and _is_float32(x):
        row = site.emit(relax_ops.last_timestep(x))
        return relax.op.reshape(row, shape_of(site.original))
    if (at < 0).any():
        if not isinstance(extent, int):
            raise UnsupportedModelError(
                f"the model selects index {at.tolist()} of the symbolic dimension {extent}; "
                "symbolic entries support the last timestep alone"
            )
        positive = to_constant(np.where(at < 0, at + extent, at))
        return relax.op.take(x, positive, axis=int(axis), mode=str(site.call.attrs.mode))
    return None


canonicalize = graph_pass("canonicalize", _rule)
