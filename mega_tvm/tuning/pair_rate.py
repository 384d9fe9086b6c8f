"""How fast products in pairs add up: FMAs, additions beside them, and the loads of their operands.

The units would allow 6 multiply-adds in 4 cycles (`schedules.dense.pairs`). Whether the core keeps
up with the loads, three of x for these, is measured: 1.50 times the FMA peak on a Zen 4.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T
from tvm.target import Target

from schedules.common.cpu_features import vector_unit
from schedules.common.reduce import clear
from schedules.dense.cpu import PAIRED_ROWS
from schedules.dense.pairs import LANES, TILE_VECTORS, multiplying

from ..bench.ceilings import leave, vectors_per_s

# Elements of a row, which stay in L1, and how often they are gone through.
WIDTH, PASSES = 240, 100


def pair_kernel(threads: int) -> tirx.PrimFunc:
    """Return a PrimFunc ``(x, w, zeros, out)`` of a register tile, its weights in registers."""
    L, rows, columns = LANES, PAIRED_ROWS, TILE_VECTORS * LANES
    multiply = multiplying(WIDTH, L)

    @T.inline
    def fetch(step):
        T.evaluate(0)

    @T.prim_func(s_tir=True)
    def pairs(
        x: T.Buffer((rows, WIDTH), "float32"),
        w: T.Buffer((columns,), "float32"),
        zeros: T.Buffer((L,), "float32"),
        out: T.Buffer((threads, rows, columns), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "pairs"})
        for t in T.parallel(threads):
            acc = T.alloc_buffer((rows, columns), "float32", scope="local")
            clear(acc, rows, TILE_VECTORS, L)
            for _ in T.serial(PASSES):
                # A panel of no width: every element of k has the same weights.
                multiply(acc, x, w, zeros, 0, 0, 0, fetch, rows, TILE_VECTORS)
            leave(acc, out, t, rows, TILE_VECTORS, L)

    return pairs


def measure_pairs(target: Target, threads: int) -> float:
    """Return the vectors of multiply-adds a second, in billions; 0 where no kernel has them."""
    if vector_unit(target).lanes != LANES:
        return 0.0
    return vectors_per_s(pair_kernel(threads), target, WIDTH * PASSES)
