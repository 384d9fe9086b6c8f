"""How an ema_scan kernel runs on a GPU: a block a group of channels and a segment of time.

See `cuda_scan` for the algorithm. Estimate for T = 60, D = 16, B = 1: one segment in 8 chunks of a
round of 8 steps; a round of loads (200 cycles), a chain of 8 (30 cycles each, through shared
memory), and one more round: about 0.5 us at 1.4 GHz, beside a launch of 2.5 us. In sequence it
would be 8 rounds of loads, 1.3 us.

At T = 4096, D = 128 one segment would be 8 chunks of 512 steps, twice 64 rounds, 18 us. 16 segments
of 256, whose ends a kernel before computes, are 32 rounds there, and here 2 of ends and twice 4: 6
us, and a launch (`estimated_cycles`).
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cuda_scan import (
    AHEAD,
    LAUNCH_CYCLES,
    ROUND_CYCLES,
    chain,
    chunk_count,
    chunk_ends,
    nothing,
    scan_rounds,
    segment_ends,
    step_from_zero,
    step_to_last,
    whole_power,
)
from ..common.cuda_threads import WARP
from ..common.dims import ceil_div, known
from ..common.kernel import ScheduledKernel
from .naive import EmaScanSpec

GROUP = 32  # channels of a block: 128 bytes of a time step
WHOLE = 0  # one segment
SEGMENTS = (WHOLE, 64, 128, 256, 512)
THREADS = (64, 128, 256, 512)
DEFAULT_THREADS = 256


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``threads`` of a block, and steps of a ``segment``, 0 for all."""
    spec = EmaScanSpec.of(sch.mod["main"])
    best = min(SEGMENTS, key=lambda segment: estimated_cycles(spec, segment, DEFAULT_THREADS))
    decisions.sample(sch, "threads", THREADS, DEFAULT_THREADS)
    decisions.sample(sch, "segment", SEGMENTS, best)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    chosen = decisions.read(func)
    return ScheduledKernel(_kernel(EmaScanSpec.of(func), chosen["threads"], chosen["segment"]))


def estimated_cycles(spec: EmaScanSpec, segment: int, threads: int) -> float:
    """Return the estimated latency: rounds of loads one after another, and a launch more."""
    N, C = known((spec.seq_len,))[0], min(spec.channels, GROUP)
    own = min(segment or N, N)
    rounds = 2 * ceil_div(own, chunk_count(own, C, threads) * AHEAD)
    if own == N:
        return rounds * ROUND_CYCLES
    before = segment // AHEAD + ceil_div(ceil_div(N, segment), AHEAD)
    return (rounds + before) * ROUND_CYCLES + LAUNCH_CYCLES


def _kernel(spec: EmaScanSpec, most_threads: int, chosen_segment: int) -> tirx.PrimFunc:
    B, N, D = known((spec.batch, spec.seq_len, spec.channels))
    C = min(D, GROUP)
    groups = ceil_div(D, C)
    length = min(chosen_segment or N, N)
    chunks = chunk_count(length, C, most_threads)
    rounds = ceil_div(length, chunks * AHEAD)
    chunks = ceil_div(length, rounds * AHEAD)
    segments = ceil_div(N, length)
    threads = ceil_div(chunks * C, WARP) * WARP

    @T.inline
    def chunk_starts(ends, starts, carry, channel):
        @T.inline
        def keep(unit, carry):
            starts[unit, channel] = carry[0]

        chain(ends, carry, channel, chunks, keep)

    @T.inline
    def write_chunk(p, decay, h, starts, b, d, channel, unit, first, end):
        state = T.alloc_buffer((2,), "float32", scope="local")
        factor = T.alloc_buffer((1,), "float32", scope="local")

        @T.inline
        def emit(t, state):
            if t < end:
                h[b, t, d] = state[0]

        factor[0] = decay[d]
        state[0] = starts[unit, channel]
        state[1] = T.float32(1)
        scan_rounds(step_to_last, p, N, factor, state, b, d, first, rounds, emit)

    @T.inline
    def before_segment(before, decay, carry, b, segment, d):
        # the state that the segments before lead to
        state = T.alloc_buffer((2,), "float32", scope="local")
        factor = T.alloc_buffer((1,), "float32", scope="local")
        factor[0] = whole_power(decay[d], length)
        state[0] = T.float32(0)
        state[1] = T.float32(1)
        all_rounds = T.meta_var(T.ceildiv(segment, AHEAD))
        scan_rounds(
            step_from_zero, before, segments - 1, factor, state, b, d,
            segment - all_rounds * AHEAD, all_rounds, nothing,
        )  # fmt: skip
        carry[0] = state[0]

    @T.prim_func(s_tir=True, private=True)
    def ema_scan(
        p: T.Buffer((B, N, D), "float32"),
        decay: T.Buffer((D,), "float32"),
        h: T.Buffer((B, N, D), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        before = T.alloc_buffer((B, max(segments - 1, 1), D), "float32")
        if segments > 1:
            segment_ends(p, decay, before, N, segments - 1, length, D, most_threads)
        for block in T.thread_binding(B * segments * groups, thread="blockIdx.x"):
            for tid in T.thread_binding(threads, thread="threadIdx.x"):
                ends = T.alloc_buffer((chunks, C, 2), "float32", scope="shared")
                starts = T.alloc_buffer((chunks, C), "float32", scope="shared")
                carry = T.alloc_buffer((1,), "float32", scope="local")
                b = T.meta_var(block // (groups * segments))
                segment = T.meta_var(block // groups % segments)
                channel = T.meta_var(tid % C)
                d = T.meta_var(block % groups * C + tid % C)
                first = T.meta_var(segment * length + tid // C * rounds * AHEAD)
                end = T.meta_var(T.min(segment * length + length, N))

                if T.And(tid < chunks * C, d < D):
                    chunk_ends(
                        step_to_last, p, N, decay[d], ends, b, d, channel, tid // C, first, rounds
                    )
                if T.And(tid < C, d < D):
                    carry[0] = T.float32(0)
                    if segments > 1:
                        before_segment(before, decay, carry, b, segment, d)
                    chunk_starts(ends, starts, carry, channel)
                if T.And(tid < chunks * C, d < D):
                    write_chunk(p, decay, h, starts, b, d, channel, tid // C, first, end)

    return ema_scan
