"""What an ema_scan kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from tvm import tirx
from tvm.script import tirx as T

from ..common.dims import Dim, DimVars
from ..common.lines import padded
from ..common.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class EmaScanSpec(KernelSpec):
    """Sizes of an ema_scan kernel.

    Parameters
    ----------
    batch, seq_len : int or str
    channels : int
    carried : bool
        The scan goes on from a state, which it replaces by its last one; else it starts at zero.
    """

    op: ClassVar[str] = "ema_scan"

    batch: Dim
    seq_len: Dim
    channels: int
    carried: bool = False

    @property
    def state_width(self) -> int:
        """Columns of the state, whose rows start at cache lines."""
        return padded(self.channels)

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        carried = "_carried" if self.carried else ""
        return f"ema_scan_{self.batch}x{self.seq_len}x{self.channels}{carried}"


def ema_scan(spec: EmaScanSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(p, decay[, state], h)``: ``h_t = decay * h_{t-1} + p_t``.

    ``h_{-1}`` is the state, or 0 without one; the state becomes ``h_{T-1}``.

    Shapes: ``p`` and ``h`` ``[B, T, D]``, ``decay`` ``[D]``, ``state`` ``[B, state_width]``.

    The gain ``1 - decay`` of the moving average is not here: it is a scale of ``p``, which the
    compiler folds into the projection before.
    """
    dims = DimVars()
    B, N, D = *dims.shape((spec.batch, spec.seq_len)), spec.channels
    carried = spec.carried

    @T.inline
    def body(p, decay, state, h):
        for b, t, d in T.grid(B, N, D):
            with T.sblock("h"):
                # t is no parallel axis: each step reads the one before
                vb, vd = T.axis.remap("SS", [b, d])
                vt = T.axis.scan(N, t)
                h[vb, vt, vd] = p[vb, vt, vd] + decay[vd] * T.if_then_else(
                    vt > 0, h[vb, T.max(vt - 1, 0), vd], state[vb, vd] if carried else T.float32(0)
                )
        if carried:
            for b, d in T.grid(B, D):
                with T.sblock("state"):
                    vb, vd = T.axis.remap("SS", [b, d])
                    state[vb, vd] = h[vb, N - 1, vd]

    return spec.attach(ema_scan_prim_func(spec, dims, body))


def ema_scan_prim_func(
    spec: EmaScanSpec, dims: DimVars, body: Callable[..., None]
) -> tirx.PrimFunc:
    """Wrap ``body(p, decay, state, h)`` in the PrimFunc of a spec, with or without a state."""
    B, N, D = *dims.shape((spec.batch, spec.seq_len)), spec.channels
    if spec.carried:

        @T.prim_func(s_tir=True, private=True)
        def ema_scan_carried(
            p: T.Buffer((B, N, D), "float32"),
            decay: T.Buffer((D,), "float32"),
            state: T.Buffer((B, spec.state_width), "float32"),
            h: T.Buffer((B, N, D), "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            body(p, decay, state, h)

        return ema_scan_carried

    @T.prim_func(s_tir=True, private=True)
    def ema_scan(
        p: T.Buffer((B, N, D), "float32"),
        decay: T.Buffer((D,), "float32"),
        h: T.Buffer((B, N, D), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        body(p, decay, decay, h)

    return ema_scan
