"""How a layer_norm kernel runs on a GPU: a warp a row, in three passes: sum, deviations, output.

The row comes from memory once; it is in L1 for the other two. The variance is that of the
deviations, never E[x^2] - E[x]^2, which cancels.

Estimate: 60 rows of 256 are 61 KB in and 61 KB out, 0.08 us at an A100's 1555 GB/s. What remains is
the launch (about 2.5 us) and the latency of one row: 3 passes and 10 shuffles, 1 us. So rows are
spread: a block takes one row until there are more rows than multiprocessors.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cuda_threads import MULTIPROCESSORS, WARP, lanes_sum
from ..common.dims import DimVars, ceil_div, known_rows
from ..common.kernel import ScheduledKernel
from .naive import LayerNormSpec, layer_norm_prim_func


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``warps``, the rows of a block."""
    spec = LayerNormSpec.of(sch.mod["main"])
    fit = [w for w in (1, 2, 4, 8) if ceil_div(known_rows(spec.lead), w) >= MULTIPROCESSORS]
    decisions.sample(sch, "warps", [1, 2, 4, 8], max(fit, default=1))


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    return ScheduledKernel(_kernel(LayerNormSpec.of(func), decisions.read(func)["warps"]))


def _kernel(spec: LayerNormSpec, warps: int) -> tirx.PrimFunc:
    M, N, affine = known_rows(spec.lead), spec.n, spec.affine
    inverse, eps, clamp_variance = 1.0 / N, spec.eps, spec.clamp_variance
    V = 4 if N % 4 == 0 else 1  # a lane's piece, 16 bytes where rows are aligned
    steps = ceil_div(N, WARP * V)

    @T.inline
    def add_up(x, part, mean, m, lane, square):
        part[0] = T.float32(0)
        for i in T.serial(steps):
            if (i * WARP + lane) * V < N:
                four = T.alloc_buffer((V,), "float32", scope="local")
                for v in T.vectorized(V):
                    four[v] = x[m, (i * WARP + lane) * V + v]
                for v in T.unroll(V):
                    if square:
                        part[0] = part[0] + (four[v] - mean[0]) * (four[v] - mean[0])
                    else:
                        part[0] = part[0] + four[v]
        lanes_sum(part, 0, 1, WARP)
        part[0] = part[0] * T.float32(inverse)

    @T.inline
    def row(x, gamma, beta, y, m, lane):
        part = T.alloc_buffer((1,), "float32", scope="local")
        mean = T.alloc_buffer((1,), "float32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        add_up(x, part, mean, m, lane, False)
        mean[0] = part[0]
        add_up(x, part, mean, m, lane, True)
        if clamp_variance:
            scale[0] = T.if_then_else(
                part[0] < T.float32(eps), T.float32(eps), part[0] + T.float32(eps)
            )
        else:
            scale[0] = part[0] + T.float32(eps)
        scale[0] = T.float32(1) / T.sqrt(scale[0])
        for i in T.serial(steps):
            if (i * WARP + lane) * V < N:
                for v in T.vectorized(V):
                    col = T.meta_var((i * WARP + lane) * V + v)
                    if affine:
                        y[m, col] = (x[m, col] - mean[0]) * scale[0] * gamma[col] + beta[col]
                    else:
                        y[m, col] = (x[m, col] - mean[0]) * scale[0]

    @T.inline
    def body(x, gamma, beta, y):
        for block in T.thread_binding(ceil_div(M, warps), thread="blockIdx.x"):
            for tid in T.thread_binding(warps * WARP, thread="threadIdx.x"):
                if block * warps + tid // WARP < M:
                    row(x, gamma, beta, y, block * warps + tid // WARP, tid % WARP)

    return layer_norm_prim_func(spec, DimVars(), body)
