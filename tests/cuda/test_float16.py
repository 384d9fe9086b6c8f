"""Kernels on float16 tensors: parity at odd shapes, in any order of threads."""

from __future__ import annotations

import numpy as np
import pytest

from schedules.dense.naive import DenseSpec
from tests.cuda.emulator.worker import in_emulator

# lead, k, n, options: up to 8 rows, and more; k a multiple of 8 (asynchronous copies) or not
DENSE = {
    "M1-K1-N1": ((1,), 1, 1, {}),
    "M3x1-K13-N26-swiglu": ((3, 1), 13, 26, {"swiglu": True}),
    "M7-K100-N13-sigmoid": ((1, 7), 100, 13, {"sigmoid_from": 4}),
    "M9-K7-N3": ((9,), 7, 3, {}),
    "M59-K40-N129-residual": ((1, 59), 40, 129, {"residual": True}),
    "M14-K13-N17-sigmoid": ((2, 7), 13, 17, {"sigmoid_from": 5}),
    "M59-K24-N112-swiglu": ((59,), 24, 112, {"swiglu": True}),
    "M257-K168-N46-swiglu-residual": ((257,), 168, 46, {"swiglu": True, "residual": True}),
}


def rng():
    """Return a generator whose normal numbers are float16's."""

    class Rounded:
        def __init__(self) -> None:
            self.rng = np.random.default_rng(0)

        def standard_normal(self, size, dtype=np.float32):
            return self.rng.standard_normal(size, dtype).astype(np.float16).astype(dtype)

    return Rounded()


@pytest.mark.parametrize("name", DENSE)
@in_emulator
def test_dense(name: str) -> None:
    from tests.cuda.harness import check, stored_in_half
    from tests.schedules.cases import dense_case

    lead, k, n, options = DENSE[name]
    check(stored_in_half(dense_case(rng(), DenseSpec(lead, k, n, **options)), wide=[2]), name)
