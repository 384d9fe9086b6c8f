"""How an ema_scan kernel runs on a GPU: a block a group of channels, chunks of time in parallel.

See `cuda_scan` for the algorithm. Estimate for T = 60, D = 16, B = 1: 15 chunks of 4 steps; one
round of loads (200 cycles), a chain of 15 (30 cycles each, through shared memory), and one more
round: about 0.7 us at 1.4 GHz, beside a launch of 2.5 us. In sequence it would be 8 rounds of
loads, 1.3 us. At
T = 4096: chunks of 256 steps, 2 x 32 rounds, 10 us; the attention of that length takes 1 ms.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cuda_scan import chain, chunk_count, chunk_ends, scan_steps
from ..common.cuda_threads import WARP
from ..common.dims import ceil_div, known
from ..common.kernel import ScheduledKernel
from .naive import EmaScanSpec

GROUP = 32  # channels of a block: 128 bytes of a time step


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``threads`` of a block, which make the number of chunks."""
    decisions.sample(sch, "threads", [64, 128, 256, 512], 256)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    return ScheduledKernel(_kernel(EmaScanSpec.of(func), decisions.read(func)["threads"]))


def _kernel(spec: EmaScanSpec, most_threads: int) -> tirx.PrimFunc:
    B, N, D = known((spec.batch, spec.seq_len, spec.channels))
    C = min(D, GROUP)
    groups = ceil_div(D, C)
    steps = ceil_div(N, chunk_count(N, C, most_threads))
    chunks = ceil_div(N, steps)
    threads = ceil_div(chunks * C, WARP) * WARP

    @T.inline
    def write_chunk(p, decay, h, starts, b, d, channel, unit):
        state = T.alloc_buffer((2,), "float32", scope="local")

        @T.inline
        def emit(t, state):
            h[b, t, d] = state[0]

        state[0] = starts[unit, channel]
        state[1] = T.float32(1)
        scan_steps(p, decay, state, b, d, unit * steps, N, steps, emit)

    @T.prim_func(s_tir=True, private=True)
    def ema_scan(
        p: T.Buffer((B, N, D), "float32"),
        decay: T.Buffer((D,), "float32"),
        h: T.Buffer((B, N, D), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        for block in T.thread_binding(B * groups, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                ends = T.alloc_buffer((chunks, C, 2), "float32", scope="shared")
                starts = T.alloc_buffer((chunks, C), "float32", scope="shared")
                carry = T.alloc_buffer((1,), "float32", scope="local")
                b = T.meta_var(block // groups)
                channel = T.meta_var(tid % C)
                d = T.meta_var(block % groups * C + tid % C)
                if T.And(tid < chunks * C, d < D):
                    chunk_ends(p, decay, ends, b, d, channel, tid // C, N, steps)
                if T.And(tid < C, d < D):
                    chain(ends, starts, carry, channel, chunks)
                if T.And(tid < chunks * C, d < D):
                    write_chunk(p, decay, h, starts, b, d, channel, tid // C)

    return ema_scan
