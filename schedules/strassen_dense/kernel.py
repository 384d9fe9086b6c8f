"""The TensorIR of a strassen_dense kernel on x86; its strategy stands in `cpu`."""

from __future__ import annotations

import dataclasses

from tvm import tirx
from tvm.script import tirx as T

from ..common.dims import DimVars, ceil_div, known_rows
from ..common.prefetch import INTO_L1, INTO_L2, READ, WRITE
from ..common.prefetch import prefetch as fetch_line
from ..common.row_tiles import RowTiles
from ..common.vector_math import sigmoid, silu
from ..dense.naive import dense_prim_func
from .packing import StrassenLayout
from .sums import pair_sums

LINE = 16  # float32 of a cache line
# From so many blocks on a thread gets whole blocks, and forms the sums of x of each by itself: they
# stay in its L2 (1024 and 1920 rows: the whole model 1 to 2% faster).
MANY_BLOCKS = 8
# The products of each pass over a block's tiles; their right factors lie in this order.
PASSES = ((0, 1), (2, 3, 4), (5, 6))
# Which sum of quarters of x (`sums`) a product's left factor is; the others are quarters.
_SUMS = {2: 1, 3: 2, 5: 0, 6: 3}


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Pairs of rows of a tile and of a block, and whether the next weights are fetched ahead."""

    tile_pairs: int
    block_pairs: int
    prefetch: bool


def _pass_of(product: int) -> int:
    return next(index for index, products in enumerate(PASSES) if product in products)


def strassen_kernel(layout: StrassenLayout, blocking: Blocking) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)`` on packed weights."""
    spec, L = layout.spec, layout.lanes
    M, steps, half_n, panels = known_rows(spec.lead), layout.steps, layout.half_n, layout.panels
    upper, _ = layout.halves_k
    out_n, swiglu, sigmoid_from = spec.out_n, spec.swiglu, spec.sigmoid_from
    has_residual, has_sigmoid = spec.residual, 0 <= sigmoid_from < spec.n
    half_columns = (min(out_n, half_n), out_n if swiglu else max(0, out_n - half_n))  # no padding
    odd = M % 2 == 1  # the last row has no partner
    tiles = RowTiles(ceil_div(M, 2), blocking.tile_pairs)
    blocks = ceil_div(tiles.count, max(1, blocking.block_pairs // blocking.tile_pairs))
    many = blocks >= MANY_BLOCKS
    if many:  # as many for each of 2 or 4 threads
        blocks = min(ceil_div(blocks, 4) * 4, tiles.count)
    block_pairs = ceil_div(tiles.count, blocks) * tiles.heights[0]
    lengths = [sum(steps[q] for q in products) for products in PASSES]

    sums = pair_sums(layout)

    def lines_ahead(which: int) -> int:
        """Return how many lines of the next pass's weights a tile fetches a step of k."""
        lines = lengths[(which + 1) % len(PASSES)] * layout.widest * L // LINE
        return ceil_div(lines, lengths[which] * (tiles.count // blocks)) if blocking.prefetch else 0

    def left_factor(x, s, q, m, r, i, k):
        if q in _SUMS:
            return s[_SUMS[q], (r if many else m) + i, k]
        if q == 4:  # nobody reads what the partner that is missing gives
            row = 2 * (m + i) + 1
            return x[T.min(row, M - 1) if odd else row, upper + k]
        return x[2 * (m + i), k if q == 0 else upper + k]

    @T.inline
    def start(acc, u, kept, r, rows, vectors):
        for i in T.unroll(rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    acc[i, j * L + lane] = (
                        T.float32(0) if kept is None else u[kept, r + i, j * L + lane]
                    )

    @T.inline
    def keep(acc, u, kept, r, rows, vectors):
        for i in T.unroll(rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    u[kept, r + i, j * L + lane] = acc[i, j * L + lane]

    @T.inline
    def add(acc, u, kept, r, rows, vectors):
        for i in T.unroll(rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    acc[i, j * L + lane] = acc[i, j * L + lane] + u[kept, r + i, j * L + lane]

    @T.inline
    def product(acc, x, w, s, m, r, t, base, q, rows, vectors):
        # acc += left factor @ right factor of product q; the pass's share of the next is fetched
        width = T.meta_var(vectors * L)
        which = T.meta_var(_pass_of(q))
        done = T.meta_var(sum(steps[:q]) - sum(lengths[:which]))  # of the pass
        following = T.meta_var(base + sum(lengths[: which + 1]) * width)
        last = T.meta_var(lengths[(which + 1) % len(PASSES)] * width // LINE - 1)
        ahead = T.meta_var(lines_ahead(which))
        for k in T.serial(steps[q]):
            for line in T.unroll(ahead):
                # The last line again, where the steps are more than the lines.
                at = T.meta_var((t * lengths[which] + done + k) * ahead + line)
                fetch_line(w[following + T.min(at, last) * LINE], READ, INTO_L2)
            for i in T.unroll(rows):
                for j in T.unroll(vectors):
                    for lane in T.vectorized(L):
                        at = T.meta_var(base + (sum(steps[:q]) + k) * width + j * L + lane)
                        acc[i, j * L + lane] = (
                            acc[i, j * L + lane] + left_factor(x, s, q, m, r, i, k) * w[at]
                        )

    @T.inline
    def fetch_outputs(residual, y, m, first, bottom, right, rows, vectors):
        col = T.meta_var(first + (half_n if right and not swiglu else 0))
        for i in T.unroll(rows):
            for j in T.unroll(vectors):
                fetch_line(y[2 * (m + i) + int(bottom), col + j * L], WRITE, INTO_L1)
                if has_residual:
                    fetch_line(residual[2 * (m + i) + int(bottom), col + j * L], READ, INTO_L1)

    def finished(value, y, residual, row, col, gate, up, activate):
        """Return an element of the output; of SwiGLU the gate alone first, left there for up."""
        if gate:
            return silu(value)
        if activate:
            value = T.Select(col >= sigmoid_from, sigmoid(value), value)
        if up:
            value = y[row, col] * value
        return residual[row, col] + value if has_residual else value

    @T.inline
    def store_vector(acc, u, b, residual, y, r, i, j, row, first, right, kept, n, activate):
        # n columns of vector j of row i of the tile
        place = T.meta_var(half_n if right else 0)
        for lane in T.vectorized(n):
            at = T.meta_var(first + j * L + lane)
            col = T.meta_var(at if swiglu else at + place)
            value = T.meta_var(
                acc[i, j * L + lane]
                if kept is None
                else acc[i, j * L + lane] + u[kept, r + i, j * L + lane]
            )
            y[row, col] = finished(
                value + b[at + place],
                y,
                residual,
                row,
                col,
                swiglu and not right,
                swiglu and right,
                activate,
            )

    @T.inline
    def store_columns(acc, u, b, residual, y, r, i, j, row, first, right, kept, n):
        if has_sigmoid:
            if first + j * L + (half_n if right else 0) + n <= sigmoid_from:
                store_vector(acc, u, b, residual, y, r, i, j, row, first, right, kept, n, False)
            else:
                store_vector(acc, u, b, residual, y, r, i, j, row, first, right, kept, n, True)
        else:
            store_vector(acc, u, b, residual, y, r, i, j, row, first, right, kept, n, False)

    @T.inline
    def store_row(acc, u, b, residual, y, r, i, row, first, right, kept, vectors):
        columns = T.meta_var(half_columns[right])
        for j in T.unroll(vectors):
            if columns >= half_n:
                store_columns(acc, u, b, residual, y, r, i, j, row, first, right, kept, L)
            else:
                if first + j * L + L <= columns:
                    store_columns(acc, u, b, residual, y, r, i, j, row, first, right, kept, L)
                else:
                    if columns % L > 0:
                        if first + j * L < columns:
                            store_columns(
                                acc,
                                u,
                                b,
                                residual,
                                y,
                                r,
                                i,
                                j,
                                row,
                                first,
                                right,
                                kept,
                                columns % L,
                            )

    @T.inline
    def store(acc, u, b, residual, y, m, r, first, bottom, right, kept, rows, vectors):
        # one quadrant of the tile: what acc and, if any, the kept sum make
        for i in T.unroll(rows):
            row = T.meta_var(2 * (m + i) + int(bottom))
            if odd and bottom:
                if row < M:
                    store_row(acc, u, b, residual, y, r, i, row, first, right, kept, vectors)
            else:
                store_row(acc, u, b, residual, y, r, i, row, first, right, kept, vectors)

    @T.inline
    def tile(x, w, b, residual, y, s, u, m, r, t, base, first, which, rows, vectors):
        # One pass over a tile of `rows` pairs; u keeps P1 and later U3 at 0, U2 at 1.
        acc = T.alloc_buffer((rows, vectors * L), "float32", scope="local")
        if which == 0:
            fetch_outputs(residual, y, m, first, False, False, rows, vectors)
            start(acc, u, None, r, rows, vectors)
            product(acc, x, w, s, m, r, t, base, 0, rows, vectors)
            keep(acc, u, 0, r, rows, vectors)
            product(acc, x, w, s, m, r, t, base, 1, rows, vectors)
            store(acc, u, b, residual, y, m, r, first, False, False, None, rows, vectors)
        elif which == 1:
            fetch_outputs(residual, y, m, first, True, False, rows, vectors)
            start(acc, u, 0, r, rows, vectors)
            product(acc, x, w, s, m, r, t, base, 2, rows, vectors)
            keep(acc, u, 1, r, rows, vectors)
            product(acc, x, w, s, m, r, t, base, 3, rows, vectors)
            keep(acc, u, 0, r, rows, vectors)
            product(acc, x, w, s, m, r, t, base, 4, rows, vectors)
            store(acc, u, b, residual, y, m, r, first, True, False, None, rows, vectors)
        else:
            fetch_outputs(residual, y, m, first, True, True, rows, vectors)
            fetch_outputs(residual, y, m, first, False, True, rows, vectors)
            start(acc, u, None, r, rows, vectors)
            product(acc, x, w, s, m, r, t, base, 5, rows, vectors)
            store(acc, u, b, residual, y, m, r, first, True, True, 0, rows, vectors)
            add(acc, u, 1, r, rows, vectors)
            product(acc, x, w, s, m, r, t, base, 6, rows, vectors)
            store(acc, u, b, residual, y, m, r, first, False, True, None, rows, vectors)

    @T.inline
    def panel_tile(x, w, b, residual, y, s, u, m, r, t, panel, which, rows):
        narrow, wide_panels = T.meta_var(layout.narrow), T.meta_var(layout.wide_panels)
        first = T.meta_var((panel * narrow + T.min(panel, wide_panels)) * L)
        base = T.meta_var(first * sum(steps))
        if wide_panels == 0:
            tile(x, w, b, residual, y, s, u, m, r, t, base, first, which, rows, narrow)
        else:
            if panel < wide_panels:
                tile(x, w, b, residual, y, s, u, m, r, t, base, first, which, rows, narrow + 1)
            else:
                tile(x, w, b, residual, y, s, u, m, r, t, base, first, which, rows, narrow)

    @T.inline
    def run_pass(x, w, b, residual, y, s, u, block, panel, which):
        begin = T.meta_var(block * tiles.count // blocks)
        for t in T.serial((block + 1) * tiles.count // blocks - begin):
            m = T.meta_var(tiles.start(begin + t))
            r = T.meta_var(m - tiles.start(begin))
            tiles.emit(begin + t, panel_tile, x, w, b, residual, y, s, u, m, r, t, panel, which)

    @T.inline
    def panel_block(x, w, b, residual, y, s, block, panel):
        kept = (2, block_pairs, layout.widest * L)
        u = T.alloc_buffer(kept, "float32", scope="local")
        run_pass(x, w, b, residual, y, s, u, block, panel, 0)
        run_pass(x, w, b, residual, y, s, u, block, panel, 1)
        run_pass(x, w, b, residual, y, s, u, block, panel, 2)

    @T.inline
    def body(x, w, b, residual, y):
        if many:
            for block in T.parallel(blocks):
                s = T.alloc_buffer((4, block_pairs, upper), "float32")
                begin = T.meta_var(tiles.start(block * tiles.count // blocks))
                end = T.meta_var(tiles.start((block + 1) * tiles.count // blocks))
                for r in T.serial(end - begin):
                    sums(x, s, begin + r, r)
                for panel in T.serial(panels):
                    panel_block(x, w, b, residual, y, s, block, panel)
        else:
            s = T.alloc_buffer((4, ceil_div(M, 2), upper), "float32")
            for r in T.parallel(ceil_div(M, 2)):
                sums(x, s, r, r)
            for g in T.parallel(blocks * panels):
                panel_block(x, w, b, residual, y, s, g // panels, g % panels)

    return dense_prim_func(spec, DimVars(), (layout.size,), 2 * half_n, body)
