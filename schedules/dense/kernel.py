"""The TensorIR of a dense kernel on x86; its strategy stands in `cpu`."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from tvm import tirx
from tvm.script import tirx as T

from ..common.dims import DimVars, ceil_div
from ..common.prefetch import INTO_L1, INTO_L2, READ
from ..common.prefetch import prefetch as fetch_line
from ..common.row_tiles import RowTiles, opaque
from .naive import dense_prim_func
from .outputs import fetching, storing
from .packing import PanelLayout
from .panels import emit_panel

LINE = 16  # float32 of a cache line
# Bytes of a panel that is fetched into L1 at once, beside the one in use (60 rows, k = 16: 4.72 us
# in place of 4.87).
L1_PANEL = 8 << 10


@dataclasses.dataclass(frozen=True)
class Blocking:
    """How rows and panels are cut.

    Parameters
    ----------
    joined : tuple of int
        How many panels a tile of 1, 2, .. rows takes at a time; so many rows a tile has at most.
    block_m : int
        Rows that share a pass over the weights.
    prefetch : int
        How many panels ahead weights are fetched.
    spread : bool
        Whether each tile of a block fetches a part of the lines; else each fetches at every k step.
    """

    joined: tuple[int, ...]
    block_m: int
    prefetch: int
    spread: bool = False


class Fetch(NamedTuple):
    """What a tile fetches of a panel ahead: so many lines every so many k steps."""

    lines: int
    steps: int


NOTHING = Fetch(0, 1)


def fetched_by(tiles: int, k: int, lines: int, spread: bool) -> Fetch:
    """Return what each of several tiles fetches of a panel of ``lines`` lines a k step.

    Parameters
    ----------
    tiles : int
        How many share the panel. A single one fetches nothing: it would wait for it.
    k, lines : int
    spread : bool
        Whether they share lines of a k step alone, of which a narrow panel has one, or all lines.
    """
    if tiles < 2 or lines == 0:
        return NOTHING
    every = [steps for steps in range(2, k + 1) if tiles * (k // steps) >= lines * k]
    if spread and every:
        return Fetch(1, every[-1])
    return Fetch(ceil_div(lines, tiles), 1)


def dense_kernel(layout: PanelLayout, blocking: Blocking) -> tirx.PrimFunc:
    """Return the kernel ``(x, w, b[, residual], y)`` on packed weights."""
    spec, joined, prefetch = layout.spec, blocking.joined, blocking.prefetch
    dims = DimVars()
    M, K, L = dims.rows(spec.lead), spec.k, layout.lanes
    width, panels, full_panels = layout.width, layout.panels, layout.full_panels
    tail_width = layout.tail_width

    tile_m = len(joined)
    few = sum(count > 1 for count in joined)  # up to as many rows take several panels at a time
    tiles_per_block = max(1, blocking.block_m // tile_m)
    lines = width // LINE if prefetch else 0  # of a panel, a k step
    near = INTO_L1 if 4 * width * K <= L1_PANEL else INTO_L2

    def share(tiles, blocks):
        """Return what a tile fetches of the next panel, which the tiles of a block share."""
        # Of unknown rows 4 tiles or more: sequences of 24 rows and up, where it matters.
        sharing = tiles // blocks if isinstance(tiles, int) else min(tiles_per_block, 4)
        return fetched_by(sharing, K, lines, blocking.spread)

    store, fetch_outputs = storing(layout), fetching(layout)

    @T.inline
    def k_step(acc, x, w, base, m, k, tile_rows, vectors, panel_vectors):
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

    @T.inline
    def tile(x, w, b, residual, y, m, panel, t, fetch, tile_rows, panel_vectors, joined):
        # `joined` panels of `panel_vectors` vectors
        vectors = T.meta_var(joined * panel_vectors)
        acc = T.alloc_buffer((tile_rows, vectors * L), "float32", scope="local")
        base = T.meta_var(panel * (width * K))
        for i in T.unroll(tile_rows):
            for j in T.unroll(vectors):
                for lane in T.vectorized(L):
                    acc[i, j * L + lane] = (
                        T.float32(0) if spec.paired else b[panel * width + j * L + lane]
                    )
        if prefetch > 0:
            fetch_outputs(residual, y, m, panel * width, tile_rows, vectors)
        next_panel = T.meta_var(base + prefetch * width * K)
        rounds = T.meta_var(K // fetch.steps)
        if fetch.steps > 1:
            for c in T.serial(rounds):
                # The last line again, where the tiles are more than the lines.
                line = T.meta_var(T.min(t * rounds + c, lines * K - 1))
                fetch_line(w[next_panel + line * LINE], READ, near)
                for u in T.serial(fetch.steps):
                    k = T.meta_var(c * fetch.steps + u)
                    k_step(acc, x, w, base, m, k, tile_rows, vectors, panel_vectors)
            for u in T.serial(K % fetch.steps):
                k = T.meta_var(rounds * fetch.steps + u)
                k_step(acc, x, w, base, m, k, tile_rows, vectors, panel_vectors)
        else:
            for k in T.serial(K):
                for line in T.unroll(fetch.lines):
                    # The last lines again, where the tiles are more than the lines.
                    at = T.meta_var(T.min(t * fetch.lines + line, lines - 1) * LINE)
                    fetch_line(w[next_panel + k * width + at], READ, near)
                k_step(acc, x, w, base, m, k, tile_rows, vectors, panel_vectors)
        store(acc, b, residual, y, m, panel * width, tile_rows, vectors)

    @T.inline
    def panel_tile(x, w, b, residual, y, m, t, fetch, tile_rows, panel, panel_width):
        # Behind the narrow panel, the last one, nothing is fetched.
        fetched = T.meta_var(fetch if panel_width == width else NOTHING)
        tile(x, w, b, residual, y, m, panel, t, fetched, tile_rows, panel_width // L, 1)

    def panel_rows(x, w, b, residual, y, m, panel, t, fetch, tile_rows):
        emit_panel(layout, panel, panel_tile, x, w, b, residual, y, m, t, fetch, tile_rows)

    @T.inline
    def few_rows(x, w, b, residual, y, tile_rows):
        # One tile of all rows: groups of joined panels, the full panels left, the narrow panel.
        count = T.meta_var(joined[tile_rows - 1])
        groups = T.meta_var(full_panels // count)
        left = T.meta_var(full_panels % count)
        vectors = T.meta_var(width // L)
        for g in T.parallel(groups + (left > 0) + (tail_width > 0)):
            if g < groups:
                tile(x, w, b, residual, y, 0, g * count, 0, NOTHING, tile_rows, vectors, count)
            if left > 0:
                if g == groups:
                    at = T.meta_var(groups * count)
                    tile(x, w, b, residual, y, 0, at, 0, NOTHING, tile_rows, vectors, left)
            if tail_width > 0:
                if g == groups + (left > 0):
                    tail = T.meta_var(tail_width // L)
                    tile(x, w, b, residual, y, 0, full_panels, 0, NOTHING, tile_rows, tail, 1)

    @T.inline
    def many_rows(x, w, b, residual, y):
        tiles = T.meta_var(RowTiles(M, tile_m, least=few + 1))
        blocks = T.meta_var(opaque(ceil_div(tiles.count, tiles_per_block)))
        fetch = T.meta_var(share(tiles.count, blocks))
        for g in T.parallel(blocks * panels):
            block = T.meta_var(g // panels)
            panel = T.meta_var(g % panels)
            # Equal blocks: with the rest in the last, two threads did 30 and 13 tiles of 256 rows.
            first = T.meta_var(block * tiles.count // blocks)
            for t in T.serial((block + 1) * tiles.count // blocks - first):
                m = T.meta_var(tiles.start(first + t))
                tiles.emit(first + t, panel_rows, x, w, b, residual, y, m, panel, t, fetch)

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

    return dense_prim_func(spec, dims, (layout.size,), layout.bias_size, by_rows)
