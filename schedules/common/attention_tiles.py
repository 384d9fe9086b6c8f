"""The decisions of the blocked attention kernel."""

from __future__ import annotations

from collections.abc import Mapping

from tvm.s_tir import Schedule

from . import decisions
from .attention import AttentionSpec
from .attention_blocked import Blocking
from .cpu_features import VectorUnit

# Queries that share one pass over a panel of keys and values: eight tiles of 6, so that a 128 KB
# panel is fetched from L3 once per 3 MFLOP. Short sequences get smaller blocks, one for each core.
BLOCK_Q = 48


def sample_blocking(sch: Schedule, spec: AttentionSpec, unit: VectorUnit, tile_q: int = 6) -> None:
    """Sample ``tile_q`` queries by ``panel_vectors`` vectors of keys, and ``block_q``.

    As for dense, the tile fills the register file: 6x4 accumulators beside 4 vectors of keys with
    AVX-512, 6x2 beside 2 with AVX2. ``block_q`` is a multiple of ``tile_q``, see `read_blocking`.
    """
    panel_vectors = 4 if unit.registers == 32 else 2
    decisions.sample(sch, "tile_q", [2, 3, 4, 5, 6, 7, 8, 10, 12], tile_q)
    decisions.sample(sch, "panel_vectors", [1, 2, 4], panel_vectors)
    # From many small blocks, which split evenly over threads, to one that reads each panel once.
    blocks = [6, 10, 12, 15, 18, 20, 24, 30, 36, 48, 60, 72, 96]
    decisions.sample(sch, "block_q", blocks, BLOCK_Q if spec.q_len > 96 else 30)


def read_blocking(chosen: Mapping[str, int], lanes: int, spec: AttentionSpec) -> Blocking:
    """Return the blocking that decisions select, fitted to the number of queries."""
    tile_q = min(chosen["tile_q"], spec.q_len)
    tile_q = -(-spec.q_len // -(-spec.q_len // tile_q))  # tiles of equal height
    block_q = max(1, chosen["block_q"] // tile_q) * tile_q
    return Blocking(lanes, tile_q, chosen["panel_vectors"], block_q)
