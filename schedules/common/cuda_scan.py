"""The EMA scan of a block of threads: parallel over channels and over chunks of time.

``h_t = decay * h_{t-1} + p_t`` is linear: what a chunk adds to its end does not depend on what came
before, which reaches that end times ``decay^length``. So each thread scans one chunk of one channel
from zero, and the chunks' ends are chained, one thread a channel. Whoever writes out a chunk scans
it again from its true start, and so rounds as a sequential scan does.

A long sequence is cut once more: a first kernel writes the ends of its segments, in parallel
(`segment_ends`), and each block of a second one scans the ends of the segments before its own with
the decay of a segment, in place of all the steps in them.

Within a chunk the scan is sequential, in a register. A Toeplitz product would be C / 2 times the
arithmetic to save C steps of 4 cycles, and does not pay at chunks this short.

Every load is of a step that exists and none is behind a branch: chunks are whole rounds of `AHEAD`
steps, what is missing before the first step counts as zero, and what is behind the last one is read
from the last and used by nobody.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

from .dims import ceil_div

# Loads that are under way at the same time: an access to L2 takes about 200 cycles.
AHEAD = 8
ROUND_CYCLES = 200
LAUNCH_CYCLES = 3500  # about 2.5 us


def chunk_count(length: int, channels: int, threads: int) -> int:
    """Return how many chunks of at least a round the threads of a block can make of a length."""
    return max(1, min(threads // channels, ceil_div(length, AHEAD)))


def whole_power(base: tirx.PrimExpr, exponent: int) -> tirx.PrimExpr:
    """Return ``base ** exponent`` as CUDA's ``powf`` computes it, to 2 ulp."""
    return T.call_pure_extern("float32", "powf", base, T.float32(exponent))


def step_from_zero(p, b, t, d, length: int):
    """Read a step; those before the first are zero."""
    return T.if_then_else(t >= 0, p[b, t, d], T.float32(0))


def step_to_last(p, b, t, d, length: int):
    """Read a step; those after the last are copies of it."""
    return p[b, T.min(t, length - 1), d]


def step(p, b, t, d, length: int):
    """Read a step that exists."""
    return p[b, t, d]


def nothing(t, state):
    """Emit nothing at a step."""


@T.inline
def scan_rounds(read, p, length, factor, state, b, d, first, rounds, emit):
    """Scan ``rounds`` of `AHEAD` steps from time ``first``, and emit each state.

    ``state[0] = factor[0] * state[0] + p[b, t, d]``, and ``state[1] *= factor[0]``.
    """
    ahead = T.alloc_buffer((AHEAD,), "float32", scope="local")
    for round in T.serial(rounds):
        for i in T.unroll(AHEAD):
            ahead[i] = read(p, b, first + round * AHEAD + i, d, length)
        for i in T.unroll(AHEAD):
            state[0] = factor[0] * state[0] + ahead[i]
            state[1] = factor[0] * state[1]
            emit(first + round * AHEAD + i, state)


@T.inline
def chunk_ends(read, p, length, decay, ends, b, d, channel, unit, first, rounds):
    """Write to ``ends[unit]`` what the chunk from ``first`` adds to its end, and its decay.

    ``decay`` is that of a step.
    """
    state = T.alloc_buffer((2,), "float32", scope="local")
    factor = T.alloc_buffer((1,), "float32", scope="local")
    factor[0] = decay
    state[0] = T.float32(0)
    state[1] = T.float32(1)
    scan_rounds(read, p, length, factor, state, b, d, first, rounds, nothing)
    ends[unit, channel, 0] = state[0]
    ends[unit, channel, 1] = state[1]


@T.inline
def chain(ends, carry, channel, chunks, emit):
    """Lead ``carry[0]`` through all chunks; emit the state before each."""
    for unit in T.serial(chunks):
        emit(unit, carry)
        carry[0] = ends[unit, channel, 1] * carry[0] + ends[unit, channel, 0]


@T.inline
def segment_ends(p, decay, ends, length, segments, segment, channels, threads):
    """Write what each segment but the last adds to its end, ``ends[b, s, d]``: a kernel."""
    for block in T.thread_binding(
        ceil_div(ends.shape[0] * segments * channels, threads), thread="blockIdx.x"
    ):
        for tid in T.thread_binding(threads, thread="threadIdx.x"):
            state = T.alloc_buffer((2,), "float32", scope="local")
            factor = T.alloc_buffer((1,), "float32", scope="local")
            i = T.meta_var(block * threads + tid)
            d = T.meta_var((block * threads + tid) % channels)
            s = T.meta_var((block * threads + tid) // channels % segments)
            b = T.meta_var((block * threads + tid) // (channels * segments))
            if i < ends.shape[0] * segments * channels:
                factor[0] = decay[d]
                state[0] = T.float32(0)
                state[1] = T.float32(1)
                scan_rounds(
                    step, p, length, factor, state, b, d, s * segment, segment // AHEAD, nothing
                )
                ends[b, s, d] = state[0]
