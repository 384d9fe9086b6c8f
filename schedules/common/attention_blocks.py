"""How two cores share the query tiles of a blocked attention kernel."""

from __future__ import annotations

from tvm.script import tirx as T

from .attention import AttentionSpec
from .dims import Extent, ceil_div, known

# Transposing the keys that a query sees costs as much as scoring them for so many queries.
TRANSPOSITION = 1.5
# Multiplications that two cores share, at least: a parallel region costs 1 us.
LEAST_SHARED = 1 << 17


def splits(spec: AttentionSpec) -> bool:
    """Whether a batch element's queries are split over two blocks, if these have keys of their own.

    An even batch is split by its elements, and little work not at all.
    """
    batch, queries, keys = known((spec.batch, spec.q_len, spec.k_len))
    work = batch * queries * keys * (spec.width + spec.value_width)
    return batch % 2 == 1 and work >= LEAST_SHARED


def balanced_tiles(tiles: Extent, most: int, causal: bool) -> Extent:
    """Return the tiles of a block: no more than ``most``, and so that two cores have equal work.

    Threads take contiguous ranges of blocks. A causal block costs more the later it lies; the
    order is the first, the last, the second, the last but one, ..., so that many blocks split
    evenly. Of few tiles the blocks must be small: 10 tiles in blocks of 5 would give one thread 40
    of 55 units of work, and in blocks of 2 at most 29.
    """
    if not isinstance(tiles, int):
        return T.min(most, ceil_div(tiles, 2))

    def longest(block_tiles: int) -> int:
        blocks = ceil_div(tiles, block_tiles)
        order = [u // 2 if u % 2 == 0 else blocks - 1 - u // 2 for u in range(blocks)]
        work = [
            sum(t + 1 if causal else 1 for t in range(nth * block_tiles, tiles)[:block_tiles])
            for nth in order
        ]
        half = ceil_div(blocks, 2)
        return max(sum(work[:half]), sum(work[half:]))

    choices = {n: longest(n) for n in range(1, min(most, tiles) + 1)}
    # 2% of balance are not worth a second pass over the keys.
    return max(n for n, cost in choices.items() if cost <= 1.02 * min(choices.values()))


def split_tiles(tiles: int, tile_q: int, causal: bool) -> int:
    """Return the tiles of the first of two blocks of equal work, each with keys of its own.

    A causal block transposes the keys that its last query sees.
    """

    def work(first: int, end: int) -> float:
        seen = end if causal else tiles
        pairs = sum(t + 1 if causal else tiles for t in range(first, end))
        return pairs + seen * TRANSPOSITION / tile_q

    return min(range(1, tiles), key=lambda end: max(work(0, end), work(end, tiles)))
