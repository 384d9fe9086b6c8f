"""How a layer_norm kernel runs on x86.

A row by itself is one long chain: a sum over lanes, another one, a root, a quotient. So rows go
together, as many as a vector has lanes: a vector holds the sums of all, a tree of shuffles makes it
(`row_sums`), and one root and one quotient serve all rows. They stay in L1 for three passes: sum,
squared deviations, output.

A row that goes alone and that half the registers hold (256 elements with AVX-512) is read once and
stays there. Any other makes the three passes. Sums run in ``unroll`` independent vectors, which
hide the latency of the additions. The variance is that of the deviations, never E[x^2] - E[x]^2,
which cancels.
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
from ..common.reduce import fold_sum, row_sums
from ..common.row_tiles import RowTiles
from .naive import LayerNormSpec, layer_norm_prim_func

# A parallel region costs about 1 us, as much as 60 rows of 256 take. It pays there all the same:
# each thread norms rows that it wrote in the dense kernel before, and multiplies in the one behind
# (T = 60, two threads: the whole model 1.7% faster; one thread: no difference). A kernel timed by
# itself does not show that, so that no search decides it.
PARALLEL_ELEMENTS = 6144
# Of rows that go together, beside what they become: 16 rows of 64 take 0.10 us in place of 0.17; of
# 256, which fill half of it, no less than one by one.
L1_BYTES = 16 << 10
LEAST_TOGETHER = 4


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions.

    ``unroll`` is the number of independent partial sums; ``together``, where rows fit in L1, the
    number of rows that share their sums' trees. ``keep_row``, where a row fits, says whether one
    that goes alone stays in registers.
    """
    spec = LayerNormSpec.of(sch.mod["main"])
    unit, n = vector_unit(target), spec.n
    fits = n % unit.lanes == 0 and 2 * n <= unit.registers * unit.lanes
    rows = DimVars().rows(spec.lead)
    whole = n % unit.lanes == 0 and isinstance(rows, int) and rows >= LEAST_TOGETHER
    bytes_together = 4 * n * unit.lanes
    together = unit.lanes if whole and bytes_together <= L1_BYTES // 2 else 1
    decisions.sample(sch, "unroll", [1, 2, 4, 8], 1 if together > 1 else 2 if fits else 4)
    if fits:
        decisions.sample(sch, "keep_row", [0, 1], 1)
    if whole and bytes_together <= L1_BYTES:
        decisions.sample(sch, "together", [1, unit.lanes], together)


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
    keep_row, together = bool(chosen.get("keep_row", 0)), chosen.get("together", 1)
    return ScheduledKernel(_kernel(spec, lanes, max(1, unroll), keep_row, together))


def _kernel(
    spec: LayerNormSpec, L: int, unroll: int, keep_row: bool, together: int
) -> tirx.PrimFunc:
    dims = DimVars()
    M, N, affine = dims.rows(spec.lead), spec.n, spec.affine
    wide = unroll * L  # elements of one step of the main loop
    steps, rest = N // wide, N % wide
    vectors_left, tail = rest // L, rest % L
    inverse, eps, clamp_variance = 1.0 / N, spec.eps, spec.clamp_variance

    def term(x, mean, square):
        return (x - mean[0]) * (x - mean[0]) if square else x

    @T.inline
    def add_up(x, m, total, mean, square, left):
        # total[0, :left] = sums over the row of x, or of (x - mean)^2
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
        fold_sum(total, 0, wide, left)

    @T.inline
    def write(x, gamma, beta, y, m, mean, scale, r, col, n):
        # n columns of row m, whose mean and inverse deviation stand at r
        for lane in T.vectorized(n):
            if affine:
                y[m, col + lane] = (x[m, col + lane] - mean[r]) * scale[r] * gamma[
                    col + lane
                ] + beta[col + lane]
            else:
                y[m, col + lane] = (x[m, col + lane] - mean[r]) * scale[r]

    @T.inline
    def deviation(scale, n):
        # scale[:n]: variances, then the inverses of their roots
        for lane in T.vectorized(n):
            if clamp_variance:
                scale[lane] = T.Select(
                    scale[lane] < T.float32(eps), T.float32(eps), scale[lane] + T.float32(eps)
                )
            else:
                scale[lane] = scale[lane] + T.float32(eps)
        for lane in T.vectorized(n):
            scale[lane] = T.float32(1) / T.sqrt(scale[lane])

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
        deviation(scale, 1)
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
        add_up(x, m, total, mean, False, 1)
        mean[0] = total[0, 0] * T.float32(inverse)
        add_up(x, m, total, mean, True, 1)
        scale[0] = total[0, 0] * T.float32(inverse)
        deviation(scale, 1)
        for j in T.serial(N // L):
            write(x, gamma, beta, y, m, mean, scale, 0, j * L, L)
        if tail > 0:
            write(x, gamma, beta, y, m, mean, scale, 0, N - tail, tail)

    def mean_of_rows(part, n_rows, result):
        # result[r] = sum of part[r, :] / N. A row that is not there stands for the first again.
        rows = [part[r if r < n_rows else 0, T.Ramp(0, 1, L)] for r in range(L)]
        store_vector(result, row_sums(rows))

    @T.inline
    def store_vector(result, sums):
        result[T.Ramp(0, 1, L)] = sums * T.float32(inverse)

    @T.inline
    def rows_together(x, gamma, beta, y, m, n_rows):
        part = T.alloc_buffer((L, L), "float32", scope="local")
        mean = T.alloc_buffer((L,), "float32", scope="local")
        scale = T.alloc_buffer((L,), "float32", scope="local")
        total = T.alloc_buffer((1, wide), "float32", scope="local")
        one = T.alloc_buffer((1,), "float32", scope="local")
        for r in T.serial(n_rows):
            add_up(x, m + r, total, one, False, L)
            for lane in T.vectorized(L):
                part[r, lane] = total[0, lane]
        mean_of_rows(part, n_rows, mean)
        for r in T.serial(n_rows):
            one[0] = mean[r]
            add_up(x, m + r, total, one, True, L)
            for lane in T.vectorized(L):
                part[r, lane] = total[0, lane]
        mean_of_rows(part, n_rows, scale)
        deviation(scale, L)
        for r in T.serial(n_rows):
            for j in T.unroll(N // L):
                write(x, gamma, beta, y, m + r, mean, scale, r, j * L, L)

    @T.inline
    def several(x, gamma, beta, y):
        tiles = T.meta_var(RowTiles(M, together))
        if M * N >= 2 * PARALLEL_ELEMENTS:
            for t in T.parallel(tiles.count):
                tiles.emit(t, rows_together, x, gamma, beta, y, tiles.start(t))
        else:
            for t in T.serial(tiles.count):
                tiles.emit(t, rows_together, x, gamma, beta, y, tiles.start(t))

    write_row = kept_row if keep_row else row

    @T.inline
    def one_by_one(x, gamma, beta, y):
        if M * N >= 2 * PARALLEL_ELEMENTS:
            for m in T.parallel(M):
                write_row(x, gamma, beta, y, m)
        else:
            for m in T.serial(M):
                write_row(x, gamma, beta, y, m)

    body = several if together > 1 else one_by_one

    return layer_norm_prim_func(spec, dims, body)
