"""How any other operator runs on x86, so that no loop ships as it was written.

1. Elementwise producers are inlined into their consumers.
2. A matrix-vector product or a reduction goes to TVM's own CPU rules (``dlight``), unless they
   leave it without vectors, as they do a batched matrix product.
3. Of what is left, each block gets its reduction loops moved outside a vectorized innermost spatial
   loop, and its outer spatial loops in parallel where there is enough work.

Left out on purpose: tiling and packing. A dense layer with constant weights is a Mega kernel; what
comes here is small beside it.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import tirx
from tvm.s_tir import Schedule, dlight
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from ..common.cpu_features import vector_unit

# Elements below which a parallel region (about 1 us) costs more than it gives.
PARALLEL_ELEMENTS = 32768


def schedule(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """Return ``func`` scheduled."""
    by_rule = _by_dlight(func, target)
    if by_rule is not None and _has_vectors(by_rule):
        return by_rule
    sch = Schedule(tvm.IRModule({"main": func}))
    _inline(sch)
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        _schedule_block(sch, block, vector_unit(target).lanes)
    return sch.mod["main"]


def _by_dlight(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc | None:
    """Return ``func`` scheduled by TVM's rules, or None where none fits."""
    try:
        with target:
            mod = tvm.IRModule({"main": func})
            mod = dlight.ApplyDefaultSchedule(dlight.cpu.GEMV(), dlight.cpu.Reduction())(mod)
    except AssertionError:  # the GEMV rule wants a reduction loop, which a sum of one has not
        return None
    return mod["main"] if "tirx.is_scheduled" in mod["main"].attrs else None


def _has_vectors(func: tirx.PrimFunc) -> bool:
    found: list[tirx.For] = []

    def note(loop: tirx.For) -> None:
        if loop.kind == tirx.ForKind.VECTORIZED:
            found.append(loop)

    tvm_ffi.structural_walk(func.body, [(tirx.For, note)])
    return bool(found)


def _inline(sch: Schedule) -> None:
    blocks = sch.get_child_blocks(sch.get_sblock("root"))
    for block in blocks[:-1]:
        try:
            sch.compute_inline(block)
        except tvm.s_tir.ScheduleError:  # it reduces, or is read in a way that cannot be inlined
            continue


def _schedule_block(sch: Schedule, block: SBlockRV, lanes: int) -> None:
    loops = sch.get_loops(block)
    if not loops:  # a scalar
        return
    kinds = [int(var.iter_type) for var in sch.get(block).iter_vars]
    if len(kinds) != len(loops):
        return _parallel_outer(sch, loops[:1])
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == 0]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != 0]
    if not spatial:
        return None
    *outer, inner = spatial
    sch.reorder(*outer, *reduction, inner)
    extent = sch.get(inner).extent
    if isinstance(extent, tirx.IntImm) and int(extent) > 1:
        length = _vector_length(int(extent), lanes)
        if length == 1 and int(extent) > lanes:  # odd: whole vectors, then a short one
            tail = int(extent) % lanes
            inner, rest = sch.loop_partition(inner, [int(extent) - tail, None])
            if tail > 1:
                sch.vectorize(rest)
            sch.vectorize(sch.split(inner, [None, lanes])[1])
        else:
            whole, vector = sch.split(inner, [None, length])
            sch.vectorize(vector)
            if not reduction:
                outer = [*outer, whole]
    return _parallel_outer(sch, outer)


def _vector_length(extent: int, lanes: int) -> int:
    """Return the largest power of two up to ``lanes`` that divides ``extent``."""
    while extent % lanes:
        lanes //= 2
    return lanes


def _parallel_outer(sch: Schedule, outer: list[LoopRV]) -> None:
    if not outer:
        return
    fused = sch.fuse(*outer) if len(outer) > 1 else outer[0]
    extent = sch.get(fused).extent
    if not isinstance(extent, tirx.IntImm) or int(extent) >= PARALLEL_ELEMENTS // 16:
        sch.parallel(fused)
