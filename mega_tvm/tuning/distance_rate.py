"""How fast L1 distances add up, beside FMAs: they need other units too.

A step of ``|q - k|`` is three instructions, of a maximum two. How many of them run in the time of
an FMA differs from CPU to CPU: additions have units of their own (Zen 4), or share those of FMAs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.target import Target

from schedules.common.cpu_features import vector_unit
from schedules.common.memory_operands import apart
from schedules.common.reduce import clear
from schedules.laplace_attention.cpu import L1_FORMS

from ..bench.ceilings import leave, vectors_per_s

# Components of a query, which stay in L1, and how often they are gone through.
WIDTH, PASSES = 256, 100

Accumulate = Callable[[Any, Any, Any], Any]


def distance_kernel(threads: int, target: Target, accumulate: Accumulate) -> tirx.PrimFunc:
    """Return a PrimFunc ``(q, k, out)`` of a register tile's distances to keys in registers."""
    unit = vector_unit(target)
    L, embeds = unit.lanes, unit.registers == 32
    rows, vectors = (6, 4) if embeds else (5, 2)

    @T.prim_func(s_tir=True)
    def distances(
        q: T.Buffer((rows, WIDTH), "float32"),
        k: T.Buffer((vectors * L,), "float32"),
        out: T.Buffer((threads, rows, vectors * L), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "distances"})
        for t in T.parallel(threads):
            acc = T.alloc_buffer((rows, vectors * L), "float32", scope="local")
            again = T.meta_var(apart(vectors) if embeds else None)
            clear(acc, rows, vectors, L)
            for _ in T.serial(PASSES):
                for d in T.serial(WIDTH):
                    for i in T.unroll(rows):
                        for j in T.unroll(vectors):
                            at = T.meta_var(d + again[j] if embeds else d)
                            for lane in T.vectorized(L):
                                acc[i, j * L + lane] = accumulate(
                                    acc[i, j * L + lane], q[i, at], k[j * L + lane]
                                )
            leave(acc, out, t, rows, vectors, L)

    return distances


def measure_distances(target: Target, threads: int) -> tuple[float, ...]:
    """Return the vectors a second, in billions, of each ``l1_form``."""
    kernels = (distance_kernel(threads, target, accumulate) for accumulate in L1_FORMS)
    return tuple(vectors_per_s(kernel, target, WIDTH * PASSES) for kernel in kernels)
