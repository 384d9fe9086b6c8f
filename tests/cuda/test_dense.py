"""The dense kernels for GPUs: parity at odd shapes, with every epilogue, whatever the decisions."""

from __future__ import annotations

import numpy as np
import pytest

from schedules.dense.naive import DenseSpec
from tests.cuda.devices import on_every_device

# lead, k, n, options. Up to 8 rows are one kernel, more another; k a multiple of 4 or not.
CASES = {
    "M1-K1-N1": ((1,), 1, 1, {}),
    "M1-K40-N300-residual": ((1,), 40, 300, {"residual": True}),
    "M3x1-K13-N26-swiglu": ((3, 1), 13, 26, {"swiglu": True}),
    "M7-K100-N13-sigmoid": ((1, 7), 100, 13, {"sigmoid_from": 4}),
    "M8-K257-N33": ((8,), 257, 33, {"residual": True, "sigmoid_from": 0}),
    "M9-K7-N3": ((9,), 7, 3, {}),
    "M59-K40-N129-residual": ((1, 59), 40, 129, {"residual": True}),
    "M14-K13-N17-sigmoid": ((2, 7), 13, 17, {"sigmoid_from": 5}),
    "M59-K24-N112-swiglu": ((59,), 24, 112, {"swiglu": True}),
    "M21-K13-N46-swiglu-residual": ((3, 7), 13, 46, {"swiglu": True, "residual": True}),
}


@pytest.mark.parametrize("name", CASES)
@on_every_device
def test_parity(name: str) -> None:
    from tests.cuda.harness import check
    from tests.schedules.cases import dense_case

    lead, k, n, options = CASES[name]
    check(dense_case(np.random.default_rng(0), DenseSpec(lead, k, n, **options)), name)
