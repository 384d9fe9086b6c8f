"""The sizes of the blocked attention kernel, and the decisions that select them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from tvm.s_tir import Schedule

from . import decisions
from .attention import AttentionSpec
from .attention_blocks import splits
from .cpu_features import VectorUnit

# Queries that share one pass over a panel of keys and values: eight tiles of 6, so that a 128 KB
# panel is fetched from L3 once per 3 MFLOP. Short sequences get two smaller blocks, for two cores.
BLOCK_Q = 48
# Panels of keys that share one pass of softmax and one update of the output: 512 KB of keys and
# values at width 256, half the L2 (T = 1024: 5.3 ms in place of 5.45 with one).
SPAN_PANELS = 4
FEW_KEYS = 256  # of which transposing is a part of the work that shows


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Sizes, and where keys are transposed.

    Parameters
    ----------
    lanes, value_lanes : int
        Of a vector of keys, and of value columns.
    tile_q, panel_vectors : int
        Queries and vectors of keys of a register tile.
    span_panels, block_tiles : int
        Panels of a span, tiles of a block.
    own_keys : bool
        Whether each block transposes the keys that it sees, for itself; else all blocks share them.
    """

    lanes: int
    value_lanes: int
    tile_q: int
    panel_vectors: int
    span_panels: int
    block_tiles: int
    own_keys: bool


def sample_blocking(
    sch: Schedule,
    unit: VectorUnit,
    spec: AttentionSpec,
    tile_q: int | None = None,
    span_panels: int = SPAN_PANELS,
) -> None:
    """Sample ``tile_q`` queries by ``panel_vectors`` vectors of keys, ``span_panels``, ``block_q``.

    As for dense, the tile fills the register file: 6x4 accumulators beside 4 vectors of keys with
    AVX-512, 6x2 beside 2 with AVX2. Few keys get a panel no wider than they are: one of 64 for 16
    keys costs as much again as the whole attention at width 64 (1.7 us in place of 0.9).

    Of few keys two more decisions matter. ``own_keys``: whether each block transposes the keys that
    it sees, see `blocked_attention`; one thread would do that twice for the first of two blocks
    (T = 60: 27 us in place of 22.6; 32 sequences of 60, a block each: 815 in place of 844).
    ``lanes``: of a vector of keys. On the diagonal half a vector is multiplied for nobody, and less
    with shorter ones (T = 16, width 64: 0.72 us in place of 0.85). Tiles of 4 queries end where a
    vector does, so that no row has one more than it needs (T = 60: 22.6 us, tiles of 6: 23.5).
    """
    wide = unit.registers == 32
    panel_vectors, lanes, k_len = 4 if wide else 2, unit.lanes, spec.k_len
    while isinstance(k_len, int) and panel_vectors > 1 and k_len <= panel_vectors // 2 * unit.lanes:
        panel_vectors //= 2
    few = one_panel = False
    if isinstance(k_len, int) and isinstance(spec.batch, int) and isinstance(spec.q_len, int):
        few, one_panel = k_len <= FEW_KEYS, k_len <= panel_vectors * unit.lanes
    if tile_q is None:
        tile_q = 4 if one_panel and wide else 6
        if one_panel and panel_vectors == 1 and wide:
            tile_q, panel_vectors, lanes = 8, 2, unit.lanes // 2
    if few:
        decisions.sample(sch, "own_keys", [0, 1], int(one_panel and not splits(spec)))
        decisions.sample(sch, "lanes", sorted({8, unit.lanes}), lanes)
    decisions.sample(sch, "tile_q", [2, 3, 4, 5, 6, 7, 8, 10, 12], tile_q)
    decisions.sample(sch, "panel_vectors", [1, 2, 4], panel_vectors)
    decisions.sample(sch, "span_panels", [1, 2, 4, 8], span_panels)
    # From many small blocks, which split evenly over threads, to one that reads each panel once.
    blocks = [6, 10, 12, 15, 18, 20, 24, 30, 36, 48, 60, 72, 96]
    decisions.sample(sch, "block_q", blocks, BLOCK_Q)


def read_blocking(chosen: Mapping[str, int], lanes: int) -> Blocking:
    """Return the blocking that decisions select."""
    tile_q = chosen["tile_q"]
    block_tiles = max(1, chosen["block_q"] // tile_q)
    return Blocking(
        lanes=chosen.get("lanes", lanes),
        value_lanes=lanes,
        tile_q=tile_q,
        panel_vectors=chosen["panel_vectors"],
        span_panels=chosen["span_panels"],
        block_tiles=block_tiles,
        own_keys=bool(chosen.get("own_keys", 0)),
    )
