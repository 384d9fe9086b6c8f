"""How a layer_norm kernel runs on x86.

A row by itself is one long chain: its sum over lanes, that of squared deviations, a root, a
quotient. A row of 256 takes some 170 cycles of latency, and no more than 32 of additions, products
or stores with AVX-512. The next row's work does not fill the gap: its values need registers while
they wait, of which a Zen 4 has 192, for less than two rows. Row by row takes 104 cycles.

So rows go down a pipeline. Each turn writes row ``m``, takes deviations and squares of row
``m + 1`` and the mean of row ``m + 3``: none of them waits for another, and the chain of a sum runs
beside the work of the next turn. As vector ``j`` of row ``m`` leaves its register, that of row
``m + 1`` takes it: half the registers hold deviations (all of 256 elements with AVX-512); those of
vectors beyond them are computed twice. 60 rows of 256 take 68 cycles each, a copy of them within L2
66.

Narrow rows have more chain than work even so: as many as a vector has lanes go together. A vector
holds the sums of all, a tree of shuffles makes it (`row_sums`), and one root and one quotient serve
them. Wide rows, which would leave L1 before they are written, go one by one in three passes.

Sums run in ``unroll`` independent vectors, which hide the latency of the additions. The variance is
that of the deviations, never E[x^2] - E[x]^2, which cancels. Whether rows go down a pipeline, and
where in it, changes no bit of them.
"""

from __future__ import annotations

from typing import NamedTuple

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cpu_features import vector_unit
from ..common.dims import DimVars
from ..common.kernel import ScheduledKernel
from ..common.reduce import fold_sum, row_sums
from ..common.row_tiles import RowTiles, opaque
from .naive import LayerNormSpec, layer_norm_prim_func

# A parallel region costs about 1 us, as much as 60 rows of 256 take. It pays there all the same:
# each thread norms rows that it wrote in the dense kernel before, and multiplies in the one behind
# (T = 60, two threads: the whole model 1.7% faster; one thread: no difference). A kernel timed by
# itself does not show that, so that no search decides it.
PARALLEL_ELEMENTS = 6144
# Of rows that go together, or are in a pipeline at a time, beside what they become.
L1_BYTES = 16 << 10
LEAST_TOGETHER = 4
# Rows of one pipeline, where threads share them. On one thread 60 rows of 256 take 1.18 us in two
# pipelines, within a parallel region, and 1.11 in one, without.
PIPELINE_ROWS = 32


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions.

    ``unroll`` is the number of independent partial sums; ``together``, where rows fit in L1, the
    number of rows that share their sums' trees; ``pipelined`` whether rows that do not go together
    go down a pipeline, and ``pipeline_rows`` how many go down one where threads share them.
    """
    spec = LayerNormSpec.of(sch.mod["main"])
    unit, n = vector_unit(target), spec.n
    rows = DimVars().rows(spec.lead)
    known = isinstance(rows, int)
    whole = known and rows >= LEAST_TOGETHER and n % unit.lanes == 0
    bytes_together = 4 * n * unit.lanes
    # 16 rows of 64 take 0.09 us together and 0.12 in a pipeline, of 128 0.22 and 0.16.
    together = unit.lanes if whole and bytes_together <= L1_BYTES // 4 else 1
    decisions.sample(sch, "unroll", [1, 2, 4, 8], 1 if together > 1 else 4)
    if whole and bytes_together <= L1_BYTES:
        decisions.sample(sch, "together", [1, unit.lanes], together)
    if not known or rows > 1:
        # 60 rows of 1024: 6.1 us in place of 8.0; of 2048 16.9 in place of 15.5.
        decisions.sample(sch, "pipelined", [0, 1], int(4 * 4 * n <= L1_BYTES))
    if not known or (rows > PIPELINE_ROWS and rows * n >= 2 * PARALLEL_ELEMENTS):
        decisions.sample(sch, "pipeline_rows", [16, 32, 64, 128], PIPELINE_ROWS)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec = LayerNormSpec.of(func)
    unit = vector_unit(target)
    lanes = unit.lanes
    while lanes > spec.n:
        lanes //= 2
    chosen = decisions.read(func)
    unroll = chosen["unroll"]
    while unroll * lanes > spec.n:
        unroll //= 2
    together, pipelined = chosen.get("together", 1), bool(chosen.get("pipelined", 0))
    vectors, kept = spec.n // lanes, unit.registers // 2
    if together > 1 or (vectors > kept and not pipelined):
        kept = 0
    form = _Form(lanes, max(1, unroll), min(kept, vectors), together, pipelined)
    return ScheduledKernel(_kernel(spec, form, chosen.get("pipeline_rows", PIPELINE_ROWS)))


class _Form(NamedTuple):
    """Lanes, partial sums, vectors of a row that stay in registers, and how rows go."""

    lanes: int
    unroll: int
    kept: int
    together: int
    pipelined: bool


class _Rows(NamedTuple):
    """What the passes over a row read and write.

    ``mean[0]`` is that of the row that is written, the next ones are those of the rows behind it;
    ``scale[0]`` its inverse deviation. ``total`` holds partial sums, ``kept`` deviations.
    """

    x: tirx.Buffer
    gamma: tirx.Buffer
    beta: tirx.Buffer
    y: tirx.Buffer
    total: tirx.Buffer
    kept: tirx.Buffer
    mean: tirx.Buffer
    scale: tirx.Buffer


def _kernel(spec: LayerNormSpec, form: _Form, pipeline_rows: int) -> tirx.PrimFunc:
    dims = DimVars()
    M, N, affine = dims.rows(spec.lead), spec.n, spec.affine
    L, unroll, kept, together, pipelined = form
    wide = unroll * L  # elements of one step of a loop over a row
    vectors, tail = N // L, N % L
    left = (vectors - kept) % unroll
    hide = (lambda value: value) if isinstance(M, int) else opaque
    inverse, eps, clamp_variance = 1.0 / N, spec.eps, spec.clamp_variance

    @T.inline
    def each_vector(visit, rows, m):
        # visit(rows, m, j, n, part, in_register): vector j of row m, its elements, the partial sum
        # that it goes to
        for j in T.unroll(kept):
            visit(rows, m, j, L, j % unroll, True)
        for j in T.serial((vectors - kept) // unroll):
            for u in T.unroll(unroll):
                visit(rows, m, kept + j * unroll + u, L, u, False)
        for u in T.unroll(left):
            visit(rows, m, vectors - left + u, L, u, False)
        if tail > 0:
            visit(rows, m, vectors, tail, 0, False)

    @T.inline
    def add(rows, m, j, n, part, in_register):
        for lane in T.vectorized(n):
            rows.total[0, part * L + lane] += rows.x[m, j * L + lane]

    @T.inline
    def add_square(rows, m, j, n, part, in_register):
        if in_register:
            for lane in T.vectorized(n):
                rows.kept[j, lane] = rows.x[m, j * L + lane] - rows.mean[1]
        for lane in T.vectorized(n):
            d = T.meta_var(
                rows.kept[j, lane] if in_register else rows.x[m, j * L + lane] - rows.mean[1]
            )
            rows.total[0, part * L + lane] += d * d

    @T.inline
    def write(rows, m, j, n, part, in_register):
        for lane in T.vectorized(n):
            col = T.meta_var(j * L + lane)
            d = T.meta_var(rows.kept[j, lane] if in_register else rows.x[m, col] - rows.mean[0])
            plain = T.meta_var(d * rows.scale[0])
            rows.y[m, col] = plain * rows.gamma[col] + rows.beta[col] if affine else plain

    @T.inline
    def write_and_add_square_of_next(rows, m, j, n, part, in_register):
        write(rows, m, j, n, part, in_register)
        add_square(rows, m + 1, j, n, part, in_register)

    @T.inline
    def add_up(visit, rows, m, left_over):
        # total[0, :left_over] = sums over a row
        for lane in T.vectorized(wide):
            rows.total[0, lane] = T.float32(0)
        each_vector(visit, rows, m)
        fold_sum(rows.total, 0, wide, left_over)

    @T.inline
    def find_mean(rows, m, at):
        add_up(add, rows, m, 1)
        rows.mean[at] = rows.total[0, 0] * T.float32(inverse)

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
    def find_scale(visit, rows, m):
        add_up(visit, rows, m, 1)
        rows.scale[0] = rows.total[0, 0] * T.float32(inverse)
        deviation(rows.scale, 1)

    @T.inline
    def pipeline(rows, first, count):
        find_mean(rows, first, 1)
        if count > 1:
            find_mean(rows, first + 1, 2)
        if count > 2:
            find_mean(rows, first + 2, 3)
        find_scale(add_square, rows, first)
        for m in T.serial(count):
            for r in T.unroll(3):
                rows.mean[r] = rows.mean[r + 1]
            if m + 1 < count:
                find_scale(write_and_add_square_of_next, rows, first + m)
            else:
                each_vector(write, rows, first + m)
            if m + 3 < count:
                find_mean(rows, first + m + 3, 3)

    @T.inline
    def row_by_row(rows, first, count):
        for m in T.serial(count):
            find_mean(rows, first + m, 1)
            find_scale(add_square, rows, first + m)
            rows.mean[0] = rows.mean[1]
            each_vector(write, rows, first + m)

    @T.inline
    def piece(x, gamma, beta, y, first, count):
        total = T.alloc_buffer((1, wide), "float32", scope="local")
        mean = T.alloc_buffer((4,), "float32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        if kept > 0:
            deviations = T.alloc_buffer((kept, L), "float32", scope="local")
        else:
            deviations = T.meta_var(total)
        rows = T.meta_var(_Rows(x, gamma, beta, y, total, deviations, mean, scale))
        if pipelined:
            pipeline(rows, first, count)
        else:
            row_by_row(rows, first, count)

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
        total = T.alloc_buffer((1, wide), "float32", scope="local")
        means = T.alloc_buffer((L,), "float32", scope="local")
        scales = T.alloc_buffer((L,), "float32", scope="local")
        mean = T.alloc_buffer((2,), "float32", scope="local")
        scale = T.alloc_buffer((1,), "float32", scope="local")
        rows = T.meta_var(_Rows(x, gamma, beta, y, total, total, mean, scale))
        for r in T.serial(n_rows):
            add_up(add, rows, m + r, L)
            for lane in T.vectorized(L):
                part[r, lane] = total[0, lane]
        mean_of_rows(part, n_rows, means)
        for r in T.serial(n_rows):
            mean[1] = means[r]
            add_up(add_square, rows, m + r, L)
            for lane in T.vectorized(L):
                part[r, lane] = total[0, lane]
        mean_of_rows(part, n_rows, scales)
        deviation(scales, L)
        for r in T.serial(n_rows):
            mean[0] = means[r]
            scale[0] = scales[r]
            each_vector(write, rows, m + r)

    @T.inline
    def tile(x, gamma, beta, y, tiles, t):
        if together > 1:
            tiles.emit(t, rows_together, x, gamma, beta, y, tiles.start(t))
        else:
            start = T.meta_var(hide(tiles.start(t)))
            piece(x, gamma, beta, y, start, hide(tiles.start(t + 1) - start))

    highest = together if together > 1 else pipeline_rows if pipelined else 1

    @T.inline
    def body(x, gamma, beta, y):
        if M * N >= 2 * PARALLEL_ELEMENTS:
            tiles = T.meta_var(RowTiles(M, highest))
            for t in T.parallel(tiles.count):
                tile(x, gamma, beta, y, tiles, t)
        elif together > 1:
            tiles = T.meta_var(RowTiles(M, together))
            for t in T.serial(tiles.count):
                tile(x, gamma, beta, y, tiles, t)
        else:
            piece(x, gamma, beta, y, 0, M)

    return layer_norm_prim_func(spec, dims, body)
