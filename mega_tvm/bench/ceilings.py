"""What the machine can do at most, measured beside the models: FMA on registers, and copying."""

from __future__ import annotations

import dataclasses
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.script import tirx as T
from tvm.target import Target

from mega_tvm.lowering import CPU_PIPELINE
from mega_tvm.targets import resolve_target
from schedules.common.cpu_features import vector_unit
from schedules.common.prefetch import INTO_L2, READ, prefetch

from .environment import last_level_cache

FMA_STEPS = 200_000
READ_AHEAD = 64  # vectors: reads of 24 MB in L3 rise from 44 GB/s without to 59
READ_STREAMS = 8  # sums side by side, which hide the latency of the additions


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Measured limits at a thread count."""

    fma_gflops: float
    copy_gb_per_s: float


def fma_kernel(threads: int, lanes: int, registers: int) -> tirx.PrimFunc:
    """Return a PrimFunc ``(a, b, out)`` of nothing but independent FMAs on registers.

    Each thread keeps ``registers`` accumulators, ``acc = acc * a + b``: more of them than the
    latency of an FMA times the FMAs that start in a cycle (4 to 5 times 2), so that none waits.
    """

    @T.prim_func(s_tir=True)
    def fma(
        a: T.Buffer((lanes,), "float32"),
        b: T.Buffer((lanes,), "float32"),
        out: T.Buffer((threads, registers * lanes), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "fma"})
        for t in T.parallel(threads):
            acc = T.alloc_buffer((registers, lanes), "float32", scope="local")
            for r in T.unroll(registers):
                for lane in T.vectorized(lanes):
                    acc[r, lane] = T.Cast("float32", r)
            for _ in T.serial(FMA_STEPS):
                for r in T.unroll(registers):
                    for lane in T.vectorized(lanes):
                        acc[r, lane] = acc[r, lane] * a[lane] + b[lane]
            for r in T.unroll(registers):
                for lane in T.vectorized(lanes):
                    out[t, r * lanes + lane] = acc[r, lane]

    return fma


def copy_kernel(threads: int, lanes: int, vectors: int) -> tirx.PrimFunc:
    """Return a PrimFunc ``(x, y)`` that copies ``vectors`` vectors a thread."""
    size = vectors * lanes

    @T.prim_func(s_tir=True)
    def copy(x: T.Buffer((threads * size,), "float32"), y: T.Buffer((threads * size,), "float32")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "copy"})
        for t in T.parallel(threads):
            for i in T.serial(vectors):
                for lane in T.vectorized(lanes):
                    j = T.meta_var(t * size + i * lanes + lane)
                    y[j] = x[j]

    return copy


def read_kernel(threads: int, lanes: int, vectors: int) -> tirx.PrimFunc:
    """Return a PrimFunc ``(x, y)`` that adds up ``vectors`` vectors a thread, in streams apart."""
    steps = vectors // READ_STREAMS

    @T.prim_func(s_tir=True)
    def read(
        x: T.Buffer((threads * vectors * lanes,), "float32"),
        y: T.Buffer((threads, READ_STREAMS * lanes), "float32"),
    ):
        T.func_attr({"tirx.noalias": True, "global_symbol": "read"})
        for t in T.parallel(threads):
            acc = T.alloc_buffer((READ_STREAMS, lanes), "float32", scope="local")
            for r in T.unroll(READ_STREAMS):
                for lane in T.vectorized(lanes):
                    acc[r, lane] = T.float32(0)
            for i in T.serial(steps):
                for r in T.unroll(READ_STREAMS):
                    prefetch(x[(t * vectors + r * steps + i + READ_AHEAD) * lanes], READ, INTO_L2)
                    for lane in T.vectorized(lanes):
                        at = T.meta_var((t * vectors + r * steps + i) * lanes + lane)
                        acc[r, lane] = acc[r, lane] + x[at]
            for r in T.unroll(READ_STREAMS):
                for lane in T.vectorized(lanes):
                    y[t, r * lanes + lane] = acc[r, lane]

    return read


def region_kernel(threads: int, apart: int) -> tirx.PrimFunc:
    """Return a PrimFunc ``(out)`` whose threads write one element each, ``apart`` from the next."""

    @T.prim_func(s_tir=True)
    def region(out: T.Buffer((threads, apart), "float32")):
        T.func_attr({"tirx.noalias": True, "global_symbol": "region"})
        for t in T.parallel(threads):
            out[t, 0] = T.float32(0)

    return region


@T.inline
def leave(acc, out, t, rows, vectors, lanes):
    """Store a register tile of thread ``t``: what is not stored is not computed."""
    for i in T.unroll(rows):
        for j in T.unroll(vectors):
            for lane in T.vectorized(lanes):
                out[t, i, j * lanes + lane] = acc[i, j * lanes + lane]


def innermost_loop(assembly: str, instruction: str) -> list[str]:
    """Return the instructions of the loop that holds the most of ``instruction``.

    A loop is what stands between a label and the last jump back to it.
    """
    lines = [line.split("#")[0].strip() for line in assembly.splitlines()]
    starts: dict[str, int] = {}
    best: list[str] = []
    most = 0
    for index, line in enumerate(lines):
        if match := re.fullmatch(r"(\.L\w+):", line):
            starts[match[1]] = index
        elif (match := re.fullmatch(r"j\w+\s+(\.L\w+)", line)) and match[1] in starts:
            body = [
                text
                for text in lines[starts[match[1]] + 1 : index + 1]
                if text and not text.startswith(".")
            ]
            count = sum(text.startswith(instruction) for text in body)
            if count > most:
                most, best = count, body
    return best


def build(func: tirx.PrimFunc, target: Target) -> Any:
    """Compile a kernel as the models' kernels are compiled."""
    return tvm.compile(tvm.IRModule({"main": func}), target, tir_pipeline=CPU_PIPELINE)


def measure_ceilings(threads: int, repeats: int = 5) -> Ceilings:
    """Measure both limits, each the best of runs of a few milliseconds, see `agreed`."""
    target = resolve_target("native").tvm_target()
    lanes = vector_unit(target).lanes
    vectors = max(128 << 20, 4 * last_level_cache()) // (4 * lanes * threads)
    copy = build(copy_kernel(threads, lanes, vectors), target)["copy"]
    size = vectors * lanes * threads
    x, y = _filled(size, 1.0), _filled(size, 0.0)
    copy_s = agreed(lambda: _best(lambda: copy(x, y), repeats))
    return Ceilings(
        fma_gflops=measure_fma(target, threads, repeats),
        copy_gb_per_s=2 * 4 * size / copy_s / 1e9,
    )


def measure_fma(target: Target, threads: int, repeats: int = 5) -> float:
    """Measure the FMA peak on registers, in GFLOP/s."""
    unit = vector_unit(target)
    lanes, registers = unit.lanes, unit.registers - 4
    fma = build(fma_kernel(threads, lanes, registers), target)["fma"]
    a, b = _filled(lanes, 0.5), _filled(lanes, 1.0)
    out = tvm.runtime.tensor(np.zeros((threads, registers * lanes), dtype=np.float32))
    seconds = agreed(lambda: _best(lambda: fma(a, b, out), repeats))
    return 2 * FMA_STEPS * registers * lanes * threads / seconds / 1e9


def vectors_per_s(func: tirx.PrimFunc, target: Target, steps: int) -> float:
    """Return how many vectors a second, in billions, a kernel adds to its output.

    Parameters
    ----------
    func : PrimFunc
        The output comes last.
    target : Target
    steps : int
        Times that each vector of the output is added to.
    """
    shapes = [tuple(map(int, param.shape)) for param in func.params]
    arguments: list[Any] = [tvm.runtime.tensor(np.zeros(shape, np.float32)) for shape in shapes]
    name = str(func.attrs["global_symbol"])
    timer = build(func, target).jit().time_evaluator(name, tvm.cpu(), number=1, repeat=5)
    seconds = agreed(lambda: float(min(timer(*arguments).results)))
    return float(np.prod(shapes[-1]) / vector_unit(target).lanes * steps / seconds / 1e9)


def _filled(size: int, value: float) -> Any:
    return tvm.runtime.tensor(np.full(size, value, dtype=np.float32))


def agreed(
    measure: Callable[[], float], within: float = 0.02, most: int = 10, pause_s: float = 0.05
) -> float:
    """Return the shortest of several times, once another one is as short.

    A thread that another process kept waiting, or that the system had not yet moved to a core of
    its own, makes a time twice as long for as long as that lasts: one measurement does not tell.

    Parameters
    ----------
    measure : callable
    within : float
        Relative difference of the two shortest.
    most : int
        Measurements, if no two agree.
    pause_s : float
        Between two of them.
    """
    times: list[float] = []
    while len(times) < most:
        times = sorted([*times, measure()])
        # A first pair may have met the same disturbance; the third comes later.
        if len(times) > 2 and times[1] <= (1 + within) * times[0]:
            break
        time.sleep(pause_s)
    return times[0]


def _best(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times[1:])
