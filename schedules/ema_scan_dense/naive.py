"""What an ema_scan_dense kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import tirx
from tvm.script import tirx as T

from ..common.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class EmaScanDenseSpec(KernelSpec):
    """Sizes of an ema_scan_dense kernel.

    Parameters
    ----------
    batch, seq_len, channels : int
        As in `EmaScanSpec`.
    n : int
        Width of the output.
    residual : bool
        A tensor of the output's shape is added.
    """

    op: ClassVar[str] = "ema_scan_dense"

    batch: int
    seq_len: int
    channels: int
    n: int
    residual: bool = False

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        end = "_residual" if self.residual else ""
        return f"ema_scan_dense_{self.batch}x{self.seq_len}x{self.channels}x{self.n}{end}"


def ema_scan_dense(spec: EmaScanDenseSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(p, decay, w, b[, residual], out)``: `dense` of `ema_scan`.

    Shapes: ``p [B, T, D]``, ``decay [D]``, ``w [D, n]``, ``b [n]``, ``residual`` and ``out``
    ``[B, T, n]``.
    """
    B, N, D, W = spec.batch, spec.seq_len, spec.channels, spec.n
    shape, has_residual = (B, N, W), spec.residual

    @T.inline
    def body(p, decay, w, b, residual, out):
        h = T.alloc_buffer((B, N, D), "float32")
        product = T.alloc_buffer(shape, "float32")
        for i, t, d in T.grid(B, N, D):
            with T.sblock("h"):
                # t is no parallel axis: each step reads the one before
                vi, vd = T.axis.remap("SS", [i, d])
                vt = T.axis.scan(N, t)
                h[vi, vt, vd] = p[vi, vt, vd] + T.if_then_else(
                    vt > 0, decay[vd] * h[vi, T.max(vt - 1, 0), vd], T.float32(0)
                )
        for i, t, j, k in T.grid(B, N, W, D):
            with T.sblock("product"):
                vi, vt, vj, vk = T.axis.remap("SSSR", [i, t, j, k])
                with T.init():
                    product[vi, vt, vj] = T.float32(0)
                product[vi, vt, vj] = product[vi, vt, vj] + h[vi, vt, vk] * w[vk, vj]
        for i, t, j in T.grid(B, N, W):
            with T.sblock("out"):
                vi, vt, vj = T.axis.remap("SSS", [i, t, j])
                if has_residual:
                    out[vi, vt, vj] = product[vi, vt, vj] + b[vj] + residual[vi, vt, vj]
                else:
                    out[vi, vt, vj] = product[vi, vt, vj] + b[vj]

    return spec.attach(ema_scan_dense_prim_func(spec, (D, W), W, body))


def ema_scan_dense_prim_func(spec: EmaScanDenseSpec, w_shape: tuple[int, ...], padded: int, body):
    """Return the PrimFunc around a body, on weights of a shape and a bias of a length."""
    B, N, D = spec.batch, spec.seq_len, spec.channels
    shape = (B, N, spec.n)
    if spec.residual:

        @T.prim_func(s_tir=True, private=True)
        def with_residual(
            p: T.Buffer((B, N, D), "float32"),
            decay: T.Buffer((D,), "float32"),
            w: T.Buffer(w_shape, "float32"),
            b: T.Buffer((padded,), "float32"),
            residual: T.Buffer(shape, "float32"),
            out: T.Buffer(shape, "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            body(p, decay, w, b, residual, out)

        return with_residual

    @T.prim_func(s_tir=True, private=True)
    def without_residual(
        p: T.Buffer((B, N, D), "float32"),
        decay: T.Buffer((D,), "float32"),
        w: T.Buffer(w_shape, "float32"),
        b: T.Buffer((padded,), "float32"),
        out: T.Buffer(shape, "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        body(p, decay, w, b, out, out)

    return without_residual
