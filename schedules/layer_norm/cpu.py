"""How a layer_norm kernel runs on x86.

A row of whole vectors that half the registers hold (256 elements with AVX-512) is read once and
stays there. Any other (1 KB at n = 256) stays in L1 for its three passes: sum, squared deviations,
output. Sums run in ``unroll`` independent vectors, which hide the latency of the additions. The
variance is that of the deviations, never E[x^2] - E[x]^2, which cancels.
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
from ..common.reduce import fold_sum
from .naive import LayerNormSpec, layer_norm_prim_func

# A parallel region costs about 1 us, as much as 60 rows of 256 take. It pays there all the same:
# each thread norms rows that it wrote in the dense kernel before, and multiplies in the one behind
# (T = 60, two threads: the whole model 1.7% faster; one thread: no difference). A kernel timed by
# itself does not show that, so that no search decides it.
PARALLEL_ELEMENTS = 6144


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions.

    ``unroll`` is the number of independent partial sums; ``keep_row``, where a row fits, says
    whether it stays in registers (60 rows of 256: 1.6 us in place of 1.9).
    """
    unit, n = vector_unit(target), LayerNormSpec.of(sch.mod["main"]).n
    fits = n % unit.lanes == 0 and 2 * n <= unit.registers * unit.lanes
    decisions.sample(sch, "unroll", [1, 2, 4, 8], 2 if fits else 4)
    if fits:
        decisions.sample(sch, "keep_row", [0, 1], 1)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec = LayerNormSpec.of(func)
    lanes = vector_unit(target).lanes
    while lanes > spec.n:
        lanes //= 2
    chosen = decisions.read(func)
    unroll = chosen["unroll"]
    while unroll * lanes > spec.n:
        unroll //= 2
    kernel = _kernel(spec, lanes, max(1, unroll), keep_row=bool(chosen.get("keep_row", 0)))
    return ScheduledKernel(kernel)


def _kernel(spec: LayerNormSpec, L: int, unroll: int, *, keep_row: bool) -> tirx.PrimFunc:
    dims = DimVars()
    M, N, affine = dims.rows(spec.lead), spec.n, spec.affine
    wide = unroll * L  # elements of one step of the main loop
    steps, rest = N // wide, N % wide
    vectors_left, tail = rest // L, rest % L
    inverse, eps, clamp_variance = 1.0 / N, spec.eps, spec.clamp_variance

    def term(x, mean, square):
        return (x - mean[0]) * (x - mean[0]) if square else x

    @T.inline
    def add_up(x, m, total, mean, square):
        # total[0, 0] = sum over the row of x, or of (x - mean)^2
        for lane in T.vectorized(wide):
            total[0, lane] = T.float32(0)
        for j in T.serial(steps):
            for u in T.unroll(unroll):
                for lane in T.vectorized(L):
                    total[0, u * L + lane] += term(x[m, j * wide + u * L + lane], mean, square)
        for u in T.unroll(vectors_left):
            for lane in T.vectorized(L):
                total[0, u * L + lane] += term(x[m, steps * wide + u * L + lane], mean, square)
        if tail > 0:
            for lane in T.vectorized(tail):
                total[0, lane] += term(x[m, N - tail + lane], mean, square)
        fold_sum(total, 0, wide)

    @T.inline
    def write(x, gamma, beta, y, m, mean, scale, col, n):
        for lane in T.vectorized(n):
            if affine:
                y[m, col + lane] = (x[m, col + lane] - mean[0]) * scale[0] * gamma[
                    col + lane
                ] + beta[col + lane]
            else:
                y[m, col + lane] = (x[m, col + lane] - mean[0]) * scale[0]

    @T.inline
    def deviation(scale):
        # scale[0]: a variance, then the inverse of its root
        if clamp_variance:
            scale[0] = T.if_then_else(
                scale[0] < T.float32(eps), T.float32(eps), scale[0] + T.float32(eps)
            )
        else:
            scale[0] = scale[0] + T.float32(eps)
        scale[0] = T.float32(1) / T.sqrt(scale[0])

    @T.inline
    def add_up_kept(kept, total, square):
        # total[0, 0] = sum of the kept row, or of its squares
        for lane in T.vectorized(wide):
            total[0, lane] = T.float32(0)
        for j in T.unroll(N // L):
            for lane in T.vectorized(L):
                part = T.meta_var(j % unroll * L + lane)
                value = T.meta_var(kept[j, lane] * kept[j, lane] if square else kept[j, lane])
                total[0, part] = total[0, part] + value
        fold_sum(total, 0, wide)

    @T.inline
    def kept_row(x, gamma, beta, y, m):
        kept = T.alloc_buffer((N // L, L), "float32", scope="local")
        total = T.alloc_buffer((1, wide), "float32", scope="local")
        mean = T.alloc_buffer((1,), "float32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        for j in T.unroll(N // L):
            for lane in T.vectorized(L):
                kept[j, lane] = x[m, j * L + lane]
        add_up_kept(kept, total, False)
        mean[0] = total[0, 0] * T.float32(inverse)
        for j in T.unroll(N // L):
            for lane in T.vectorized(L):
                kept[j, lane] = kept[j, lane] - mean[0]
        add_up_kept(kept, total, True)
        scale[0] = total[0, 0] * T.float32(inverse)
        deviation(scale)
        for j in T.unroll(N // L):
            for lane in T.vectorized(L):
                col = T.meta_var(j * L + lane)
                if affine:
                    y[m, col] = kept[j, lane] * scale[0] * gamma[col] + beta[col]
                else:
                    y[m, col] = kept[j, lane] * scale[0]

    @T.inline
    def row(x, gamma, beta, y, m):
        total = T.alloc_buffer((1, wide), "float32", scope="local")
        mean = T.alloc_buffer((1,), "float32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        add_up(x, m, total, mean, False)
        mean[0] = total[0, 0] * T.float32(inverse)
        add_up(x, m, total, mean, True)
        scale[0] = total[0, 0] * T.float32(inverse)
        deviation(scale)
        for j in T.serial(N // L):
            write(x, gamma, beta, y, m, mean, scale, j * L, L)
        if tail > 0:
            write(x, gamma, beta, y, m, mean, scale, N - tail, tail)

    write_row = kept_row if keep_row else row

    @T.inline
    def body(x, gamma, beta, y):
        if M * N >= 2 * PARALLEL_ELEMENTS:
            for m in T.parallel(M):
                write_row(x, gamma, beta, y, m)
        else:
            for m in T.serial(M):
                write_row(x, gamma, beta, y, m)

    return layer_norm_prim_func(spec, dims, body)
