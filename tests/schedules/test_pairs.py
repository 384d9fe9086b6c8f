"""Products in pairs: parity at odd shapes, rounding by norms, and what they compile to."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest

from mega_tvm.c_function import serial_form
from mega_tvm.targets import resolve_target
from mega_tvm.tolerances import assert_parity
from schedules.common.decisions import read
from schedules.dense.naive import DenseSpec, dense
from schedules.dense.pairs import scaled_columns
from schedules.registry import sample_decisions
from tests.schedules.assembly import assert_in_pairs, product_loops
from tests.schedules.cases import dense_case, sized
from tests.schedules.harness import (
    assembly_of,
    compiled,
    cpu_target,
    require,
    run_naive,
    run_scheduled,
    scheduled,
)

# Vectors that a kernel puts on the stack: a SwiGLU tile's end some 15, 200 without due care.
SPILLED = 24

EPILOGUES = {
    "bias": {},
    "residual": {"residual": True},
    "sigmoid": {"sigmoid_from": 3},  # inside a vector
    "swiglu": {"swiglu": True},
    "swiglu-residual": {"swiglu": True, "residual": True},
}


@pytest.fixture
def avx512():
    require("x86-64-v4")
    return cpu_target("x86-64-v4")


def _paired(spec: DenseSpec) -> DenseSpec:
    return dataclasses.replace(spec, paired=True)


def _run(rng, target, spec: DenseSpec, **decisions: int):
    case = dense_case(rng, spec)
    y = run_scheduled(case.func, target, case.inputs, case.expected.shape, **decisions)
    return case, y


@sized(
    "lead K N epilogue",
    [
        ((1,), 128, 128, "bias"),  # too few rows: plain products on scaled weights
        ((1, 7), 128, 133, "residual"),
        ((1, 59), 257, 129, "sigmoid"),
        ((2, 3, 7), 130, 150, "swiglu"),
        ((257,), 131, 144, "swiglu-residual"),
        ((1, 257), 132, 200, "bias"),
        ((59,), 133, 16, "residual"),
    ],
)
def test_parity(rng, target, lead, K, N, epilogue) -> None:
    """Every rest that groups of three and pairs of groups leave of k."""
    spec = DenseSpec(lead, K, N * (1 + epilogue.startswith("swiglu")), **EPILOGUES[epilogue])
    case, y = _run(rng, target, _paired(spec))
    assert_parity(y, case.expected, name=spec.name)


@sized(
    "pairs panel_vectors block_m prefetch epilogue",
    [
        (5, 1, 5, 0, "sigmoid"),
        (6, 2, 60, 1, "swiglu"),
        (8, 3, 24, 2, "residual"),
        (10, 5, 60, 1, "sigmoid"),
        (12, 4, 240, 1, "swiglu"),
        (0, 4, 60, 1, "swiglu"),
    ],
)
def test_any_decisions(rng, avx512, pairs, panel_vectors, block_m, prefetch, epilogue) -> None:
    """Row tails, panel tails, and blocks that prepare their own rows: 131 rows, 75 columns."""
    decisions = {"panel_vectors": panel_vectors, "block_m": block_m, "prefetch": prefetch}
    spec = DenseSpec((131,), 50, 75 * (1 + (epilogue == "swiglu")), **EPILOGUES[epilogue])
    case, y = _run(rng, avx512, _paired(spec), pairs=pairs, **decisions)
    assert_parity(y, case.expected)


def test_naive_is_the_definition(rng, baseline) -> None:
    for epilogue in EPILOGUES.values():
        spec = _paired(DenseSpec((2, 3), 5, 6, **epilogue))
        case = dense_case(rng, spec)
        y = run_naive(case.func, baseline, case.inputs, case.expected.shape)
        assert_parity(y, case.expected)


def test_default_is_in_pairs_where_rows_are_many(avx512, baseline) -> None:
    def pairs(target, spec: DenseSpec) -> int | None:
        return read(sample_decisions(dense(spec), target).mod["main"]).get("pairs")

    spec = DenseSpec((1, 60), 256, 256)
    assert pairs(avx512, _paired(spec)) == 10
    assert pairs(avx512, _paired(DenseSpec((1, 57), 256, 256))) == 10
    assert pairs(avx512, spec) is None
    assert pairs(avx512, _paired(DenseSpec((5,), 256, 256))) is None
    assert pairs(avx512, _paired(DenseSpec((60,), 47, 256))) is None
    assert pairs(avx512, _paired(DenseSpec(("batch", "seq_len"), 256, 256))) is None
    assert pairs(baseline, _paired(spec)) is None


def _relative(y, case) -> np.ndarray:
    """Return each row's error relative to the norms of the row and of the columns."""
    x, w, b = case.inputs
    columns = np.linalg.norm(w * b[1], axis=0)
    bound = np.linalg.norm(x.reshape(-1, w.shape[0]).astype(np.float64), axis=1)[:, None] * columns
    return np.abs(y - case.expected).reshape(bound.shape) / bound


@sized("factor", [(1e-12,), (1e-3,), (1.0,), (977.0,), (1e15,)])
def test_rounding_goes_by_the_size_of_a_row(rng, avx512, factor) -> None:
    """Rows of any size, one behind the other, and columns too: no row loses to another."""
    spec = _paired(DenseSpec((60,), 257, 144))
    x = rng.standard_normal((60, 257), dtype=np.float32)
    x[::2] *= np.float32(factor)
    w = rng.standard_normal((257, 144), dtype=np.float32) * np.float32(0.06)
    w[:, ::3] *= np.float32(factor)
    case = dense_case(rng, spec, x, w, np.zeros(144, np.float32))
    y = run_scheduled(case.func, avx512, case.inputs, case.expected.shape)
    # Plain products reach 1.9e-7.
    assert _relative(y, case).max() < 3e-7


def test_activations_with_a_mean(rng, avx512) -> None:
    """Groups of alternating sign: the terms of rows and columns cancel."""
    spec = _paired(DenseSpec((60,), 688, 144))
    x = 3 + rng.standard_normal((60, 688), dtype=np.float32)
    w = (0.5 + rng.standard_normal((688, 144), dtype=np.float32)) * np.float32(0.04)
    case = dense_case(rng, spec, x, w)
    y = run_scheduled(case.func, avx512, case.inputs, case.expected.shape)
    assert_parity(y, case.expected)


def test_rows_without_values(rng, avx512) -> None:
    """Zeros give the bias; a NaN, and an infinity, stay in their rows."""
    case = dense_case(rng, _paired(DenseSpec((61,), 130, 144)))
    x, _, b = case.inputs
    x[3], x[17, 5], x[44, 129] = 0, np.nan, np.inf
    y = run_scheduled(case.func, avx512, case.inputs, case.expected.shape)
    np.testing.assert_allclose(y[3], b[0], rtol=0, atol=1e-20)
    assert np.isnan(y[17]).all() and not np.isfinite(y[44]).any()
    rest = np.setdiff1d(np.arange(61), [3, 17, 44])
    assert_parity(y[rest], case.expected[rest])


def test_a_row_does_not_depend_on_its_place(rng, avx512) -> None:
    """Nor on how many there are, and how tiles cut them: windows and pieces count on it."""
    results = []
    row = rng.standard_normal(200, dtype=np.float32)
    w = rng.standard_normal((200, 144), dtype=np.float32)
    for rows, pairs in ((7, 7), (59, 10), (131, 12)):
        spec = _paired(DenseSpec((rows,), 200, 144))
        case = dense_case(rng, spec, np.tile(row, (rows, 1)), w, np.zeros(144, np.float32))
        results.append(
            run_scheduled(case.func, avx512, case.inputs, case.expected.shape, pairs=pairs)
        )
    for result in results:
        np.testing.assert_array_equal(result, np.tile(results[0][0], (len(result), 1)))


def test_scaled_columns() -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_normal((131, 40)).astype(np.float32)
    w *= np.exp(rng.uniform(-30, 30, 40)).astype(np.float32)
    w[:, 7] = 0
    b = rng.standard_normal(40).astype(np.float32)
    scaled, rows = scaled_columns(w, b)
    np.testing.assert_array_equal(scaled * rows[1], w)
    np.testing.assert_array_equal(rows[0], b)
    assert (np.frexp(rows[1])[0] == 0.5).all(), "not powers of two"
    rms = np.delete(np.sqrt(np.square(scaled.astype(np.float64)).mean(axis=0)), 7)
    assert ((rms > 0.7) & (rms < 1.42)).all()
    signs = np.where(np.arange(43) % 2, 1.0, -1.0)
    terms = signs @ (scaled[:43].astype(np.float64) * scaled[43:86])
    np.testing.assert_allclose(rows[2], terms, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize(
    "spec",
    [
        DenseSpec((1, 60), 256, 768, sigmoid_from=512),
        DenseSpec((1, 60), 256, 1376, swiglu=True),
        DenseSpec((1, 30), 688, 256, residual=True),
        DenseSpec((1920,), 256, 256, residual=True),
    ],
    ids=lambda spec: spec.name,
)
@pytest.mark.parametrize("form", [lambda func: func, serial_form], ids=["whole", "in_a_piece"])
def test_inner_loop(spec, form) -> None:
    target = resolve_target("x86-64-v4").tvm_target()  # as a compile has it
    text = assembly_of(compiled(form(scheduled(dense(_paired(spec)), target).func), target))
    # LLVM would read the factors of all rows ahead of the loop over panels, and keep them there.
    assert len(re.findall(r"%zmm\d+, -?\d+\(%rsp", text)) <= SPILLED
    loop = max(product_loops(text), key=lambda loop: loop.fma_count)
    assert_in_pairs(loop)
