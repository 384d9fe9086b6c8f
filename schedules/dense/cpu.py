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
   AVX2's panels are a line wide: there each tile of a block fetches its part of them (``spread``).
   If each fetched all, the first would wait for memory, and the others fetch what is there (Zen 3,
   60 rows of k = 256, 768 columns: 275 us in place of 308, of k = 16: 8.1 in place of 6.6; whole
   models of 60 frames 1.15 times as fast on one thread, 1.34 on two, of 32 x 60 no difference).
   Behind the last panel lies the next kernel's, since tensors lie in the order of their use. The
   lines of the tile's output and residual are fetched as it starts: many rows have them in L3
   (32 x 60 rows: 1.5% faster at k = 256, 11% at k = 16; a few rows: no difference).
5. Bias starts the accumulators; residual, sigmoid or SwiGLU are applied to them on the way out.
6. Where weights are scaled for it, which is done on cores whose additions run beside their FMAs,
   tiles of many rows multiply in pairs (`pairs`, `paired_kernel`). Kernels of few rows, and of rows
   that only a call brings, multiply the same weights plainly; their bias comes last.

Rows that no tile divides get tiles of two heights (`RowTiles`); columns that no panel divides get a
narrower panel; columns that no vector divides are stored by a shorter vector. Nothing is computed
twice.
"""

from __future__ import annotations

import dataclasses
import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.target import Target

from ..common import decisions
from ..common.cpu_features import VectorUnit, vector_unit
from ..common.dims import DimVars, ceil_div
from ..common.kernel import ScheduledKernel
from .kernel import Blocking, dense_kernel
from .naive import DenseSpec
from .packing import PanelLayout
from .paired_kernel import paired_kernel
from .pairs import LANES, LEAST_K

# Rows of x that share one pass over the weights: 120 rows of k = 256 are 120 KB, an eighth of the
# L2 beside the panel's 64 KB.
BLOCK_M = 120
NARROWEST = 4  # lanes
# Rows of a tile that multiplies in pairs, and the least rows that do.
PAIRED_ROWS, LEAST_PAIRED_ROWS = 10, 6
# A model no wider than this has its weights in L2 from call to call (width 64: 21.9 us with
# prefetches, 21.8 without). Wider ones lose 3 to 8% without; 2 panels ahead differ little from 1.
NARROW = 192
# Of so few k steps the start and end of a tile weigh more: a narrower one leaves registers for the
# next tile's start (60 rows, k = 16, 256 columns: 4.35 us in place of 4.65). LLVM unrolls fewer.
FEW_STEPS = range(12, 33)


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions of a dense kernel.

    ``tile_m`` rows by ``panel_vectors`` vectors is the register tile: it fills the register file up
    to the vectors of one k step. ``block_m`` is the number of rows that share a pass over the
    weights. ``prefetch`` is how many panels ahead weights are fetched, 0 for not at all; with AVX2
    ``spread`` is whether each tile of a block fetches its part of a panel's lines, or every tile
    all of them. Where weights allow it, ``pairs`` is the rows of a tile that multiplies in pairs
    (`paired_kernel`), 0 for plain products.

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
    paired = 0
    if isinstance(lead, int):
        panels = PanelLayout(spec, unit.lanes, panel_vectors * unit.lanes).panels
        paired = paired_rows(lead) if spec.paired and unit.lanes == LANES else 0
        paired = paired if spec.k >= LEAST_K else 0
        if halves := _halves(lead, paired or tile_m, panels):
            height, block_m = halves
            tile_m, paired = (tile_m, height) if paired else (height, 0)
            # A kernel timed by itself does not show what rows of its own save a thread.
            blocks = [m for m in blocks if m < block_m]
    decisions.sample(sch, "tile_m", sorted(tiles | {tile_m}), tile_m)
    decisions.sample(sch, "panel_vectors", [panel_vectors], panel_vectors)
    decisions.sample(sch, "block_m", sorted({*blocks, block_m}), block_m)
    ahead = 0 if max(spec.k, spec.out_n) <= NARROW else 1
    decisions.sample(sch, "prefetch", [0, 1, 2], ahead)
    if unit.registers == 16 and rows > tile_m:
        decisions.sample(sch, "spread", [0, 1], int(spec.k not in FEW_STEPS))
    if paired:
        # A second height is as much code again, which a model fetches at each call, and a kernel
        # timed by itself does not: 30 rows in tiles of 8 and 7 gained 3.7%, the model lost 1.3%.
        heights = {m for m in (5, 6, 8, 10, 12) if m <= rows and rows % m == 0}
        decisions.sample(sch, "pairs", sorted({0, paired} | heights), paired)


def paired_rows(rows: int) -> int:
    """Return the rows of a tile that multiplies in pairs; 0 where rows are few."""
    if rows < LEAST_PAIRED_ROWS:
        return 0
    return ceil_div(rows, ceil_div(rows, PAIRED_ROWS))


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
    (14 of 16). Few columns get taller tiles, few k steps 6x3 accumulators (`FEW_STEPS`). The number
    of rows has no say: kernels of all shapes share their packed weights.
    """
    accumulators = _accumulators(unit)
    if unit.registers == 32 and spec.k in FEW_STEPS:
        accumulators = 18
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
    if pairs := chosen.get("pairs", 0):
        kernel = paired_kernel(layout, pairs, chosen["block_m"], chosen["prefetch"])
    else:
        spread = bool(chosen.get("spread", 0))
        blocking = Blocking(tuple(joined), chosen["block_m"], chosen["prefetch"], spread)
        kernel = dense_kernel(layout, blocking)
    # A tile starts with its bias.
    return ScheduledKernel(kernel, {2: layout.pack_bias, 1: layout.pack_weight})
