"""How a dense kernel runs on x86.

1. Weights are packed in panels (`PanelLayout`), at compile time.
2. The grid is (row block, panel), split over threads; panels are innermost, so that a row block of
   ``x`` stays in L2 while the weights stream past it once a block.
3. A register tile of ``tile_m`` rows by one panel accumulates over all of k: each k step loads the
   panel's vectors once, and each of them meets ``tile_m`` broadcast elements of ``x``.
4. Meanwhile the next panel is prefetched into L2, a line a k step: a model's weights do not fit in
   L2 from one call to the next, and panels are too short for the hardware's streams to settle.
   Behind the last panel lies the next kernel's, since tensors lie in the order of their use.
5. Bias starts the accumulators; residual, sigmoid or SwiGLU are applied to them on the way out.

Rows that no tile divides get a second, lower tile; columns that no panel divides get a narrower
panel; columns that no vector divides are stored by a shorter vector. Nothing is computed twice.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cpu_features import VectorUnit, vector_unit
from ..common.kernel import ScheduledKernel
from ..common.spec import rows as row_count
from ..common.vector_math import sigmoid, silu
from .naive import DenseSpec
from .packing import PanelLayout

# Rows of x that share one pass over the weights: 120 rows of k = 256 are 120 KB, an eighth of the
# L2 beside the panel's 64 KB.
BLOCK_M = 120
LINE = 16  # float32 of a cache line
READ, INTO_L2, DATA = 0, 2, 1  # the prefetch intrinsic's arguments


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions of a dense kernel.

    ``tile_m`` rows by ``panel_vectors`` vectors is the register tile: it fills the register file up
    to the vectors of one k step. ``block_m`` is the number of rows that share a pass over the
    weights. ``prefetch`` says whether the next panel is fetched ahead.
    """
    spec = DenseSpec.of(sch.mod["main"])
    unit = vector_unit(target)
    tile_m, panel_vectors = default_tile(spec, unit)
    decisions.sample(sch, "tile_m", sorted({1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, tile_m}), tile_m)
    widths = {2, 4, 6, 8} if spec.swiglu else {1, 2, 3, 4, 6, 8}
    decisions.sample(sch, "panel_vectors", sorted(widths | {panel_vectors}), panel_vectors)
    decisions.sample(sch, "block_m", sorted({12, 24, 30, 48, 60, 120, 240, BLOCK_M}), BLOCK_M)
    decisions.sample(sch, "prefetch", [0, 1], 1)


def default_tile(spec: DenseSpec, unit: VectorUnit) -> tuple[int, int]:
    """Return the register tile (rows, vectors of a panel) that keeps the FMA units busy.

    AVX-512 holds 6x4 accumulators beside 4 weight vectors (28 of 32 registers), AVX2 6x2 beside 2
    (14 of 16). Few rows get wider panels, so that enough independent accumulators hide the FMA's
    latency (4 cycles, 1 to 2 a cycle); few columns get taller tiles. A k step's weight vectors and
    the broadcast element need registers too, or accumulators are spilled at each step: 3 rows get 6
    vectors, not 8.
    """
    accumulators = 24 if unit.registers == 32 else 12
    m = row_count(spec.lead)
    vectors = PanelLayout(spec, unit.lanes, unit.lanes * (2 if spec.swiglu else 1)).padded_n
    vectors //= unit.lanes
    square = accumulators // 6
    widest = 8 if unit.registers == 32 else 6
    room = (unit.registers - 1) // (m + 1) if m > 1 else widest
    widths = [w for w in (8, 6, 4, 3, 2) if w <= min(widest, accumulators // m, room)]
    panel = min(vectors, max(square, *widths, 1))
    if spec.swiglu:
        panel = max(2, panel - panel % 2)
    tile_m = min(m, max(1, accumulators // panel), 12)
    return -(-m // -(-m // tile_m)), panel  # tiles of equal height: 7 rows are 4 + 3, not 6 + 1


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select.

    Returns
    -------
    ScheduledKernel
        Arguments 1 (weights) and 2 (bias) are packed.
    """
    spec = DenseSpec.of(func)
    chosen = decisions.read(func)
    lanes = vector_unit(target).lanes
    layout = PanelLayout(spec, lanes, chosen["panel_vectors"] * lanes)
    tile_m = min(chosen["tile_m"], row_count(spec.lead))
    kernel = _kernel(spec, layout, tile_m, chosen["block_m"], prefetch=bool(chosen["prefetch"]))
    return ScheduledKernel(kernel, {1: layout.pack_weight, 2: layout.pack_bias})


def _kernel(
    spec: DenseSpec, layout: PanelLayout, tile_m: int, block_m: int, *, prefetch: bool
) -> tirx.PrimFunc:
    M, K, L = row_count(spec.lead), spec.k, layout.lanes
    width, panels, full_panels = layout.width, layout.panels, layout.full_panels
    tail_width, size, padded_n = layout.tail_width, layout.size, layout.padded_n
    out_n, swiglu, sigmoid_from = spec.out_n, spec.swiglu, spec.sigmoid_from
    has_residual, has_sigmoid = spec.residual, 0 <= sigmoid_from < spec.n
    step = 2 if swiglu else 1  # accumulator vectors that make one output vector
    ragged = out_n % L  # columns of the last, partly filled output vector

    tile_rows = M // tile_m * tile_m  # rows in full tiles
    last_rows = M - tile_rows
    tiles_per_block = max(1, block_m // tile_m)
    block_rows = tiles_per_block * tile_m
    blocks = -(-M // block_rows)
    # Tiles that share a panel, and lines of it that each of them fetches ahead a k step.
    sharing = min(tiles_per_block, tile_rows // tile_m)
    lines = width // LINE
    lines_a_tile = -(-lines // sharing) if prefetch and sharing > 1 and lines > 0 else 0

    def epilogue(acc, i, j, lane, col, activate):
        value = acc[i, j * step * L + lane]
        if swiglu:
            return silu(value) * acc[i, (j * step + 1) * L + lane]
        if activate:
            return T.Select(col >= sigmoid_from, sigmoid(value), value)
        return value

    @T.inline
    def store_vector(acc, residual, y, m, i, j, col, n, activate):
        # n columns of output vector j of row i
        for lane in T.vectorized(n):
            if has_residual:
                y[m + i, col + lane] = residual[m + i, col + lane] + epilogue(
                    acc, i, j, lane, col + lane, activate
                )
            else:
                y[m + i, col + lane] = epilogue(acc, i, j, lane, col + lane, activate)

    @T.inline
    def store(acc, residual, y, m, i, j, col, n):
        if has_sigmoid:
            if col + n <= sigmoid_from:  # columns without one are spared its 25 instructions
                store_vector(acc, residual, y, m, i, j, col, n, False)
            else:
                store_vector(acc, residual, y, m, i, j, col, n, True)
        else:
            store_vector(acc, residual, y, m, i, j, col, n, False)

    @T.inline
    def tile(x, w, b, residual, y, m, panel, tile_rows, vectors, t, ahead):
        acc = T.alloc_buffer((tile_rows, vectors * L), "float32", scope="local")
        base = T.meta_var(panel * (width * K))
        col = T.meta_var(panel * (width // step))
        for i in T.unroll(tile_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    acc[i, j * L + lane] = b[panel * width + j * L + lane]
        for k in T.serial(K):
            for line in T.unroll(ahead):
                # The last lines again, where the tiles are more than the lines.
                at = T.meta_var(T.min(t * ahead + line, lines - 1) * LINE)
                T.evaluate(
                    T.call_intrin(
                        "void",
                        "tirx.prefetch",
                        T.address_of(w[base + width * K + k * width + at]),
                        READ,
                        INTO_L2,
                        DATA,
                    )
                )
            for i in T.unroll(tile_rows):
                for j in T.unroll(vectors):
                    for lane in T.vectorized(L):
                        acc[i, j * L + lane] = (
                            acc[i, j * L + lane]
                            + x[m + i, k] * w[base + k * (vectors * L) + j * L + lane]
                        )
        for i in T.unroll(tile_rows):
            for j in T.unroll(vectors // step):
                if ragged == 0:
                    store(acc, residual, y, m, i, j, col + j * L, L)
                else:
                    if col + j * L + L <= out_n:
                        store(acc, residual, y, m, i, j, col + j * L, L)
                    else:
                        store(acc, residual, y, m, i, j, col + j * L, ragged)

    @T.inline
    def panel_rows(x, w, b, residual, y, m, panel, tile_rows, t, ahead):
        if tail_width == 0:
            tile(x, w, b, residual, y, m, panel, tile_rows, width // L, t, ahead)
        elif full_panels == 0:
            tile(x, w, b, residual, y, m, 0, tile_rows, tail_width // L, t, 0)
        else:
            if panel < full_panels:
                tile(x, w, b, residual, y, m, panel, tile_rows, width // L, t, ahead)
            else:
                tile(x, w, b, residual, y, m, full_panels, tile_rows, tail_width // L, t, 0)

    @T.inline
    def body(x_nd, w, b, residual_nd, y_nd):
        x = T.decl_buffer((M, K), "float32", data=x_nd.data)
        y = T.decl_buffer((M, out_n), "float32", data=y_nd.data)
        residual = T.decl_buffer((M, out_n), "float32", data=residual_nd.data)
        for g in T.parallel(blocks * panels):
            block = T.meta_var(g // panels)
            panel = T.meta_var(g % panels)
            for t in T.serial(
                T.min(tiles_per_block, tile_rows // tile_m - block * tiles_per_block)
            ):
                m = T.meta_var(block * block_rows + t * tile_m)
                panel_rows(x, w, b, residual, y, m, panel, tile_m, t, lines_a_tile)
            if last_rows > 0:
                if block == blocks - 1:
                    panel_rows(x, w, b, residual, y, tile_rows, panel, last_rows, 0, 0)

    in_shape, out_shape = (*spec.lead, K), (*spec.lead, out_n)
    if has_residual:

        @T.prim_func(s_tir=True, private=True)
        def dense_residual(
            x: T.Buffer(in_shape, "float32"),
            w: T.Buffer((size,), "float32"),
            b: T.Buffer((padded_n,), "float32"),
            residual: T.Buffer(out_shape, "float32"),
            y: T.Buffer(out_shape, "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            body(x, w, b, residual, y)

        return dense_residual

    @T.prim_func(s_tir=True, private=True)
    def dense(
        x: T.Buffer(in_shape, "float32"),
        w: T.Buffer((size,), "float32"),
        b: T.Buffer((padded_n,), "float32"),
        y: T.Buffer(out_shape, "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        body(x, w, b, y, y)

    return dense
