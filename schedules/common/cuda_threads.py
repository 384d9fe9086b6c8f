"""What CUDA kernels share: the machine that default decisions are estimated for, warps, exp.

Defaults are the least of an estimate in cycles of one multiprocessor. The figures are those of an
A100 (NVIDIA's A100 whitepaper, 2020): 108 multiprocessors of 4 schedulers, each of which issues an
instruction a cycle, an FFMA of a warp every second one. An H100 has 132 and an FFMA every cycle:
what is best here is near the best there.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

WARP = 32
MULTIPROCESSORS = 108
SCHEDULERS = 4
FFMA_CYCLES = 2
# A tensor core, one beside each scheduler, multiplies float16 or bfloat16, 16x16 by 16x8, in 8
# cycles (1024 FMA a cycle and multiprocessor); the result is there after about 33.
MMA_CYCLES = 8
MMA_LATENCY = 33
L2_BYTES = 64  # a multiprocessor gets a cycle
L2_CYCLES = 200  # from a load to its value
# From one barrier to the next, a block that is alone on its multiprocessor also waits for shared
# memory (about 30 cycles to load) and for the barrier itself.
BARRIER_CYCLES = 60


def exp(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return exp(x) as CUDA's ``expf`` computes it, to 1 ulp; ``T.exp`` would be ``__expf``.

    ``__expf`` errs by 2 + |1.17 x| ulp (CUDA C++ Programming Guide), a softmax's tolerance at x =
    8.
    """
    return T.call_pure_extern("float32", "expf", x)


def sigmoid(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return 1 / (1 + exp(-x)) for float32."""
    return T.float32(1) / (T.float32(1) + exp(T.float32(0) - x))


def silu(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return x * sigmoid(x) for float32."""
    return x * sigmoid(x)


def from_lane_xor(value: tirx.PrimExpr, mask: int) -> tirx.PrimExpr:
    """Return the value of the lane whose number differs by ``mask``; all 32 lanes must ask."""
    return T.tvm_warp_shuffle_xor(T.uint32(0xFFFFFFFF), value, mask, WARP, WARP)


@T.inline
def _add_lanes(buffer, at, mask):
    buffer[at] = buffer[at] + from_lane_xor(buffer[at], mask)


@T.inline
def _max_lanes(buffer, at, mask):
    buffer[at] = T.max(buffer[at], from_lane_xor(buffer[at], mask))


def lanes_sum(buffer: tirx.Buffer, at: tirx.PrimExpr, first: int, end: int) -> None:
    """Add ``buffer[at]`` over lanes whose numbers differ in bits ``first`` to below ``end``.

    Every lane gets the sum. Bits are given by their values: 1 and 32 are a whole warp.
    """
    while first < end:
        _add_lanes(buffer, at, first)
        first *= 2


def lanes_max(buffer: tirx.Buffer, at: tirx.PrimExpr, first: int, end: int) -> None:
    """Take the maximum of ``buffer[at]`` over lanes, as `lanes_sum` adds."""
    while first < end:
        _max_lanes(buffer, at, first)
        first *= 2
