"""How an ema_scan_dense kernel runs on a GPU: each block scans up to its own rows, then multiplies.

A block computes ``rows`` time steps by 64 columns. Its state before the first of them comes from a
scan of all steps before, in chunks of time side by side (`cuda_scan`); its own steps are scanned in
sequence, one thread a channel, into shared memory. So the scan is repeated by every block: D
multiplications a step, where the block's product has 64 D a step.

Estimate for T = 60, D = 16, H = 256, B = 1: 32 blocks of 8 rows. The last scans 56 steps in 8
chunks of a round of 8: a round of loads (200 cycles), a chain of 8 (30 each), another round for its
own steps, and 16 x 4 FFMA: 0.7 us at 1.4 GHz. As two kernels it would be as long, and a launch (2.5
us) more.

At T = 4096 the last block would wait for 64 rounds, 9 us. Long sequences are therefore scanned in
segments of ``rows`` steps: a kernel before computes their ends, all at the same time, and a block
scans the 127 ends before its own, 2 rounds: 1 us in all, and a launch (`estimated_cycles`).
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
    chunk_ends,
    nothing,
    scan_rounds,
    segment_ends,
    step_from_zero,
    step_to_last,
    whole_power,
)
from ..common.cuda_threads import MULTIPROCESSORS
from ..common.dims import ceil_div
from ..common.kernel import ScheduledKernel
from ..dense.cuda_packing import CudaLayout
from ..dense.naive import DenseSpec
from .naive import EmaScanDenseSpec, ema_scan_dense_prim_func

# Channels from which on a block has less than two chunks: the two kernels then stay two.
MAX_CHANNELS = 64
THREADS = 128
COLUMNS = 64
ACROSS = COLUMNS // 4
DOWN = THREADS // ACROSS
ROWS = (8, 16, 32)


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``rows``, the time steps of a block, and ``segmented``, see above.

    As many rows as leave a block for each multiprocessor.
    """
    spec = EmaScanDenseSpec.of(sch.mod["main"])
    columns = spec.batch * ceil_div(spec.n, COLUMNS)
    fit = [r for r in ROWS if columns * ceil_div(spec.seq_len, r) >= MULTIPROCESSORS]
    rows = max(fit, default=ROWS[0])
    decisions.sample(sch, "rows", ROWS, rows)
    best = min((0, 1), key=lambda segmented: estimated_cycles(spec, rows, bool(segmented)))
    decisions.sample(sch, "segmented", (0, 1), best)


def estimated_cycles(spec: EmaScanDenseSpec, rows: int, segmented: bool) -> float:
    """Return the estimated latency of what leads to the last block's state."""
    at_once = THREADS // spec.channels * AHEAD
    if not segmented:
        return ceil_div(spec.seq_len, at_once) * ROUND_CYCLES
    rounds = rows // AHEAD + ceil_div(ceil_div(spec.seq_len, rows), at_once)
    return rounds * ROUND_CYCLES + LAUNCH_CYCLES


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select.

    Returns
    -------
    ScheduledKernel
        Arguments 2 (weights) and 3 (bias) are packed.
    """
    spec = EmaScanDenseSpec.of(func)
    layout = CudaLayout(DenseSpec((1,), spec.channels, spec.n), COLUMNS, 1, COLUMNS // 2)
    chosen = decisions.read(func)
    kernel = _kernel(spec, layout, chosen["rows"], bool(chosen["segmented"]))
    return ScheduledKernel(kernel, {2: layout.pack_weight, 3: layout.pack_bias})


def _kernel(
    spec: EmaScanDenseSpec, layout: CudaLayout, rows: int, segmented: bool
) -> tirx.PrimFunc:
    B, N, D, W = spec.batch, spec.seq_len, spec.channels, spec.n
    panels, has_residual = layout.panels, spec.residual
    row_blocks = ceil_div(N, rows)
    chunks = THREADS // D
    TM = rows // DOWN
    segments = row_blocks - 1 if segmented else 0
    whole = W % 4 == 0  # a thread's columns all exist, or none does

    @T.inline
    def own_steps(p, decay, hs, carry, b, first, channel):
        state = T.alloc_buffer((2,), "float32", scope="local")
        factor = T.alloc_buffer((1,), "float32", scope="local")

        @T.inline
        def emit(t, state):
            hs[t - first, channel] = state[0]

        factor[0] = decay[channel]
        state[0] = carry[0]
        state[1] = T.float32(1)
        scan_rounds(
            step_to_last, p, N, factor, state, b, channel, first, rows // AHEAD, emit
        )  # fmt: skip

    @T.inline
    def ends_before(source, length, decay, ends, b, end, tid):
        # of chunks that lead to ``end``, one a thread and channel
        rounds = T.meta_var(T.ceildiv(end, chunks * AHEAD))
        chunk_ends(
            step_from_zero, source, length, decay, ends, b, tid % D, tid % D, tid // D,
            end - (chunks - tid // D) * rounds * AHEAD, rounds,
        )  # fmt: skip

    def total(acc, residual, b, row, col):
        return residual[b, row, col] + acc if has_residual else acc

    @T.inline
    def multiply(hs, w, bias, residual, out, b, first, panel, tid):
        acc = T.alloc_buffer((TM * 4,), "float32", scope="local")
        w4 = T.alloc_buffer((4,), "float32", scope="local")
        for i in T.unroll(TM):
            for u in T.vectorized(4):
                acc[i * 4 + u] = bias[panel * COLUMNS + tid % ACROSS * 4 + u]
        for d in T.serial(D):
            for u in T.vectorized(4):
                w4[u] = w[panel, d, tid % ACROSS * 4 + u]
            for i in T.unroll(TM):
                for u in T.unroll(4):
                    acc[i * 4 + u] = acc[i * 4 + u] + hs[tid // ACROSS * TM + i, d] * w4[u]
        for i in T.unroll(TM):
            row = T.meta_var(first + tid // ACROSS * TM + i)
            col = T.meta_var(panel * COLUMNS + tid % ACROSS * 4)
            if row < N:
                if whole:
                    if col < W:
                        for u in T.vectorized(4):
                            out[b, row, col + u] = total(acc[i * 4 + u], residual, b, row, col + u)
                else:
                    for u in T.unroll(4):
                        if col + u < W:
                            out[b, row, col + u] = total(acc[i * 4 + u], residual, b, row, col + u)

    @T.inline
    def body(p, decay, w, bias, residual, out):
        before = T.alloc_buffer((B, max(segments, 1), D), "float32")
        if segments > 0:
            segment_ends(p, decay, before, N, segments, rows, D, THREADS)
        for block in T.thread_binding(B * row_blocks * panels, thread="blockIdx.x"):
            for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                ends = T.alloc_buffer((chunks, D, 2), "float32", scope="shared")
                hs = T.alloc_buffer((rows, D), "float32", scope="shared")
                carry = T.alloc_buffer((1,), "float32", scope="local")
                b = T.meta_var(block // (row_blocks * panels))
                segment = T.meta_var(block // panels % row_blocks)
                first = T.meta_var(block // panels % row_blocks * rows)
                if tid < chunks * D:
                    if segments > 0:
                        ends_before(
                            before, segments, whole_power(decay[tid % D], rows), ends, b, segment,
                            tid,
                        )  # fmt: skip
                    else:
                        ends_before(p, N, decay[tid % D], ends, b, first, tid)
                if tid < D:
                    carry[0] = T.float32(0)
                    chain(ends, carry, tid, chunks, nothing)
                    own_steps(p, decay, hs, carry, b, first, tid)
                multiply(hs, w, bias, residual, out, b, first, block % panels, tid)

    return ema_scan_dense_prim_func(spec, (panels, layout.padded_k, COLUMNS), layout.padded_n, body)
