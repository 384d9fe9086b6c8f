"""The decisions of the blocked attention kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tvm.s_tir import Schedule

from . import decisions
from .attention_blocked import Blocking
from .cpu_features import VectorUnit
from .dims import Dim

# Queries that share one pass over a panel of keys and values: eight tiles of 6, so that a 128 KB
# panel is fetched from L3 once per 3 MFLOP. Short sequences get two smaller blocks, for two cores.
BLOCK_Q = 48
# Panels of keys that share one pass of softmax and one update of the output: 512 KB of keys and
# values at width 256, half the L2 (T = 1024: 5.3 ms in place of 5.45 with one).
SPAN_PANELS = 4


def sample_blocking(
    sch: Schedule, unit: VectorUnit, k_len: Dim, tile_q: int = 6, span_panels: int = SPAN_PANELS
) -> None:
    """Sample ``tile_q`` queries by ``panel_vectors`` vectors of keys, ``span_panels``, ``block_q``.

    As for dense, the tile fills the register file: 6x4 accumulators beside 4 vectors of keys with
    AVX-512, 6x2 beside 2 with AVX2. Few keys get a panel no wider than they are: one of 64 for 16
    keys costs as much again as the whole attention at width 64 (1.7 us in place of 0.9).
    """
    panel_vectors = 4 if unit.registers == 32 else 2
    while isinstance(k_len, int) and panel_vectors > 1 and k_len <= panel_vectors // 2 * unit.lanes:
        panel_vectors //= 2
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
    return Blocking(lanes, tile_q, chosen["panel_vectors"], chosen["span_panels"], block_tiles)
