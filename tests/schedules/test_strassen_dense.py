"""The dense kernel by Strassen's method: the algebra, parity at odd shapes, rounding, registers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from schedules.common.decisions import read
from schedules.dense.naive import DenseSpec, dense
from schedules.registry import sample_decisions
from schedules.strassen_dense.cpu import pays
from schedules.strassen_dense.naive import StrassenDenseSpec, strassen_dense
from schedules.strassen_dense.packing import StrassenLayout
from tests.schedules.assembly import product_loops
from tests.schedules.cases import Case, dense_case, sized
from tests.schedules.harness import LEVELS, assembly, cpu_target, run_scheduled

BITS = {"x86-64-v4": 512, "x86-64-v3": 256}


def _case(rng: np.random.Generator, spec: StrassenDenseSpec) -> Case:
    return dataclasses.replace(dense_case(rng, spec), func=strassen_dense(spec))


def _check(rng, target, spec: StrassenDenseSpec, **decisions: int) -> None:
    case = _case(rng, spec)
    y = run_scheduled(case.func, target, case.inputs, case.expected.shape, **decisions)
    assert_parity(y, case.expected, name=spec.name)


@sized(
    "M K N epilogue",
    [
        (1, 1, 1, "bias"),
        (1, 13, 40, "swiglu"),
        (7, 13, 100, "sigmoid"),  # odd rows and k; sigmoid from within the left half
        (7, 40, 13, "swiglu-residual"),
        (59, 41, 129, "residual"),
        (59, 40, 86, "swiglu"),  # wide and narrow panels
        (257, 3, 17, "swiglu-residual"),  # several blocks, tiles of two heights
    ],
)
def test_parity(rng, target, M, K, N, epilogue) -> None:
    options: dict = {"residual": epilogue.endswith("residual")}
    if epilogue.startswith("swiglu"):
        N, options["swiglu"] = 2 * N, True
    if epilogue == "sigmoid":
        options["sigmoid_from"] = N // 3
    _check(rng, target, StrassenDenseSpec((1, M), K, N, **options))


@pytest.mark.parametrize("start", [0, 20, 39, 40])
def test_sigmoid_starts_anywhere(rng, baseline, start) -> None:
    """From no column to all of them; the halves meet at 24."""
    spec = StrassenDenseSpec((1, 7), 13, 40, residual=True, sigmoid_from=start)
    _check(rng, baseline, spec)


@sized(
    "tile_pairs panel_vectors block_pairs prefetch",
    [(1, 1, 30, 1), (4, 3, 8, 1), (5, 2, 120, 0)],
)
def test_any_decisions(rng, target, tile_pairs, panel_vectors, block_pairs, prefetch) -> None:
    """Tiles of two heights, panels of two widths, a few blocks and many."""
    spec = StrassenDenseSpec((131,), 13, 150, swiglu=True)
    decisions = {"tile_pairs": tile_pairs, "panel_vectors": panel_vectors}
    _check(rng, target, spec, **decisions, block_pairs=block_pairs, prefetch=prefetch)


@sized("K N swiglu", [(6, 64, False), (7, 75, False), (5, 70, True), (1, 1, False)])
def test_seven_products_make_the_product(rng, K, N, swiglu) -> None:
    """The algebra of `cpu`, on the packed factors as the kernel addresses them."""
    layout = StrassenLayout(StrassenDenseSpec((8,), K, N, swiglu=swiglu), 8, 2)
    x, w = rng.standard_normal((8, K)), rng.standard_normal((K, N))
    packed = layout.pack_weight(w)
    assert packed.shape == (layout.size,) and packed.dtype == w.dtype
    upper, lower = layout.halves_k
    x11, x21 = x[0::2, :upper], x[1::2, :upper]
    x12, x22 = (np.pad(x[i::2, upper:], [(0, 0), (0, upper - lower)]) for i in (0, 1))
    s1 = x21 + x22
    s2 = s1 - x11
    lefts = (x11, x12[:, :lower], s2, x11 - x21, x22[:, :lower], s1, x12 - s2)
    y, first = np.empty((8, 2, layout.half_n)), 0
    for panel in range(layout.panels):
        width = (layout.narrow + (panel < layout.wide_panels)) * layout.lanes
        at = first * sum(layout.steps)
        products = []
        for left, steps in zip(lefts, layout.steps, strict=True):
            products.append(left @ packed[at : at + steps * width].reshape(steps, width))
            at += steps * width
        p1, p2, p6, p7, p4, p5, p3 = products
        columns = slice(first, first + width)
        y[0::2, 0, columns], y[1::2, 0, columns] = p1 + p2, p1 + p6 + p7 + p4
        y[0::2, 1, columns], y[1::2, 1, columns] = p1 + p6 + p5 + p3, p1 + p6 + p7 + p5
        first += width
    assert first == layout.half_n
    cut = N // 2 if swiglu else min(N, layout.half_n)
    np.testing.assert_allclose(y[:, 0, :cut], (x @ w)[:, :cut], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(y[:, 1, : N - cut], (x @ w)[:, cut:], rtol=1e-12, atol=1e-12)


def test_rounding_is_little_more_than_the_dense_kernels(rng, baseline) -> None:
    """As the docstring of `cpu` tells: 1.2 to 1.3 times. Bits must differ."""
    spec = StrassenDenseSpec((60,), 256, 256)
    case = _case(rng, spec)
    rms = []
    for func in (dense(DenseSpec((60,), 256, 256)), case.func):
        y = run_scheduled(func, baseline, case.inputs, case.expected.shape)
        rms.append(np.sqrt(np.mean((y - case.expected) ** 2)))
    assert 1.05 < rms[1] / rms[0] < 1.5


def test_where_it_pays() -> None:
    assert pays(StrassenDenseSpec((1, 60), 256, 1376, swiglu=True))
    assert pays(StrassenDenseSpec((2, 12), 256, 128))
    assert not pays(StrassenDenseSpec((23,), 256, 768)), "few rows"
    assert not pays(StrassenDenseSpec((60,), 16, 1024)), "a short k"
    assert not pays(StrassenDenseSpec((60,), 1024, 64)), "a few columns"
    assert not pays(StrassenDenseSpec((60,), 128, 128)), "small both ways"
    assert not pays(StrassenDenseSpec(("batch", 60), 256, 768)), "any number of rows"


@sized("M tile_pairs block_pairs", [(60, 5, 15), (59, 5, 15), (257, 6, 60), (24, 6, 6)])
def test_two_threads_have_rows_of_their_own(M, tile_pairs, block_pairs) -> None:
    func = strassen_dense(StrassenDenseSpec((1, M), 256, 300))
    chosen = read(sample_decisions(func, cpu_target("x86-64-v4")).mod["main"])
    assert (chosen["tile_pairs"], chosen["block_pairs"]) == (tile_pairs, block_pairs)


@pytest.mark.parametrize("mcpu", list(LEVELS))
@pytest.mark.parametrize(
    "options",
    [{"n": 1376, "swiglu": True}, {"n": 768, "sigmoid_from": 512}, {"n": 300, "residual": True}],
    ids=["swiglu", "sigmoid", "residual"],
)
def test_products_stay_in_registers(mcpu, options) -> None:
    spec = StrassenDenseSpec((1, 59), 256, **options)
    loops = product_loops(assembly(strassen_dense(spec), cpu_target(mcpu)))
    assert len(loops) >= 7
    for loop in loops:
        assert not loop.faults(), f"{loop.faults()} in {loop}"
        assert not loop.reloads(), f"reloads {loop.reloads()} in {loop}"
        assert loop.fma_count == len(loop.arithmetic), f"not all arithmetic is FMA in {loop}"
        assert loop.vector_bits == BITS[mcpu], str(loop)
    full = max(loop.fma_count for loop in loops)
    assert full % (20 if mcpu == "x86-64-v4" else 10) == 0  # 5 rows by 4 or 2 vectors


def test_the_specification_is_a_dense_layers() -> None:
    fields = dataclasses.asdict(DenseSpec((1, 60), 256, 768, sigmoid_from=512))
    spec = StrassenDenseSpec(**fields)
    assert StrassenDenseSpec.of(strassen_dense(spec)) == spec
    assert spec.name == "strassen_dense_1x60x256x768_sigmoid"
