"""How the operands of `cuda_attention_mma` come into shared memory.

A tile of 64 keys comes in steps: queries and keys 32 of the width at a time, then values 16 keys at
a time. Four steps lie there: one is multiplied, three are on their way (``cp.async``).

Chunks of 16 bytes lie in another order from row to row, as in `dense.cuda_mma`, so that no bank is
met twice. Operands whose rows are not aligned to 16 bytes are loaded half by half.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from tvm.script import tirx as T

from .attention import AttentionSpec
from .cuda_threads import WARP
from .dims import ceil_div, known

THREADS = 4 * WARP
TILE_KEYS = 64
STEP_D, STEP_KEYS = 32, 16  # of a step of scores, of values
STEPS_V = TILE_KEYS // STEP_KEYS
STAGES = 4
CHUNK = 8  # halves of 16 bytes
_CHUNKS_D = STEP_D // CHUNK


@dataclasses.dataclass(frozen=True)
class AttentionCopies:
    """The steps of a block's tiles, and where they lie.

    Parameters
    ----------
    spec : AttentionSpec
    block_q, columns : int
        Queries, and columns of values, of a block.
    """

    spec: AttentionSpec
    block_q: int
    columns: int

    @property
    def steps_d(self) -> int:
        """Steps of queries and keys of a tile; those of values follow."""
        return ceil_div(self.spec.width, STEP_D)

    @property
    def steps(self) -> int:
        """Steps of a tile."""
        return self.steps_d + STEPS_V

    @property
    def stage_size(self) -> int:
        """Halves of a step in shared memory: keys, then queries; or values."""
        return max((TILE_KEYS + self.block_q) * STEP_D, STEP_KEYS * self.columns)

    def stage(self, tile: Any, step: Any) -> Any:
        """Return where a step of a tile starts; steps beyond its last are the next tile's."""
        return (tile * self.steps + step) % STAGES * self.stage_size

    def row_chunk(self, row: Any, chunk: Any) -> Any:
        """Return where a chunk of a row of queries or keys lies in its step."""
        return row * STEP_D + (chunk ^ (row // 2 % _CHUNKS_D)) * CHUNK

    def value_chunk(self, row: Any, chunk: Any) -> Any:
        """Return where a chunk of a row of values lies in its step."""
        return row * self.columns + (chunk ^ (row % 8)) * CHUNK

    def fetch(self) -> Any:
        """Return the inline function that starts a step's copies.

        It takes ``(q, k, v, tiles, b, first_q, first_v, tile, step, tid)``: ``tiles`` is the shared
        memory, ``b`` the batch's element, ``first_q`` and ``first_v`` where the block starts.
        """
        spec, steps_d = self.spec, self.steps_d
        _, Q, K = known((spec.batch, spec.q_len, spec.k_len))
        W, V, BQ = spec.width, spec.value_width, self.block_q
        chunks_v = self.columns // CHUNK
        stage, row_chunk, value_chunk = self.stage, self.row_chunk, self.value_chunk

        def aligned(stride: int, offset: int, size: int) -> bool:
            return all(extent % CHUNK == 0 for extent in (stride, offset, size))

        @T.inline
        def copy(to, at, source, start, there, count, whole):
            # 8 halves, of which `count` exist where the row does
            if whole:
                T.call_extern("void", "mega_copy_async", to.data, at, source.data, start, there)
            else:
                left = T.meta_var(T.if_then_else(there, count, 0))
                T.call_extern("void", "mega_copy_halves", to.data, at, source.data, start, left)

        @T.inline
        def fetch_rows(source, to, base, b, first, rows, limit, stride, off, step, tid):
            # `rows` rows of queries or keys, 32 columns
            for i in T.unroll(ceil_div(rows * _CHUNKS_D, THREADS)):
                if i * THREADS + tid < rows * _CHUNKS_D:
                    row = T.meta_var((i * THREADS + tid) // _CHUNKS_D)
                    chunk = T.meta_var((i * THREADS + tid) % _CHUNKS_D)
                    d = T.meta_var(step * STEP_D + chunk * CHUNK)
                    there = T.meta_var(T.And(first + row < limit, d < W))
                    copy(
                        to, base + row_chunk(row, chunk), source,
                        (b * limit + first + row) * stride + off + d, there, W - d,
                        aligned(stride, off, W),
                    )  # fmt: skip

        @T.inline
        def fetch_values(v, to, base, b, first, first_v, tid):
            for i in T.unroll(STEP_KEYS * chunks_v // THREADS):
                row = T.meta_var((i * THREADS + tid) // chunks_v)
                chunk = T.meta_var((i * THREADS + tid) % chunks_v)
                col = T.meta_var(first_v + chunk * CHUNK)
                copy(
                    to, base + value_chunk(row, chunk), v,
                    (b * K + first + row) * spec.v_stride + spec.v_offset + col,
                    T.And(first + row < K, col < V), V - col,
                    aligned(spec.v_stride, spec.v_offset, V),
                )  # fmt: skip

        @T.inline
        def fetch(q, k, v, tiles, b, first_q, first_v, tile, step, tid):
            base = T.meta_var(stage(tile, step))
            key = T.meta_var(tile * TILE_KEYS)
            if step < steps_d:
                fetch_rows(
                    k, tiles, base, b, key, TILE_KEYS, K, spec.k_stride, spec.k_offset, step, tid
                )
                fetch_rows(
                    q, tiles, base + TILE_KEYS * STEP_D, b, first_q, BQ, Q, spec.q_stride,
                    spec.q_offset, step, tid,
                )  # fmt: skip
            else:
                fetch_values(v, tiles, base, b, key + (step - steps_d) * STEP_KEYS, first_v, tid)

        return fetch
