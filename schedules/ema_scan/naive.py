"""What an ema_scan kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import tirx
from tvm.script import tirx as T

from ..common.dims import Dim, DimVars
from ..common.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class EmaScanSpec(KernelSpec):
    """Sizes of an ema_scan kernel: batch, length, channels."""

    op: ClassVar[str] = "ema_scan"

    batch: Dim
    seq_len: Dim
    channels: int

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        return f"ema_scan_{self.batch}x{self.seq_len}x{self.channels}"


def ema_scan(spec: EmaScanSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(p, decay, h)``: ``h_t = decay * h_{t-1} + p_t``, ``h_{-1} = 0``.

    Shapes: ``p`` and ``h`` ``[B, T, D]``, ``decay`` ``[D]``. The gain ``1 - decay`` of the moving
    average is not here: it is a scale of ``p``, which the compiler folds into the projection
    before.
    """
    B, N, D = DimVars().shape((spec.batch, spec.seq_len, spec.channels))

    @T.prim_func(s_tir=True, private=True)
    def ema_scan(
        p: T.Buffer((B, N, D), "float32"),
        decay: T.Buffer((D,), "float32"),
        h: T.Buffer((B, N, D), "float32"),
    ):
        for b, t, d in T.grid(B, N, D):
            with T.sblock("h"):
                # t is no parallel axis: each step reads the one before
                vb, vd = T.axis.remap("SS", [b, d])
                vt = T.axis.scan(N, t)
                h[vb, vt, vd] = p[vb, vt, vd] + T.if_then_else(
                    vt > 0, decay[vd] * h[vb, T.max(vt - 1, 0), vd], T.float32(0)
                )

    return spec.attach(ema_scan)
