"""Relax operators that only CUDA has: what saves a launch there and nothing on a CPU."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from schedules.common.dims import known
from schedules.ema_scan_dense.naive import EmaScanDenseSpec
from schedules.ema_scan_dense.naive import ema_scan_dense as naive_ema_scan_dense
from schedules.normed_dense.naive import NormedDenseSpec
from schedules.normed_dense.naive import normed_dense as naive_normed_dense

from ..relax_ops import (
    Shape,
    call_kernel,
    dense_fields,
    dict_attrs,
    dims_of,
    infer_dense,
    register_operator,
    shape_of,
)


def _legalize_normed_dense(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    spec = NormedDenseSpec(
        **dense_fields(call),
        eps=float(call.attrs["eps"]),
        clamp_variance=bool(call.attrs["clamp_variance"]),
    )
    return call_kernel(bb, spec, naive_normed_dense(spec), call)


_NORMED_DENSE = register_operator(
    "normed_dense", ["x", "w", "b", "residual"], infer_dense, _legalize_normed_dense
)


def normed_dense(dense: relax.Call, norm: relax.Call) -> relax.Call:
    """Return a dense call on what a plain layer norm reads, normalized on the way."""
    attrs = dict_attrs(
        swiglu=int(dense.attrs["swiglu"]),
        sigmoid_from=int(dense.attrs["sigmoid_from"]),
        paired=int(dense.attrs["paired"]),
        eps=tvm.tirx.FloatImm("float64", float(norm.attrs["eps"])),
        clamp_variance=int(norm.attrs["clamp_variance"]),
    )
    return relax.Call(_NORMED_DENSE, [norm.args[0], *dense.args[1:]], attrs)


def _infer_ema_scan_dense(call: relax.Call) -> Shape:
    return (*shape_of(call.args[0])[:2], shape_of(call.args[2])[1])


def _legalize_ema_scan_dense(bb: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    batch, seq_len, channels = known(dims_of(shape_of(call.args[0])))
    n = shape_of(call.args[2])[1]
    spec = EmaScanDenseSpec(batch, seq_len, channels, n, residual=len(call.args) == 5)
    return call_kernel(bb, spec, naive_ema_scan_dense(spec), call)


_EMA_SCAN_DENSE = register_operator(
    "ema_scan_dense",
    ["p", "decay", "w", "b", "residual"],
    _infer_ema_scan_dense,
    _legalize_ema_scan_dense,
)


def ema_scan_dense(scan: relax.Call, operands: Sequence[relax.Expr]) -> relax.Call:
    """Return a scan and the dense layer of its output; ``operands`` are w, b and a residual."""
    return relax.Call(_EMA_SCAN_DENSE, [*scan.args, *operands])
