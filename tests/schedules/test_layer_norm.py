"""The layer_norm kernel: parity at odd widths, and where float32 is fragile."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from schedules.common.cpu_features import vector_unit
from schedules.layer_norm.naive import LayerNormSpec, layer_norm
from tests.schedules.cases import layer_norm_case
from tests.schedules.harness import run_naive, run_scheduled

EPS = 1e-5
FORMS = pytest.mark.parametrize(
    "form",
    [{}, {"affine": False}, {"clamp_variance": True}],
    ids=["affine", "plain", "clamped"],
)


def _rows(rng, lead: tuple, n: int) -> np.ndarray:
    return rng.standard_normal((*lead, n), dtype=np.float32)


def _check(rng, target, x, form, run=run_scheduled, **decisions: int) -> np.ndarray:
    spec = LayerNormSpec(x.shape[:-1], x.shape[-1], EPS, **form)
    case = layer_norm_case(spec, x, rng)
    y = run(case.func, target, case.inputs, x.shape, **decisions)
    assert_parity(y, case.expected, name=spec.name, condition=case.condition)
    return y


@FORMS
@pytest.mark.parametrize(
    ("lead", "n"),
    [
        ((1,), 1),
        ((1, 59), 40),
        ((2, 3), 13),
        ((2, 1, 7), 257),
        ((1, 600), 256),  # parallel
    ],
    ids=lambda v: "M" + "x".join(map(str, v)) if isinstance(v, tuple) else f"N{v}",
)
def test_parity(rng, target, lead, n, form) -> None:
    _check(rng, target, _rows(rng, lead, n), form)


@FORMS
def test_variance_around_eps(rng, target, form) -> None:
    """Rows whose variance lies below, near and above eps: the two forms part there."""
    x = _rows(rng, (1, 7), 100)
    x *= np.float32([1e-6, 1e-4, 1e-3, 3e-3, 3.3e-3, 1e-2, 1])[:, None]
    _check(rng, target, x, form)


@FORMS
def test_constant_rows_give_zero(rng, target, form) -> None:
    """Powers of two: their mean is exact, so the deviation is 0 and beta comes out."""
    x = np.repeat(np.float32([0, 1, -4096])[:, None], 64, axis=1)
    spec = LayerNormSpec((3,), 64, EPS, **form)
    case = layer_norm_case(spec, x, rng)
    y = run_scheduled(case.func, target, case.inputs, x.shape)
    np.testing.assert_array_equal(y, case.expected.astype(np.float32))


@FORMS
def test_large_mean(rng, target, form) -> None:
    """Mean 1e4, deviation 1: E[x^2] - E[x]^2 in float32 would have no correct digit."""
    y = _check(rng, target, _rows(rng, (1, 7), 100) + np.float32(1e4), form)
    assert np.abs(y).max() > 1


@pytest.mark.parametrize("unroll", [1, 2, 4, 8])
@pytest.mark.parametrize("n", [100, 300], ids="N{}".format)
def test_any_decisions(rng, target, n, unroll) -> None:
    _check(rng, target, _rows(rng, (2, 7), n), {}, unroll=unroll)


@FORMS
@pytest.mark.parametrize("pipelined", [0, 1])
@pytest.mark.parametrize("n", [77, 600], ids="N{}".format)
def test_rows_in_a_pipeline(rng, target, n, pipelined, form) -> None:
    """Rows that registers hold, in part or as a whole, with a tail and without."""
    _check(rng, target, _rows(rng, (1, 7), n), form, pipelined=pipelined)


@pytest.mark.parametrize("n", [100, 256], ids="N{}".format)
def test_a_row_is_the_same_wherever_it_stands(rng, target, n) -> None:
    """To the bit: alone, among few or many, first or last in a pipeline, or in none."""
    rows = 12_288 // n + 80
    x = _rows(rng, (rows,), n)
    case = layer_norm_case(LayerNormSpec((rows,), n, EPS), x, rng)
    y = run_scheduled(case.func, target, case.inputs, x.shape)
    for count, decisions in [
        (1, {}),
        (2, {}),
        (3, {}),
        (5, {"pipelined": 0}),
        (rows - 1, {}),
        (rows - 1, {"pipeline_rows": 16}),
        (rows - 1, {"pipelined": 0}),
    ]:
        some = layer_norm(LayerNormSpec((count,), n, EPS))
        inputs = (x[-count:], *case.inputs[1:])
        last = run_scheduled(some, target, inputs, (count, n), **decisions)
        np.testing.assert_array_equal(last, y[-count:], err_msg=f"{count} rows, {decisions}")


@pytest.mark.parametrize("n", [48, 256], ids="N{}".format)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_in_its_row(rng, target, n, bad) -> None:
    x = _rows(rng, (9,), n)
    spec = LayerNormSpec((9,), n, EPS)
    case = layer_norm_case(spec, x, rng)
    good = run_scheduled(case.func, target, case.inputs, x.shape)
    x[4, n // 3] = bad
    y = run_scheduled(case.func, target, (x, *case.inputs[1:]), x.shape)
    assert np.isnan(y[4]).any()
    np.testing.assert_array_equal(np.delete(y, 4, 0), np.delete(good, 4, 0))


@FORMS
@pytest.mark.parametrize("together", [1, 16])
@pytest.mark.parametrize("rows", [4, 16, 59, 600], ids="M{}".format)
def test_rows_together(rng, target, rows, together, form) -> None:
    """Tiles of two heights, and tiles with fewer rows than a vector has lanes."""
    lanes = vector_unit(target).lanes
    x = _rows(rng, (1, rows), 48)
    _check(rng, target, x, form, together=min(together, lanes), unroll=2)


@FORMS
def test_naive_is_the_definition(rng, baseline, form) -> None:
    x = _rows(rng, (2, 3), 5) * np.float32([[[1e-3], [1], [30]]])
    _check(rng, baseline, x, form, run=run_naive)
