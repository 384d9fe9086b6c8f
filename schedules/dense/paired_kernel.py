"""The TensorIR of a dense kernel on x86 that multiplies in pairs (`pairs`).

Blocks, panels and epilogues are those of the plain kernel, and so are the packed weights. A tile
has two vectors of a panel's four, and more rows: 10 x 2 accumulators, 6 vectors of weights and the
factors in use fill the registers. Rows of x are prepared first, in a workspace: all of them, or
where there are many blocks, those of a block by the thread that has it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tvm import tirx
from tvm.script import tirx as T

from ..common.dims import DimVars, ceil_div, known_rows
from ..common.prefetch import INTO_L2, READ
from ..common.prefetch import prefetch as fetch_line
from ..common.row_tiles import RowTiles
from .kernel import LINE
from .naive import dense_prim_func
from .outputs import fetching, storing
from .packing import PanelLayout
from .pairs import FACTORS, GROUP, SCALE, TERMS, TILE_VECTORS, multiplying, preparing
from .panels import emit_panel

# From so many blocks on a thread gets whole blocks, and prepares the rows of each by itself: they
# stay in its L2.
MANY_BLOCKS = 8


class _Buffers(NamedTuple):
    """What a tile reads and writes; ``rows`` are prepared."""

    rows: Any
    w: Any
    b: Any
    residual: Any
    y: Any


def paired_kernel(
    layout: PanelLayout, tile_rows: int, block_m: int, prefetch: int
) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)`` on packed, scaled weights.

    Parameters
    ----------
    layout : PanelLayout
        Of known rows, on vectors of 16.
    tile_rows, block_m : int
        Rows of a tile, and of a block that shares a pass over the weights.
    prefetch : int
        How many panels ahead weights are fetched.
    """
    spec, L, width, padded_n = layout.spec, layout.lanes, layout.width, layout.padded_n
    M, K, tile_width = known_rows(spec.lead), spec.k, TILE_VECTORS * layout.lanes
    panels = layout.panels
    tiles = RowTiles(M, tile_rows)
    blocks = ceil_div(tiles.count, max(1, block_m // tile_rows))
    block_rows = ceil_div(tiles.count, blocks) * tiles.heights[0]
    # An odd number of lines: at a power of two a tile's rows fall into the same few sets of L1 (60
    # rows of 768 4% slower, of 1024 36%, of 1536 2.8 times as long).
    row_size = (ceil_div(K + FACTORS, LINE) | 1) * LINE
    prepare, multiply = preparing(K, L), multiplying(K, L)
    store, fetch_outputs = storing(layout), fetching(layout)
    # Of the next panel's lines, each tile fetches some every two groups.
    lines, steps = width * K // LINE, K // GROUP // 2
    loops = ceil_div(width, tile_width) * steps  # of a tile in all its columns
    sharing = tiles.count // blocks
    ahead = ceil_div(lines, sharing * loops) if prefetch and loops and sharing > 1 else 0

    def next_lines(w: Any, base: Any, panel_width: int, t: Any, c: Any) -> Callable[..., None]:
        """Return the inline ``(step)``: fetch ``ahead`` lines, from behind a panel on."""

        @T.inline
        def fetch(step):
            # The last lines again, where the loops are more than the lines.
            loop = T.meta_var(t * loops + c * steps + step)
            line = T.meta_var(T.min(loop * ahead, lines - ahead))
            for i in T.unroll(ahead):
                at = T.meta_var(base + prefetch * (panel_width * K) + line * LINE)
                fetch_line(w[at + i * LINE], READ, INTO_L2)

        return fetch

    @T.inline
    def first_lines(w, b, m):
        # The kernel before may have fetched none of them.
        for i in T.serial(ceil_div(lines, M)):
            fetch_line(w[(i * M + m) * LINE], READ, INTO_L2)
        for i in T.serial(ceil_div(ceil_div(layout.bias_size, LINE), M)):
            fetch_line(b[(i * M + m) * LINE], READ, INTO_L2)

    @T.inline
    def tile(to, m, r, panel, panel_width, t, c, height, vectors):
        # the c-th vectors of a panel
        acc = T.alloc_buffer((height, vectors * L), "float32", scope="local")
        zeros = T.alloc_buffer((L,), "float32", scope="local")
        first = T.meta_var(panel * width + c * tile_width)
        base = T.meta_var(panel * (width * K))
        fetch = T.meta_var(next_lines(to.w, base, panel_width, t, c))
        for lane in T.vectorized(L):
            zeros[lane] = to.b[3 * padded_n + lane]
        for i in T.unroll(height):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    terms = T.meta_var(to.b[2 * padded_n + first + j * L + lane])
                    acc[i, j * L + lane] = terms + to.rows[r + i, K + TERMS]
        if prefetch > 0:
            fetch_outputs(to.residual, to.y, m, first, height, vectors)
        at = T.meta_var(base + c * tile_width)
        multiply(acc, to.rows, to.w, zeros, r, at, panel_width, fetch, height, vectors)
        for i in T.unroll(height):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    acc[i, j * L + lane] = acc[i, j * L + lane] * to.rows[r + i, K + SCALE]
        store(acc, to.b, to.residual, to.y, m, first, height, vectors)

    @T.inline
    def columns(to, m, r, t, height, panel, panel_width):
        whole = T.meta_var(panel_width // tile_width)
        left = T.meta_var(panel_width % tile_width // L)
        for c in T.serial(whole):
            tile(to, m, r, panel, panel_width, t, c, height, TILE_VECTORS)
        if left > 0:
            tile(to, m, r, panel, panel_width, t, whole, height, left)

    def panel_rows(to, m, r, panel, t, height):
        emit_panel(layout, panel, columns, to, m, r, t, height)

    @T.inline
    def block_tiles(to, block, above, panel):
        # `above`: rows of x above those that are prepared
        first = T.meta_var(block * tiles.count // blocks)
        for t in T.serial((block + 1) * tiles.count // blocks - first):
            m = T.meta_var(tiles.start(first + t))
            tiles.emit(first + t, panel_rows, to, m, m - above, panel, t)

    @T.inline
    def body(x, w, b, residual, y):
        if blocks >= MANY_BLOCKS:
            for block in T.parallel(blocks):
                rows = T.alloc_buffer((block_rows, row_size), "float32")
                to = T.meta_var(_Buffers(rows, w, b, residual, y))
                above = T.meta_var(tiles.start(block * tiles.count // blocks))
                below = T.meta_var(tiles.start((block + 1) * tiles.count // blocks))
                for r in T.serial(below - above):
                    prepare(x, rows, above + r, r)
                for panel in T.serial(panels):
                    block_tiles(to, block, above, panel)
        else:
            rows = T.alloc_buffer((M, row_size), "float32")
            to = T.meta_var(_Buffers(rows, w, b, residual, y))
            for m in T.parallel(M):
                first_lines(w, b, m)
                prepare(x, rows, m, m)
            for g in T.parallel(blocks * panels):
                block_tiles(to, g // panels, 0, g % panels)

    return dense_prim_func(spec, DimVars(), (layout.size,), layout.bias_size, body)
