"""Mega's own Relax operators, registered from Python.

The graph phase works on these: ``R.mega.dense``, ``R.mega.layer_norm``, ``R.mega.ema_scan``,
``R.mega.attention``, ``R.mega.cached_attention`` and ``R.mega.last_timestep``. Each infers its
type, and legalizes to the naive PrimFunc of its kernel, so that TVM's own ``LegalizeOps`` is the
whole of the kernel phase.

Weights are constants, float64 until the graph phase has folded all that it folds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import tvm
from tvm import relax, te
from tvm.ir import Op, register_op_attr
from tvm.ir.expr import GenericConst

from schedules.cached_attention.naive import CachedAttentionSpec
from schedules.cached_attention.naive import cached_attention as naive_cached_attention
from schedules.common.dims import Dim, Extent
from schedules.common.half_types import HALF_TYPES
from schedules.common.spec import KernelSpec
from schedules.common.storage import FLOAT32, stored_as
from schedules.dense.naive import DenseSpec
from schedules.dense.naive import dense as naive_dense
from schedules.ema_scan.naive import EmaScanSpec
from schedules.ema_scan.naive import ema_scan as naive_ema_scan
from schedules.gated_attention.naive import GatedAttentionSpec, gated_attention
from schedules.laplace_attention.naive import LaplaceAttentionSpec, laplace_attention
from schedules.layer_norm.naive import LayerNormSpec
from schedules.layer_norm.naive import layer_norm as naive_layer_norm

from .errors import UnsupportedModelError

Shape = tuple[Extent, ...]
Legalize = Callable[[relax.BlockBuilder, relax.Call], relax.Expr]


def shape_of(expr: relax.Expr) -> Shape:
    """Return the shape of a tensor expression: numbers, and expressions where it is symbolic."""
    return extents(expr.ty.shape)


def extents(shape: Iterable[Extent]) -> Shape:
    """Return a shape with its constants as Python's numbers."""
    return tuple(int(dim) if isinstance(dim, tvm.tirx.IntImm) else dim for dim in shape)


def dims_of(shape: Iterable[Extent]) -> tuple[Dim, ...]:
    """Return a shape as a specification holds it: numbers and names.

    Raises
    ------
    UnsupportedModelError
        If a dimension is symbolic, but no variable alone.
    """
    dims: list[Dim] = []
    for extent in extents(shape):
        if not isinstance(extent, int | tvm.tirx.Var):
            raise UnsupportedModelError(
                f"a tensor of the model has the symbolic dimension {extent}; symbolic entries "
                "support batch and seq_len themselves, no terms of them"
            )
        dims.append(extent if isinstance(extent, int) else str(extent.name))
    return tuple(dims)


def _tensor(shape: Sequence[int], dtype: str) -> relax.TensorType:
    return relax.TensorType(list(shape), dtype)


def _dtype_of(expr: relax.Expr) -> str:
    return str(expr.ty.dtype)


def register_operator(
    name: str, args: Sequence[str], infer: Callable[[relax.Call], Shape], legalize: Legalize
) -> Op:
    """Register one operator; a second import of the same process must not repeat it."""
    full = f"relax.mega.{name}"
    if full in Op.list_op_names():
        return Op.get(full)
    tvm.ir._ffi_api.RegisterOp(full, f"Mega's {name}")
    op = Op.get(full)
    for arg in args:
        op.add_argument(arg, "Tensor", "")
    register_op_attr(
        full, "FInferType", lambda call, _bb: _tensor(infer(call), _dtype_of(call.args[0]))
    )
    register_op_attr(full, "FPurity", True)
    register_op_attr(full, "FLegalize", legalize)
    return op


def call_kernel(
    bb: relax.BlockBuilder, spec: KernelSpec, func: tvm.tirx.PrimFunc, call: relax.Call
) -> relax.Expr:
    """Legalize a call to that of a kernel, on tensors of the types that the call has."""
    name = str(spec.name)  # type: ignore[attr-defined]
    dtypes = [_dtype_of(tensor) for tensor in (*call.args, call)]
    if half := set(dtypes) & set(HALF_TYPES):
        func = stored_as(func, [dtype if dtype in half else FLOAT32 for dtype in dtypes])
        name += f"_{dtypes[0]}"
    # 8 is kOpaque: TVM's fusion must not merge a kernel that has its own schedule.
    gvar = bb.add_func(func.with_attr("op_pattern", 8), name)
    return relax.call_tir(gvar, list(call.args), call.ty)


def dict_attrs(**values: Any) -> tvm.ir.Attrs:
    """Return an operator's attributes."""
    return tvm.ir.make_node("ir.DictAttrs", **values)


# dense ------------------------------------------------------------------------------------------


def infer_dense(call: relax.Call) -> Shape:
    """Return the shape that a dense operator gives."""
    n = shape_of(call.args[1])[1]
    return (*shape_of(call.args[0])[:-1], n // 2 if call.attrs["swiglu"] else n)


def dense_fields(call: relax.Call) -> dict[str, Any]:
    """Return the fields of `DenseSpec` of a dense operator's call."""
    k, n = shape_of(call.args[1])
    return {
        "lead": dims_of(shape_of(call.args[0])[:-1]),
        "k": k,
        "n": n,
        "residual": len(call.args) == 4,
        "swiglu": bool(call.attrs["swiglu"]),
        "sigmoid_from": int(call.attrs["sigmoid_from"]),
        "paired": bool(call.attrs["paired"]),
    }


def _legalize_dense(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    spec = DenseSpec(**dense_fields(call))
    return call_kernel(bb, spec, naive_dense(spec), call)


_DENSE = register_operator("dense", ["x", "w", "b", "residual"], infer_dense, _legalize_dense)


def dense(
    x: relax.Expr,
    w: GenericConst,
    b: GenericConst,
    residual: relax.Expr | None = None,
    *,
    swiglu: bool = False,
    sigmoid_from: int = -1,
    paired: bool = False,
) -> relax.Call:
    """Return ``epilogue(x @ w + b)``; the fields are those of `DenseSpec`."""
    args = [x, w, b] if residual is None else [x, w, b, residual]
    attrs = dict_attrs(swiglu=int(swiglu), sigmoid_from=sigmoid_from, paired=int(paired))
    return relax.Call(_DENSE, args, attrs)


# layer_norm -------------------------------------------------------------------------------------


def _legalize_layer_norm(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    *lead, n = shape_of(call.args[0])
    spec = LayerNormSpec(
        lead=dims_of(lead),
        n=n,
        eps=float(call.attrs["eps"]),
        affine=len(call.args) == 3,
        clamp_variance=bool(call.attrs["clamp_variance"]),
    )
    return call_kernel(bb, spec, naive_layer_norm(spec), call)


_LAYER_NORM = register_operator(
    "layer_norm", ["x", "gamma", "beta"], lambda call: shape_of(call.args[0]), _legalize_layer_norm
)


def layer_norm(
    x: relax.Expr,
    gamma: relax.Expr | None = None,
    beta: relax.Expr | None = None,
    *,
    eps: float,
    clamp_variance: bool = False,
) -> relax.Call:
    """Return the layer norm of the last axis; without gamma and beta, the plain one."""
    args = [x] if gamma is None else [x, gamma, beta]
    attrs = dict_attrs(eps=tvm.tirx.FloatImm("float64", eps), clamp_variance=int(clamp_variance))
    return relax.Call(_LAYER_NORM, args, attrs)


# ema_scan ---------------------------------------------------------------------------------------


def _legalize_ema_scan(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    batch, seq_len, channels = dims_of(shape_of(call.args[0]))
    spec = EmaScanSpec(batch, seq_len, int(channels), carried=len(call.args) == 3)
    return call_kernel(bb, spec, naive_ema_scan(spec), call)


_EMA_SCAN = register_operator(
    "ema_scan", ["p", "decay", "state"], lambda call: shape_of(call.args[0]), _legalize_ema_scan
)


def ema_scan(p: relax.Expr, decay: relax.Expr, state: relax.Expr | None = None) -> relax.Call:
    """Return ``h_t = decay * h_{t-1} + p_t`` along axis 1 of ``p [B, T, D]``.

    ``h_{-1}`` is ``state [B, padded(D)]``, or 0 without one; the kernel replaces the state by
    ``h_{T-1}``.
    """
    return relax.Call(_EMA_SCAN, [p, decay] if state is None else [p, decay, state])


# attention --------------------------------------------------------------------------------------

OPERANDS = ("q", "k", "v", "gate")


def _infer_attention(call: relax.Call) -> Shape:
    batch, q_len, _ = shape_of(call.args[0])
    return batch, q_len, int(call.attrs["value_width"])


def _legalize_attention(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    shapes = dict(zip(OPERANDS, map(shape_of, call.args), strict=False))
    fields = {f"{name}_stride": shape[2] for name, shape in shapes.items()}
    fields |= {f"{name}_offset": int(call.attrs[f"{name}_offset"]) for name in OPERANDS}
    fields |= {"width": int(call.attrs["width"]), "value_width": int(call.attrs["value_width"])}
    sizes = dims_of((*shapes["q"][:2], shapes["k"][1]))
    fields |= dict(zip(("batch", "q_len", "k_len"), sizes, strict=True))
    if call.attrs["laplace"]:
        laplace = LaplaceAttentionSpec(**fields)
        return call_kernel(bb, laplace, laplace_attention(laplace), call)
    softmax = GatedAttentionSpec(**fields, scale=float(call.attrs["scale"]))
    return call_kernel(bb, softmax, gated_attention(softmax), call)


_ATTENTION = register_operator("attention", OPERANDS, _infer_attention, _legalize_attention)


def attention(
    operands: Sequence[relax.Expr],
    *,
    laplace: bool,
    scale: float,
    width: int,
    value_width: int,
    offsets: Sequence[int] = (0, 0, 0, 0),
) -> relax.Call:
    """Return the attention of ``(q, k, v[, gate])``; the fields are those of `AttentionSpec`."""
    attrs = dict_attrs(
        laplace=int(laplace),
        scale=tvm.tirx.FloatImm("float64", scale),
        width=width,
        value_width=value_width,
        **{f"{name}_offset": offset for name, offset in zip(OPERANDS, offsets, strict=True)},
    )
    return relax.Call(_ATTENTION, list(operands), attrs)


# cached_attention -------------------------------------------------------------------------------


def _infer_cached_attention(call: relax.Call) -> Shape:
    batch, q_len, _ = shape_of(call.args[0])
    return batch, q_len, int(call.attrs["value_width"])


def _legalize_cached_attention(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    q, k, cache = (dims_of(shape_of(call.args[i])) for i in (0, 1, -1))
    spec = CachedAttentionSpec(
        batch=q[0],
        new_len=k[1],
        q_len=q[1],
        max_len=cache[1],
        width=int(q[2]),
        value_width=int(call.attrs["value_width"]),
        shared=len(call.args) == 4,
        scale=float(call.attrs["scale"]),
    )
    return call_kernel(bb, spec, naive_cached_attention(spec), call)


_CACHED_ATTENTION = register_operator(
    "cached_attention",
    ["q", "k", "v", "lengths", "cache"],
    _infer_cached_attention,
    _legalize_cached_attention,
)


def cached_attention(
    operands: Sequence[relax.Expr], *, value_width: int, scale: float
) -> relax.Call:
    """Return the softmax attention of ``(q, k[, v], lengths, cache)``.

    The kernel appends the new keys and values to the cache first, see `CachedAttentionSpec`; the
    keys are the values too where there is no ``v``.
    """
    attrs = dict_attrs(value_width=value_width, scale=tvm.tirx.FloatImm("float64", scale))
    return relax.Call(_CACHED_ATTENTION, list(operands), attrs)


# last_timestep ----------------------------------------------------------------------------------


def _infer_last_timestep(call: relax.Call) -> Shape:
    batch, _, *rest = shape_of(call.args[0])
    return (batch, 1, *rest)


def _legalize_last_timestep(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    def last_timestep(x: te.Tensor) -> te.Tensor:
        batch, length, *rest = x.shape
        return te.compute((batch, 1, *rest), lambda b, _, *i: x[(b, length - 1, *i)], "last")

    return bb.call_te(last_timestep, call.args[0])


_LAST_TIMESTEP = register_operator(
    "last_timestep", ["x"], _infer_last_timestep, _legalize_last_timestep
)


def last_timestep(x: relax.Expr) -> relax.Call:
    """Return ``x[:, -1:]``, ``[B, 1, ...]``."""
    return relax.Call(_LAST_TIMESTEP, [x])


def is_op(expr: relax.Expr, name: str) -> bool:
    """Whether an expression calls the Relax operator ``relax.<name>``."""
    return isinstance(expr, relax.Call) and expr.op == Op.get(f"relax.{name}")
