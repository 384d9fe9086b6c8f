"""How a dense kernel runs on a GPU: in tiles (`cuda_tiles`), or few rows at once (`cuda_rows`).

For float16 and bfloat16, tiles are those of tensor cores (`cuda_mma`), whatever the sizes.

Defaults are estimated, never measured so far: see `estimated_cycles` and `row_width`.

========================================  ==========  =========  =======  =======================
dense, default model, T = 60, B = 1       FLOP        weights    blocks   bound on A100, H100 (us)
========================================  ==========  =========  =======  =======================
60 x 256 x 768 (queries, values, gate)    23.6 M      0.8 MB     192      1.2, 0.4 of FFMA
60 x 256 x 1376 (gate and up)             42.3 M      1.4 MB     172      2.2, 0.6 of FFMA
60 x 688 x 256 (down)                     21.1 M      0.7 MB     64       1.1, 0.3 of FFMA
========================================  ==========  =========  =======  =======================

(19.5 and 67 TFLOP/s.) None of these fills a GPU: with at most 192 blocks of a few warps they are
bound by the latency of a block's own steps, which the estimate counts, and by their launch, about
2.5 us without a CUDA graph. So a block's k is shared by slices of threads, which meet at the end:
estimated 1.8, 3.4 and 3.2 us on an A100, where the best tile of one slice takes 5.9, 5.9 and 15.9.
"""

from __future__ import annotations

import itertools

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.target import Target

from ..common import decisions
from ..common.cuda_threads import (
    BARRIER_CYCLES,
    FFMA_CYCLES,
    L2_BYTES,
    L2_CYCLES,
    MULTIPROCESSORS,
    SCHEDULERS,
    WARP,
)
from ..common.dims import ceil_div, known_rows
from ..common.kernel import ScheduledKernel
from ..common.storage import half_type
from ..normed_dense.naive import NormedDenseSpec
from . import cuda_mma
from .cuda_mma import fragment_layout, mma_dense, mma_tiles
from .cuda_rows import MAX_ROWS, few_rows_dense, rows_layout
from .cuda_tiles import SLICE_K, THREAD_N, Tile, tile_layout, tiled_dense
from .naive import DenseSpec

BLOCK_M, BLOCK_N, THREAD_M = (16, 32, 64, 128), (16, 32, 64, 128), (1, 2, 4, 8)
SLICES = (1, 2, 4, 8)
WIDTHS = (8, 16, 32)
MAX_THREADS = 256  # up to 255 registers a thread
MAX_SHARED = 48 << 10  # bytes a block has without asking


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions of a dense kernel.

    With up to 8 rows that is ``width``, the columns of a block; with more, ``tile``, an index into
    `tiles`, or for a half type to `mma_tiles`.
    """
    func = sch.mod["main"]
    sample(sch, DenseSpec.of(func), half=in_half(func))


def in_half(func: tirx.PrimFunc) -> str | None:
    """Return the half type of a PrimFunc's rows, weights and output: tensor cores multiply it."""
    return half_type(func, 0, 1, -1)


def sample(sch: Schedule, spec: DenseSpec, *, half: str | None) -> None:
    """Sample the decisions for a specification."""
    if known_rows(spec.lead) <= MAX_ROWS:
        decisions.sample(sch, "width", WIDTHS, row_width(spec))
    else:
        if half:
            cycles = [cuda_mma.estimated_cycles(spec, tile) for tile in mma_tiles()]
        else:
            cycles = [estimated_cycles(spec, tile) for tile in tiles()]
        best = max(i for i, estimate in enumerate(cycles) if estimate == min(cycles))
        decisions.sample(sch, "tile", range(len(cycles)), best)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select.

    Returns
    -------
    ScheduledKernel
        Arguments 1 (weights) and 2 (bias) are packed.
    """
    return write(func, DenseSpec.of(func))


def write(func: tirx.PrimFunc, spec: DenseSpec) -> ScheduledKernel:
    """Write out the TensorIR for a specification."""
    chosen, half = decisions.read(func), in_half(func)
    if known_rows(spec.lead) <= MAX_ROWS:
        layout = rows_layout(spec, chosen["width"])
        kernel = few_rows_dense(spec, chosen["width"], half=half is not None)
    elif half:
        mma_tile = mma_tiles()[chosen["tile"]]
        layout = fragment_layout(spec, mma_tile)
        kernel = mma_dense(spec, mma_tile, half)
    else:
        tile = tiles()[chosen["tile"]]
        layout = tile_layout(spec, tile)
        kernel = tiled_dense(spec, tile)
    return ScheduledKernel(kernel, {1: layout.pack_weight, 2: layout.pack_bias})


def tiles() -> list[Tile]:
    """Return the tiles to choose from, the smallest first."""
    every = itertools.starmap(Tile, itertools.product(BLOCK_M, BLOCK_N, THREAD_M, SLICES))
    fit = [
        t
        for t in every
        if t.slice_threads % WARP == 0
        and 64 <= t.threads <= MAX_THREADS
        and t.shared_bytes <= MAX_SHARED
    ]
    return sorted(fit, key=lambda t: (t.block_m * t.block_n, t.thread_m, t.block_m, t.slices))


def estimated_cycles(spec: DenseSpec, tile: Tile) -> float:
    """Return the estimated time of a multiprocessor for its share of the blocks.

    A k of a warp issues ``4 thread_m`` FFMA and 2 or 3 loads from shared memory; a step, 8 of them
    and the thread's part of the copies: a 16-byte piece of ``x`` is a load and 4 stores (and 4
    instructions where it is normalized), one of weights a load and a store, so that flat tiles copy
    much and multiply little. The blocks of a multiprocessor share its schedulers and its way to L2,
    where a block fetches a column of ``x`` and a row of weights. One block alone, however few its
    warps, also waits at each step for its barrier, and for the next tile, which was asked for when
    the step began: so few rows are best served by steps of many k, shared by slices. Those meet at
    the end. Of tiles that come out equal the largest is taken.
    """
    blocks = ceil_div(known_rows(spec.lead), tile.block_m) * ceil_div(spec.n, tile.block_n)
    waves = ceil_div(blocks, MULTIPROCESSORS)
    warps = tile.threads // WARP
    issue = SLICE_K * (THREAD_N * tile.thread_m * FFMA_CYCLES + 1 + ceil_div(tile.thread_m, 4))
    piece = 9 if isinstance(spec, NormedDenseSpec) else 5
    issue += piece * ceil_div(tile.block_m * tile.step_k // 4, tile.threads)
    issue += 2 * ceil_div(tile.block_n * tile.step_k // 4, tile.threads)
    busy = waves * warps / SCHEDULERS * issue
    alone = max(ceil_div(warps, SCHEDULERS) * issue, L2_CYCLES) + BARRIER_CYCLES
    traffic = waves * 4 * (tile.block_m + tile.block_n) * tile.step_k / L2_BYTES
    steps = tile_layout(spec, tile).padded_k // tile.step_k
    meeting = (tile.slices > 1) * (BARRIER_CYCLES + tile.slices * tile.thread_m * THREAD_N)
    return steps * max(busy, alone, traffic) + waves * meeting


def row_width(spec: DenseSpec) -> int:
    """Return the columns of a block for few rows: as many as leave a block for each multiprocessor.

    Weights are all that counts, and arrive fastest when every multiprocessor asks for some.
    """
    fit = [w for w in WIDTHS if ceil_div(spec.n, w) >= MULTIPROCESSORS]
    return max(fit, default=min(WIDTHS))
