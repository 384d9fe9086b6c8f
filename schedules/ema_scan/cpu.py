"""How an ema_scan kernel runs on x86.

Channels are lanes, time is sequential, the state lives in registers. A step waits for the FMA of
the one before (4 cycles); ``group`` vectors of channels run side by side in that shadow. At D = 16
a scan of 4096 steps takes 5 us, a thousandth of the attention of that length: a chunked (Toeplitz)
scan, which buys parallelism over time with more arithmetic, would gain nothing here.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cpu_features import vector_unit
from ..common.dims import DimVars
from ..common.kernel import ScheduledKernel
from .naive import EmaScanSpec

# As for layer_norm: below this many elements a second core costs more than it gives.
PARALLEL_ELEMENTS = 65536


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``group``, the vectors of channels that are scanned side by side."""
    decisions.sample(sch, "group", [1, 2, 4, 8], 4)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec = EmaScanSpec.of(func)
    width = vector_unit(target).lanes * decisions.read(func)["group"]
    return ScheduledKernel(_kernel(spec, min(width, spec.channels)))


def _kernel(spec: EmaScanSpec, width: int) -> tirx.PrimFunc:
    B, N, D = *DimVars().shape((spec.batch, spec.seq_len)), spec.channels
    groups, tail = D // width, D % width

    @T.inline
    def scan(p, decay, h, b, d, n):
        state = T.alloc_buffer((n,), "float32", scope="local")
        for lane in T.vectorized(n):
            state[lane] = T.float32(0)
        for t in T.serial(N):
            for lane in T.vectorized(n):
                state[lane] = decay[d + lane] * state[lane] + p[b, t, d + lane]
            for lane in T.vectorized(n):
                h[b, t, d + lane] = state[lane]

    @T.inline
    def scan_group(p, decay, h, b, g):
        if tail == 0:
            scan(p, decay, h, b, g * width, width)
        else:
            if g < groups:
                scan(p, decay, h, b, g * width, width)
            else:
                scan(p, decay, h, b, D - tail, tail)

    units = groups + (tail > 0)

    @T.prim_func(s_tir=True, private=True)
    def ema_scan(
        p: T.Buffer((B, N, D), "float32"),
        decay: T.Buffer((D,), "float32"),
        h: T.Buffer((B, N, D), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        if B * N * D >= PARALLEL_ELEMENTS:
            for unit in T.parallel(B * units):
                scan_group(p, decay, h, unit // units, unit % units)
        else:
            for unit in T.serial(B * units):
                scan_group(p, decay, h, unit // units, unit % units)

    return ema_scan
