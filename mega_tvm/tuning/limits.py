"""The least time that a kernel can take on this machine, and what bounds it.

A kernel is bound by the largest of three: the cycles of the units that multiply and add, the bytes
of its activations in the core's own cache, and the bytes of its weights, which come from behind it.
Each is told by a rate that was measured in the same run; L1 distances and products in pairs, which
keep other units busy too, have their own (`distance_rate`, `pair_rate`). Work that is done for
nobody does not count, but for what a vector of keys or columns brings with it. Several threads need
a parallel loop, which has a least time too.

A layer norm is bound by the copy: a vector takes 2 cycles of the FMA units (the square, the
product), 2 of the units beside them that add (sum, deviation) and 2 for its store, measured on a
Zen 4 with AVX-512, where its copy within L2 takes 4.1. So is a moving average, whose channels are
side by side; one of 16 channels waits 4 cycles for each step's FMA, which is as long. Activations
of a few KB stay in L1, and a call may begin before the one ahead has ended: then a kernel takes
less than its ceiling says (60 steps of 16 channels 50 ns in place of 67).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import tvm

from schedules.common.cpu_features import vector_unit
from schedules.dense.cpu import paired_rows
from schedules.dense.kernel import LINE

from ..bench.ceilings import (
    READ_STREAMS,
    agreed,
    build,
    copy_kernel,
    measure_fma,
    read_kernel,
    region_kernel,
)
from ..targets import resolve_target
from .distance_rate import measure_distances
from .pair_rate import measure_pairs
from .trial import COLD_BYTES

# Instructions of an exponential that go where FMAs go: 8 FMAs and a product, see
# `schedules.common.vector_math`. A sigmoid adds 1 and divides beside it, SwiGLU multiplies by up.
EXP, SIGMOID, SWIGLU = 9, 9, 10
# Products in pairs scale an element of a row, square it, and multiply a third with another third;
# of an output they undo the scales of the row and of the column, with the bias.
PREPARED, UNSCALED = 7 / 3, 2
# 1 / (1 + distance): an FMA, the distance being twice a score; the division runs beside.
LAPLACE = 1
# A copy within L2: half of it each for what is read and written.
COPY_BYTES = 256 << 10
COPIES = 200
REGIONS = 1000


@dataclasses.dataclass(frozen=True)
class Limits:
    """Rates that a number of threads reach at most.

    Parameters
    ----------
    lanes : int
        Float32 of a vector.
    fma_gflops : float
        FMAs on registers.
    distances : tuple of float
        Vectors of components added to L1 distances, in billions a second, by ``l1_form``.
    pairs : float
        Vectors of multiply-adds in pairs, in billions a second; 0 without AVX-512.
    copy_gb_per_s : float
        Read and written in L2.
    read_gb_per_s : float
        Of weights that are not in L2.
    region_s : float
        Seconds of a parallel loop that does nothing; 0 on one thread.
    """

    lanes: int
    fma_gflops: float
    distances: tuple[float, ...]
    pairs: float
    copy_gb_per_s: float
    read_gb_per_s: float
    region_s: float = 0.0


@dataclasses.dataclass(frozen=True)
class Work:
    """What a kernel has to do at least.

    Parameters
    ----------
    vectors : float
        Vector instructions of the FMA units. What runs beside them does not count.
    activations, weights : float
        Bytes.
    distances : float
        Vectors of components added to L1 distances.
    pairs : float
        Vectors of multiply-adds in pairs.
    l1_form : int
        How.
    """

    vectors: float = 0.0
    activations: float = 0.0
    weights: float = 0.0
    distances: float = 0.0
    pairs: float = 0.0
    l1_form: int = 0


def work_of(
    op: str, spec: Mapping[str, Any], lanes: int, decisions: Mapping[str, int] | None = None
) -> Work | None:
    """Return the work of one call of a kernel; None if it is not known for its operator.

    Parameters
    ----------
    op : str
    spec : mapping
        Fields of its ``KernelSpec``; all dimensions are numbers.
    lanes : int
    decisions : mapping, optional
        Of its schedule. Only ``l1_form`` counts: what a distance takes depends on its form.
    """
    if op == "dense":
        return _dense(spec, lanes)
    if op in ("gated_attention", "laplace_attention"):
        work = _attention(spec, lanes, causal=op == "gated_attention")
        return dataclasses.replace(work, l1_form=(decisions or {}).get("l1_form", 0))
    if op == "layer_norm":  # an FMA squares, a product scales, another FMA is the affine part
        elements = math.prod(spec["lead"]) * spec["n"]
        return Work((3 if spec["affine"] else 2) * elements / lanes, 8.0 * elements)
    if op == "ema_scan":
        elements = spec["batch"] * spec["seq_len"] * spec["channels"]
        return Work(elements / lanes, 8.0 * elements)
    return None


def _dense(spec: Mapping[str, Any], lanes: int) -> Work:
    rows, k, n = math.prod(spec["lead"]), spec["k"], spec["n"]
    out_n = n // 2 if spec["swiglu"] else n
    activated = SWIGLU * out_n if spec["swiglu"] else 0
    if 0 <= spec["sigmoid_from"] < n:
        activated = SIGMOID * (n - spec["sigmoid_from"])
    in_pairs = bool(spec["paired"] and paired_rows(rows))
    products = rows * k * n / lanes
    vectors = rows * activated / lanes
    if in_pairs:
        vectors += rows * (PREPARED * k + UNSCALED * n) / lanes
    return Work(
        vectors=vectors if in_pairs else vectors + products,
        pairs=products if in_pairs else 0,
        activations=4.0 * rows * (k + out_n * (2 if spec["residual"] else 1)),
        weights=4.0 * k * n,
    )


def _attention(spec: Mapping[str, Any], lanes: int, causal: bool) -> Work:
    batch, rows, keys = spec["batch"], spec["q_len"], spec["k_len"]
    width, value_width = spec["width"], spec["value_width"]
    seen = [keys - rows + row + 1 if causal else keys for row in range(rows)]
    read = 4.0 * batch * (rows * width + keys * (width + value_width))
    bytes_ = read + 4.0 * batch * rows * value_width * (2 if spec["gate_stride"] else 1)
    weight = EXP if causal else LAPLACE
    if rows == 1:  # keys are not transposed: a vector holds components of one
        scored, weighed = batch * keys * width / lanes, batch * keys * weight / lanes
        mixed = batch * keys * value_width / lanes
        return _scores(scored, weighed + mixed, bytes_, causal)
    # Scores and their weights are made for whole vectors of keys.
    vectors = sum(-(-n // lanes) for n in seen)
    mixed = sum(seen) * value_width / lanes
    gated = rows * value_width / lanes if spec["gate_stride"] else 0
    # log2(lanes) shuffles transpose a vector of keys. Cores start one of full width a cycle, and no
    # fewer FMAs; beside FMAs they could run, but the first score waits for them.
    shuffles = keys * width / lanes * math.log2(lanes)
    rest = batch * (vectors * weight + mixed + gated + shuffles)
    return _scores(batch * vectors * width, rest, bytes_, causal)


def _scores(scored: float, rest: float, bytes_: float, products: bool) -> Work:
    """Return the work of so many vectors of scores, sums of products or of distances."""
    if products:
        return Work(vectors=scored + rest, activations=bytes_)
    return Work(vectors=rest, activations=bytes_, distances=scored)


def ceiling(work: Work, limits: Mapping[int, Limits], threads: int) -> tuple[float, str]:
    """Return the least seconds of a kernel on so many threads, and what bounds it.

    One thread may be done before others have started.

    Parameters
    ----------
    work : Work
    limits : mapping of int to Limits
        By the number of threads.
    threads : int
    """
    return min(bound(work, limits[count]) for count in sorted({1, threads}))


def bound(work: Work, limits: Limits) -> tuple[float, str]:
    """Return the least seconds of a kernel, and what bounds it: FMA, copy or weights.

    Distances and pairs count to FMA: their units are the same, or stand beside them.
    """
    fma_s = 2 * limits.lanes * work.vectors / limits.fma_gflops / 1e9
    fma_s += work.distances / limits.distances[work.l1_form] / 1e9
    if work.pairs:
        fma_s += work.pairs / limits.pairs / 1e9
    times = {
        "FMA": fma_s,
        "copy": work.activations / limits.copy_gb_per_s / 1e9,
        "weights": work.weights / limits.read_gb_per_s / 1e9,
    }
    name = max(times, key=times.__getitem__)
    return limits.region_s + times[name], name


def measure_limits(threads: int) -> Limits:
    """Measure the rates of this machine, each until it agrees with itself."""
    target = resolve_target("native").tvm_target()
    lanes = vector_unit(target).lanes
    fma = measure_fma(target, threads)
    copy_s = agreed(_copy_seconds(target, threads, lanes))
    read_s = agreed(_read_seconds(target, threads, lanes))
    return Limits(
        lanes=lanes,
        fma_gflops=fma,
        distances=measure_distances(target, threads),
        pairs=measure_pairs(target, threads),
        copy_gb_per_s=COPY_BYTES * threads / copy_s / 1e9,
        read_gb_per_s=COLD_BYTES / read_s / 1e9,
        region_s=agreed(_region_seconds(target, threads)) if threads > 1 else 0.0,
    )


def _copy_seconds(target: Any, threads: int, lanes: int) -> Callable[[], float]:
    vectors = COPY_BYTES // 2 // (4 * lanes)
    module = build(copy_kernel(threads, lanes, vectors), target)
    size = vectors * lanes * threads
    x, y = (tvm.runtime.tensor(np.zeros(size, np.float32)) for _ in range(2))
    return _timed(module, "copy", [x, y], COPIES)


def _read_seconds(target: Any, threads: int, lanes: int) -> Callable[[], float]:
    vectors = COLD_BYTES // (4 * lanes * threads)
    module = build(read_kernel(threads, lanes, vectors), target)
    x = tvm.runtime.tensor(np.zeros(vectors * lanes * threads, np.float32))
    y = tvm.runtime.tensor(np.zeros((threads, READ_STREAMS * lanes), np.float32))
    return _timed(module, "read", [x, y], 2)


def _region_seconds(target: Any, threads: int) -> Callable[[], float]:
    out = tvm.runtime.tensor(np.zeros((threads, LINE), np.float32))
    return _timed(build(region_kernel(threads, LINE), target), "region", [out], REGIONS)


def _timed(module: Any, name: str, arguments: Iterable[Any], number: int) -> Callable[[], float]:
    timer = module.jit().time_evaluator(name, tvm.cpu(), number=number, repeat=3)
    return lambda: float(min(timer(*arguments).results))
