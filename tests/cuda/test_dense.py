"""The dense kernels for GPUs: parity at odd shapes, with every epilogue, whatever the decisions."""

from __future__ import annotations

import numpy as np
import pytest

from schedules.dense.naive import DenseSpec
from schedules.normed_dense.naive import NormedDenseSpec
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


@pytest.mark.parametrize("rows", range(1, 10), ids="M{}".format)
@on_every_device
def test_few_rows(rows: int) -> None:
    """The last row of so many sequences, or a frame of so many streams; tiles from 9 on."""
    from tests.cuda.fused_cases import normed_case
    from tests.cuda.harness import check
    from tests.schedules.cases import dense_case

    rng = np.random.default_rng(rows)
    dense = dense_case(rng, DenseSpec((rows, 1), 40, 70, residual=True))
    normed = normed_case(rng, NormedDenseSpec((rows, 1), 40, 70, swiglu=True))
    for case in (dense, normed):
        check(case, f"M{rows}", orders=(2,))


# block_m, block_n, thread_m, slices
TILES = [
    (16, 16, 1, 1),
    (16, 16, 2, 8),
    (32, 16, 2, 4),
    (16, 64, 8, 2),
    (64, 32, 4, 2),
    (128, 64, 8, 1),
]


@pytest.mark.parametrize("tile", TILES, ids=lambda tile: "x".join(map(str, tile)))
@pytest.mark.parametrize("normed", [False, True], ids=["dense", "normed"])
@on_every_device
def test_tiles(tile: tuple[int, int, int, int], normed: bool) -> None:
    from schedules.dense.cuda import tiles
    from schedules.dense.cuda_tiles import Tile
    from tests.cuda.fused_cases import normed_case
    from tests.cuda.harness import check
    from tests.schedules.cases import dense_case

    rng = np.random.default_rng(0)
    if normed:
        case = normed_case(rng, NormedDenseSpec((59,), 70, 46, swiglu=True))
    else:
        case = dense_case(rng, DenseSpec((59,), 104, 33, residual=True, sigmoid_from=9))
    check(case, str(tile), orders=(0, 2), tile=tiles().index(Tile(*tile)))
