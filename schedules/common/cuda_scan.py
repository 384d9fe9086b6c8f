"""The EMA scan of a block of threads: parallel over channels and over chunks of time.

``h_t = decay * h_{t-1} + p_t`` is linear: what a chunk adds to its end does not depend on what came
before, which reaches that end times ``decay^length``. So each thread scans one chunk of one channel
from zero, and the chunks' ends are chained, one thread a channel. Whoever writes out a chunk scans
it again from its true start, and so rounds as a sequential scan does.

Within a chunk the scan is sequential, in a register. A Toeplitz product would be C / 2 times the
arithmetic to save C steps of 4 cycles, and does not pay at chunks this short.
"""

from __future__ import annotations

from tvm.script import tirx as T

from .dims import ceil_div

# Loads that are under way at the same time: an access to L2 takes about 200 cycles.
AHEAD = 8


def chunk_count(length: int, channels: int, threads: int) -> int:
    """Return how many chunks of at least 4 steps the threads of a block can make of a length."""
    return max(1, min(threads // channels, ceil_div(length, 4)))


@T.inline
def scan_steps(p, decay, state, b, d, first, end, steps, emit):
    """Scan from time ``first`` to below ``end``, at most ``steps``, and emit each state.

    ``state[0] = decay * state[0] + p[b, t, d]``, and ``state[1] *= decay``.
    """
    ahead = T.alloc_buffer((AHEAD,), "float32", scope="local")
    for step in T.serial(T.ceildiv(steps, AHEAD)):
        for i in T.unroll(AHEAD):
            if T.And(step * AHEAD + i < steps, first + step * AHEAD + i < end):
                ahead[i] = p[b, first + step * AHEAD + i, d]
        for i in T.unroll(AHEAD):
            if T.And(step * AHEAD + i < steps, first + step * AHEAD + i < end):
                state[0] = decay[d] * state[0] + ahead[i]
                state[1] = decay[d] * state[1]
                emit(first + step * AHEAD + i, state)


def nothing(t, state):
    """Emit nothing at a step."""


@T.inline
def chunk_ends(p, decay, ends, b, d, channel, unit, end, steps):
    """Write to ``ends[unit]`` what chunk ``unit`` adds to its end, and the decay over it."""
    state = T.alloc_buffer((2,), "float32", scope="local")
    state[0] = T.float32(0)
    state[1] = T.float32(1)
    scan_steps(p, decay, state, b, d, unit * steps, end, steps, nothing)
    ends[unit, channel, 0] = state[0]
    ends[unit, channel, 1] = state[1]


@T.inline
def chain(ends, starts, carry, channel, chunks):
    """Write to ``starts[unit]`` the state before chunk ``unit``, to ``carry[0]`` the last one.

    Not in place: TVM would want a barrier between a thread's own read and write.
    """
    carry[0] = T.float32(0)
    for unit in T.serial(chunks):
        starts[unit, channel] = carry[0]
        carry[0] = ends[unit, channel, 1] * carry[0] + ends[unit, channel, 0]
