"""How an ema_scan_dense kernel runs on a GPU: each block scans up to its own rows, then multiplies.

A block computes ``rows`` time steps by 64 columns. Its state before the first of them comes from a
scan of all steps before, in chunks of time side by side (`cuda_scan`); its own steps are scanned in
sequence, one thread a channel, into shared memory. So the scan is repeated by every block: D
multiplications a step, where the block's product has 64 D a step.

Estimate for T = 60, D = 16, H = 256, B = 1: 32 blocks of 8 rows. The last scans 52 steps in 8
chunks of 7: a round of loads (200 cycles), a chain of 8 (30 each), another round for its own steps,
and 16 x 4 FFMA: 0.7 us at 1.4 GHz. As two kernels it would be as long, and a launch (2.5 us) more.
At T = 4096 the last block scans 4088 steps in chunks of 511, 9 us, and all 2048 blocks 90 us of a
multiprocessor each 19 times: repeating starts to cost there; the attention beside it takes 1 ms.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cuda_scan import chain, chunk_ends, scan_steps
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
    """Sample the decisions: ``rows``, the time steps of a block.

    As many as leave a block for each multiprocessor.
    """
    spec = EmaScanDenseSpec.of(sch.mod["main"])
    columns = spec.batch * ceil_div(spec.n, COLUMNS)
    fit = [r for r in ROWS if columns * ceil_div(spec.seq_len, r) >= MULTIPROCESSORS]
    decisions.sample(sch, "rows", ROWS, max(fit, default=ROWS[0]))


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select.

    Returns
    -------
    ScheduledKernel
        Arguments 2 (weights) and 3 (bias) are packed.
    """
    spec = EmaScanDenseSpec.of(func)
    layout = CudaLayout(DenseSpec((1,), spec.channels, spec.n), COLUMNS, 1, COLUMNS // 2)
    kernel = _kernel(spec, layout, decisions.read(func)["rows"])
    return ScheduledKernel(kernel, {2: layout.pack_weight, 3: layout.pack_bias})


def _kernel(spec: EmaScanDenseSpec, layout: CudaLayout, rows: int) -> tirx.PrimFunc:
    B, N, D, W = spec.batch, spec.seq_len, spec.channels, spec.n
    panels, has_residual = layout.panels, spec.residual
    row_blocks = ceil_div(N, rows)
    chunks = THREADS // D
    TM = rows // DOWN

    @T.inline
    def own_steps(p, decay, hs, carry, b, first, channel):
        state = T.alloc_buffer((2,), "float32", scope="local")

        @T.inline
        def emit(t, state):
            hs[t - first, channel] = state[0]

        state[0] = carry[0]
        state[1] = T.float32(1)
        scan_steps(p, decay, state, b, channel, first, T.min(first + rows, N), rows, emit)

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
                if first + tid // ACROSS * TM + i < N:
                    for u in T.unroll(4):
                        acc[i * 4 + u] = acc[i * 4 + u] + hs[tid // ACROSS * TM + i, d] * w4[u]
        for i in T.unroll(TM):
            row = T.meta_var(first + tid // ACROSS * TM + i)
            if row < N:
                for u in T.unroll(4):
                    col = T.meta_var(panel * COLUMNS + tid % ACROSS * 4 + u)
                    if col < W:
                        if has_residual:
                            out[b, row, col] = residual[b, row, col] + acc[i * 4 + u]
                        else:
                            out[b, row, col] = acc[i * 4 + u]

    @T.inline
    def body(p, decay, w, bias, residual, out):
        for block in T.thread_binding(B * row_blocks * panels, thread="blockIdx.x"):
            for tid in T.thread_binding(THREADS, thread="threadIdx.x"):
                ends = T.alloc_buffer((chunks, D, 2), "float32", scope="shared")
                starts = T.alloc_buffer((chunks, D), "float32", scope="shared")
                hs = T.alloc_buffer((rows, D), "float32", scope="shared")
                carry = T.alloc_buffer((1,), "float32", scope="local")
                b = T.meta_var(block // (row_blocks * panels))
                first = T.meta_var(block // panels % row_blocks * rows)
                if tid < chunks * D:
                    chunk_ends(
                        p, decay, ends, b, tid % D, tid % D, tid // D, first,
                        T.ceildiv(first, chunks),
                    )  # fmt: skip
                if tid < D:
                    chain(ends, starts, carry, tid, chunks)
                    own_steps(p, decay, hs, carry, b, first, tid)
                multiply(hs, w, bias, residual, out, b, first, block % panels, tid)

    return ema_scan_dense_prim_func(spec, (panels, layout.padded_k, COLUMNS), layout.padded_n, body)
