"""The polynomials that stand in for library calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from tvm import tirx
from tvm.script import tirx as T

from schedules.common import vector_math
from schedules.common.kernel import ScheduledKernel
from tests.schedules.assembly import inner_loops
from tests.schedules.harness import Kernel, assembly_of, compiled

INF, NAN = np.inf, np.nan


def _elementwise(function: Callable[[tirx.PrimExpr], tirx.PrimExpr], n: int) -> tirx.PrimFunc:
    @T.prim_func(s_tir=True, private=True)
    def kernel(x: T.Buffer((n,), "float32"), y: T.Buffer((n,), "float32")):
        for i in T.serial(n // 16):
            for lane in T.vectorized(16):
                y[i * 16 + lane] = function(x[i * 16 + lane])

    return kernel


def _apply(function, target, x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    padded = np.pad(x, (0, -x.size % 16))
    kernel = Kernel(ScheduledKernel(_elementwise(function, padded.size)), target)
    return kernel((padded,), padded.shape)[: x.size]


def test_exp_is_accurate(target) -> None:
    x = np.linspace(-87, 88, 2_000_000, dtype=np.float32)
    near_zero = np.geomspace(1e-30, 1, 100_000, dtype=np.float32)
    x = np.concatenate([x, near_zero, -near_zero])
    y = _apply(vector_math.exp, target, x).astype(np.float64)
    x = x.astype(np.float64)
    assert (np.abs(y / np.exp(x) - 1) <= 1e-7 + 1.4e-8 * np.abs(x)).all()


def test_exp_of_a_scaled_argument(target) -> None:
    x = np.linspace(-300, 300, 100_001, dtype=np.float32)
    y = _apply(lambda x: vector_math.exp(x, 0.25), target, x).astype(np.float64)
    x = 0.25 * x.astype(np.float64)
    assert (np.abs(y / np.exp(x) - 1) <= 1e-7 + 4e-8 * np.abs(x)).all()


def test_exp_saturates(target) -> None:
    """Outside [-87, 88] the nearer end's value: never inf, denormal or 0."""
    x = [-INF, -3e38, -1000, -88, 89, 1000, 3e38, INF, 0.0, -0.0, 1e-40]
    y = _apply(vector_math.exp, target, x).astype(np.float64)
    np.testing.assert_allclose(y[:4], np.exp(-87), rtol=1.4e-6)
    np.testing.assert_allclose(y[4:8], np.exp(88), rtol=1.4e-6)
    np.testing.assert_array_equal(y[8:], 1)


def test_sigmoid(target) -> None:
    x = np.linspace(-100, 100, 200_001, dtype=np.float32)
    y = _apply(vector_math.sigmoid, target, x).astype(np.float64)
    expected = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert np.abs(y - expected).max() <= 2**-23
    inside = x >= -87
    assert (np.abs(y / expected - 1) <= 2e-7 + 1.4e-8 * np.abs(x))[inside].all()
    assert (y >= 0).all() and (y <= 1).all() and (np.diff(y[::100]) >= 0).all()


def test_silu(target) -> None:
    x = np.linspace(-100, 100, 200_001, dtype=np.float32)
    y = _apply(vector_math.silu, target, x).astype(np.float64)
    x = x.astype(np.float64)
    expected = x / (1 + np.exp(-x))
    assert np.abs(y - expected).max() <= 100 * 2**-23
    inside = (x >= -87) & (x != 0)
    error = np.abs(y[inside] / expected[inside] - 1)
    assert (error <= 2e-7 + 1.4e-8 * np.abs(x[inside])).all()


def test_extremes(target) -> None:
    """Infinities saturate like any large number; only silu passes them on, as x * sigmoid(x)."""
    x = [-INF, -1e4, 1e4, INF]
    sigmoid = _apply(vector_math.sigmoid, target, x)
    assert (sigmoid[:2] >= 0).all() and (sigmoid[:2] < 1e-38).all()
    np.testing.assert_array_equal(sigmoid[2:], 1)
    silu = _apply(vector_math.silu, target, x)
    np.testing.assert_array_equal(silu[[0, 2, 3]], np.float32([-INF, 1e4, INF]))
    assert -1e-33 < silu[1] <= 0


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu"])
def test_nan_propagates(target, name) -> None:
    x = np.zeros(32, np.float32)
    x[[0, 7, 31]] = NAN
    y = _apply(getattr(vector_math, name), target, x)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu"])
def test_stays_in_vector_registers(target, name) -> None:
    text = assembly_of(compiled(_elementwise(getattr(vector_math, name), 256), target))
    (loop,) = [loop for loop in inner_loops(text) if loop.fma_count]
    assert not any(i.calls for i in loop.body), str(loop)
    assert not any(i.opcode.endswith("ss") for i in loop.arithmetic), str(loop)
    assert loop.vector_bits >= 256, str(loop)
