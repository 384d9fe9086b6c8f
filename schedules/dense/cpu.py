"""How a dense kernel runs on x86.

1. Weights are packed in panels (`PanelLayout`), at compile time.
2. The grid is (row block, panel), split over threads; panels are innermost, so that a row block of
   ``x`` stays in L2 while the weights stream past it once a block.
3. A register tile of up to ``tile_m`` rows by one panel accumulates over all of k: each k step
   loads the panel's vectors once, and each of them meets the rows' broadcast elements of ``x``. One
   or two rows take several panels at a time, so that enough independent accumulators hide the FMA's
   latency (4 cycles, 1 to 2 a cycle); the panels are the same, whatever the number of rows.
4. Meanwhile the next panel is prefetched into L2, a line a k step: a model's weights do not fit in
   L2 from one call to the next, and panels are too short for the hardware's streams to settle.
   Behind the last panel lies the next kernel's, since tensors lie in the order of their use. The
   lines of the tile's output and residual are fetched as it starts: many rows have them in L3
   (32 x 60 rows: 1.5% faster at k = 256, 11% at k = 16; a few rows: no difference).
5. Bias starts the accumulators; residual, sigmoid or SwiGLU are applied to them on the way out.

Rows that no tile divides get tiles of two heights (`RowTiles`); columns that no panel divides get a
narrower panel; columns that no vector divides are stored by a shorter vector. Nothing is computed
twice.
"""

from __future__ import annotations

import dataclasses
import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cpu_features import VectorUnit, vector_unit
from ..common.dims import DimVars, ceil_div
from ..common.kernel import ScheduledKernel
from ..common.prefetch import INTO_L1, INTO_L2, READ, WRITE
from ..common.prefetch import prefetch as fetch_line
from ..common.row_tiles import RowTiles, opaque
from ..common.vector_math import sigmoid, silu
from .naive import DenseSpec, dense_prim_func
from .packing import PanelLayout

# Rows of x that share one pass over the weights: 120 rows of k = 256 are 120 KB, an eighth of the
# L2 beside the panel's 64 KB.
BLOCK_M = 120
LINE = 16  # float32 of a cache line
NARROWEST = 4  # lanes
# A model no wider than this has its weights in L2 from call to call (width 64: 21.9 us with
# prefetches, 21.8 without). Wider ones lose 3 to 8% without; 2 panels ahead differ little from 1.
NARROW = 192


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions of a dense kernel.

    ``tile_m`` rows by ``panel_vectors`` vectors is the register tile: it fills the register file up
    to the vectors of one k step. ``block_m`` is the number of rows that share a pass over the
    weights. ``prefetch`` is how many panels ahead weights are fetched, 0 for not at all.

    The panel has one width: kernels of any number of rows share their packed weights. A search over
    widths gained 1.7% in one kernel on one thread, and nothing in the whole model.
    """
    spec = DenseSpec.of(sch.mod["main"])
    unit = dense_unit(spec, target)
    tile_m, panel_vectors = default_tile(spec, unit)
    lead = DimVars().rows(spec.lead)
    rows = lead if isinstance(lead, int) else math.inf
    tiles = {m for m in (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14) if m <= rows}
    # The least of those that hold all rows stands for all of them.
    blocks = [12, 24, 30, 48, 60, 120, 240]
    blocks = [m for m, before in zip(blocks, [0, *blocks], strict=False) if before < rows]
    block_m = min(BLOCK_M, blocks[-1])
    if isinstance(lead, int):
        panels = PanelLayout(spec, unit.lanes, panel_vectors * unit.lanes).panels
        if halves := _halves(lead, tile_m, panels):
            tile_m, block_m = halves
            # A kernel timed by itself does not show what rows of its own save a thread.
            blocks = [m for m in blocks if m < block_m]
    decisions.sample(sch, "tile_m", sorted(tiles | {tile_m}), tile_m)
    decisions.sample(sch, "panel_vectors", [panel_vectors], panel_vectors)
    decisions.sample(sch, "block_m", sorted({*blocks, block_m}), block_m)
    ahead = 0 if max(spec.k, spec.out_n) <= NARROW else 1
    decisions.sample(sch, "prefetch", [0, 1, 2], ahead)


def dense_unit(spec: DenseSpec, target: Target) -> VectorUnit:
    """Return the vector unit, with vectors no wider than the output.

    Of two narrow ones as many start in a cycle as of a wide one, or more (Zen 4, 8 columns, 16 rows
    of k = 64: 0.14 us in vectors of 8, 0.28 in vectors of 16).
    """
    unit = vector_unit(target)
    lanes = unit.lanes
    while lanes > NARROWEST and spec.out_n <= lanes // 2:
        lanes //= 2
    return dataclasses.replace(unit, lanes=lanes)


def _halves(rows: int, tile_m: int, panels: int) -> tuple[int, int] | None:
    """Return ``tile_m`` and ``block_m`` that split rows in two equal blocks, if that is better.

    Two threads then have rows of their own, one dense kernel after the other, and what one wrote
    is in its own L2 when the next is called; of panels they would share all rows (T = 60, two
    threads: the whole model 1.1 to 2.3% faster; one thread: no difference). It takes as many tiles
    in each half as hide the fetching of a panel, or a kernel of a single panel, which nothing else
    splits.
    """
    if rows > 2 * BLOCK_M:
        return None  # many blocks
    half = ceil_div(rows, 2)
    tiles = ceil_div(half, tile_m)
    if tiles < (2 if panels == 1 else 4):
        return None
    tile_m = ceil_div(half, tiles)
    return tile_m, tiles * tile_m


def default_tile(spec: DenseSpec, unit: VectorUnit) -> tuple[int, int]:
    """Return the register tile (rows, vectors of a panel) that keeps the FMA units busy.

    AVX-512 holds 6x4 accumulators beside 4 weight vectors (28 of 32 registers), AVX2 6x2 beside 2
    (14 of 16). Few columns get taller tiles. The number of rows has no say: kernels of all shapes
    share their packed weights.
    """
    accumulators = _accumulators(unit)
    vectors = PanelLayout(spec, unit.lanes, unit.lanes * (2 if spec.swiglu else 1)).padded_n
    panel = min(vectors // unit.lanes, accumulators // 6)
    if spec.swiglu:
        panel = max(2, panel - panel % 2)
    return min(accumulators // panel, 12), panel


def _accumulators(unit: VectorUnit) -> int:
    return 24 if unit.registers == 32 else 12


def joined_panels(rows: int, panel_vectors: int, unit: VectorUnit) -> int:
    """Return how many panels a tile of a few rows takes at a time.

    A k step's weight vectors and the broadcast element need registers too, or accumulators are
    spilled at each step: 2 rows get 8 vectors of AVX-512, and 5 of AVX2 at most.
    """
    widest = 8 if unit.registers == 32 else 6
    room = (unit.registers - 1) // (rows + 1) if rows > 1 else widest
    return max(1, min(widest, _accumulators(unit) // rows, room) // panel_vectors)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select.

    Returns
    -------
    ScheduledKernel
        Arguments 1 (weights) and 2 (bias) are packed.
    """
    spec = DenseSpec.of(func)
    chosen = decisions.read(func)
    unit = dense_unit(spec, target)
    layout = PanelLayout(spec, unit.lanes, chosen["panel_vectors"] * unit.lanes)
    joined = []
    for rows in range(1, chosen["tile_m"] + 1):
        panels = joined_panels(rows, chosen["panel_vectors"], unit)
        joined.append(max(1, min(panels, layout.full_panels)))
    kernel = _kernel(spec, layout, joined, chosen["block_m"], chosen["prefetch"])
    return ScheduledKernel(kernel, {1: layout.pack_weight, 2: layout.pack_bias})


def _kernel(
    spec: DenseSpec, layout: PanelLayout, joined: list[int], block_m: int, prefetch: int
) -> tirx.PrimFunc:
    """Return the kernel; ``joined[i]`` is how many panels a tile of ``i + 1`` rows takes."""
    dims = DimVars()
    M, K, L = dims.rows(spec.lead), spec.k, layout.lanes
    width, panels, full_panels = layout.width, layout.panels, layout.full_panels
    tail_width, size, padded_n = layout.tail_width, layout.size, layout.padded_n
    out_n, swiglu, sigmoid_from = spec.out_n, spec.swiglu, spec.sigmoid_from
    has_residual, has_sigmoid = spec.residual, 0 <= sigmoid_from < spec.n
    step = 2 if swiglu else 1  # accumulator vectors that make one output vector
    ragged = out_n % L  # columns of the last, partly filled output vector

    tile_m = len(joined)
    few = sum(count > 1 for count in joined)  # up to as many rows take several panels at a time
    tiles_per_block = max(1, block_m // tile_m)
    lines = width // LINE if prefetch else 0  # of a panel, a k step

    def lines_ahead(tiles, blocks):
        """Return how many lines of the next panel a tile fetches a k step."""
        # Of unknown rows 4 tiles or more: sequences of 24 rows and up, where it matters.
        sharing = tiles // blocks if isinstance(tiles, int) else min(tiles_per_block, 4)
        return ceil_div(lines, sharing) if sharing > 1 else 0

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
    def tile(x, w, b, residual, y, m, panel, t, ahead, tile_rows, panel_vectors, joined):
        # `joined` panels of `panel_vectors` vectors
        vectors = T.meta_var(joined * panel_vectors)
        acc = T.alloc_buffer((tile_rows, vectors * L), "float32", scope="local")
        base = T.meta_var(panel * (width * K))
        col = T.meta_var(panel * (width // step))
        for i in T.unroll(tile_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    acc[i, j * L + lane] = b[panel * width + j * L + lane]
        if prefetch > 0:
            for i in T.unroll(tile_rows):
                for j in T.unroll(vectors // step):
                    fetch_line(y[m + i, col + j * L], WRITE, INTO_L1)
                    if has_residual:
                        fetch_line(residual[m + i, col + j * L], READ, INTO_L1)
        for k in T.serial(K):
            for line in T.unroll(ahead):
                # The last lines again, where the tiles are more than the lines.
                at = T.meta_var(T.min(t * ahead + line, lines - 1) * LINE)
                fetch_line(w[base + prefetch * width * K + k * width + at], READ, INTO_L2)
            for i in T.unroll(tile_rows):
                for j in T.unroll(vectors):
                    for lane in T.vectorized(L):
                        at = T.meta_var(
                            base
                            + j // panel_vectors * (width * K)
                            + k * (panel_vectors * L)
                            + j % panel_vectors * L
                            + lane
                        )
                        acc[i, j * L + lane] = acc[i, j * L + lane] + x[m + i, k] * w[at]
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
    def panel_rows(x, w, b, residual, y, m, panel, t, ahead, tile_rows):
        if tail_width == 0:
            tile(x, w, b, residual, y, m, panel, t, ahead, tile_rows, width // L, 1)
        elif full_panels == 0:
            tile(x, w, b, residual, y, m, 0, t, 0, tile_rows, tail_width // L, 1)
        else:
            if panel < full_panels:
                tile(x, w, b, residual, y, m, panel, t, ahead, tile_rows, width // L, 1)
            else:
                tile(x, w, b, residual, y, m, full_panels, t, 0, tile_rows, tail_width // L, 1)

    @T.inline
    def few_rows(x, w, b, residual, y, tile_rows):
        # One tile of all rows: groups of joined panels, the full panels left, the narrow panel.
        count = T.meta_var(joined[tile_rows - 1])
        groups = T.meta_var(full_panels // count)
        left = T.meta_var(full_panels % count)
        vectors = T.meta_var(width // L)
        for g in T.parallel(groups + (left > 0) + (tail_width > 0)):
            if g < groups:
                tile(x, w, b, residual, y, 0, g * count, 0, 0, tile_rows, vectors, count)
            if left > 0:
                if g == groups:
                    tile(x, w, b, residual, y, 0, groups * count, 0, 0, tile_rows, vectors, left)
            if tail_width > 0:
                if g == groups + (left > 0):
                    tail = T.meta_var(tail_width // L)
                    tile(x, w, b, residual, y, 0, full_panels, 0, 0, tile_rows, tail, 1)

    @T.inline
    def many_rows(x, w, b, residual, y):
        tiles = T.meta_var(RowTiles(M, tile_m, least=few + 1))
        blocks = T.meta_var(opaque(ceil_div(tiles.count, tiles_per_block)))
        ahead = T.meta_var(lines_ahead(tiles.count, blocks))
        for g in T.parallel(blocks * panels):
            block = T.meta_var(g // panels)
            panel = T.meta_var(g % panels)
            # Equal blocks: with the rest in the last, two threads did 30 and 13 tiles of 256 rows.
            first = T.meta_var(block * tiles.count // blocks)
            for t in T.serial((block + 1) * tiles.count // blocks - first):
                m = T.meta_var(tiles.start(first + t))
                tiles.emit(first + t, panel_rows, x, w, b, residual, y, m, panel, t, ahead)

    def by_rows(*arguments, rows=1):
        # The number of rows may be known only now: a branch for each of the few.
        if rows > few:
            many_rows(*arguments)
        elif isinstance(M, int):
            few_rows(*arguments, M) if few >= M else many_rows(*arguments)
        else:
            with T.If(rows == M):
                with T.Then():
                    few_rows(*arguments, rows)
                with T.Else():
                    by_rows(*arguments, rows=rows + 1)

    return dense_prim_func(spec, dims, (size,), padded_n, by_rows)
