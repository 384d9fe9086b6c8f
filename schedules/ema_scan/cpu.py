"""How an ema_scan kernel runs on x86.

Channels are lanes, time is sequential, the state lives in registers. A step waits for the FMA of
the one before (4 cycles); ``group`` vectors of channels run side by side in that shadow.

Time is never split. A chunked scan (a Toeplitz product a chunk, and a carry) buys parallelism over
time with more arithmetic, and there is none to win. Measured on one core of a Zen 4 (118 GFLOP/s):
4096 steps of 16 channels take 5.6 us, a thousandth of the attention of that length; 16384 take 24
us, where at a width of 512 the layer's products alone take 870 ms at the FMA peak and its attention
2.3 s. Even 512 channels, 6.9 ms for the 64 MiB that they read and write, are 0.2% of that.
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
from .naive import EmaScanSpec, ema_scan_prim_func

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
    dims = DimVars()
    B, N, D = *dims.shape((spec.batch, spec.seq_len)), spec.channels
    groups, tail, carried = D // width, D % width, spec.carried

    @T.inline
    def scan(p, decay, state, h, b, d, n):
        last = T.alloc_buffer((n,), "float32", scope="local")
        for lane in T.vectorized(n):
            last[lane] = state[b, d + lane] if carried else T.float32(0)
        for t in T.serial(N):
            for lane in T.vectorized(n):
                last[lane] = decay[d + lane] * last[lane] + p[b, t, d + lane]
            for lane in T.vectorized(n):
                h[b, t, d + lane] = last[lane]
        if carried:
            for lane in T.vectorized(n):
                state[b, d + lane] = last[lane]

    @T.inline
    def scan_group(p, decay, state, h, b, g):
        if tail == 0:
            scan(p, decay, state, h, b, g * width, width)
        else:
            if g < groups:
                scan(p, decay, state, h, b, g * width, width)
            else:
                scan(p, decay, state, h, b, D - tail, tail)

    units = groups + (tail > 0)

    @T.inline
    def body(p, decay, state, h):
        if B * N * D >= PARALLEL_ELEMENTS:
            for unit in T.parallel(B * units):
                scan_group(p, decay, state, h, unit // units, unit % units)
        else:
            for unit in T.serial(B * units):
                scan_group(p, decay, state, h, unit // units, unit % units)

    return ema_scan_prim_func(spec, dims, body)
