"""The dense kernel: parity at odd shapes, with every epilogue, whatever the decisions."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from schedules.common.decisions import read
from schedules.dense.kernel import fetched_by
from schedules.dense.naive import DenseSpec, dense
from schedules.registry import sample_decisions
from tests.schedules.cases import dense_case, sized
from tests.schedules.harness import cpu_target, run_naive, run_scheduled

# lead, k, n: every size of T, leads of rank 1 to 3, widths around one and two vectors and panels
SHAPES = [
    ((1,), 1, 1),
    ((1, 1), 100, 40),
    ((3,), 40, 300),
    ((3, 1), 13, 3),
    ((1, 7), 100, 13),
    ((1, 59), 100, 129),
    ((2, 1, 7), 40, 17),
    ((2, 3, 59), 13, 1),
    ((257,), 3, 65),
    ((1, 257), 40, 13),
]


EPILOGUES = ["bias", "residual", "sigmoid", "swiglu", "swiglu-residual"]


def _id(value: object) -> str:
    if not isinstance(value, tuple):
        return str(value)
    lead, k, n = value
    return f"M{'x'.join(map(str, lead))}-K{k}-N{n}"


def _check(rng, target, run, spec: DenseSpec, **decisions: int) -> None:
    case = dense_case(rng, spec)
    y = run(case.func, target, case.inputs, case.expected.shape, **decisions)
    assert_parity(y, case.expected, name=spec.name)


@pytest.mark.parametrize(
    ("shape", "epilogue"),
    # two epilogues a shape, so that each epilogue meets four shapes
    [
        pair
        for i, s in enumerate(SHAPES)
        for pair in ((s, EPILOGUES[i % 5]), (s, EPILOGUES[i % 5 - 2]))
    ],
    ids=_id,
)
def test_parity(rng, target, shape, epilogue) -> None:
    lead, k, n = shape
    options: dict = {}
    if epilogue.startswith("swiglu"):
        n, options["swiglu"] = 2 * n, True  # an odd n makes an odd half width
    if epilogue.endswith("residual"):
        options["residual"] = True
    if epilogue == "sigmoid":
        options["sigmoid_from"] = n // 3  # inside a vector
    _check(rng, target, run_scheduled, DenseSpec(lead, k, n, **options))


@pytest.mark.parametrize("start", [0, 1, 39, 40])
def test_sigmoid_starts_anywhere(rng, target, start) -> None:
    """From no column to all of them, also at the last and past the last."""
    spec = DenseSpec((1, 7), 13, 40, residual=True, sigmoid_from=start)
    _check(rng, target, run_scheduled, spec)


@sized(
    "tile_m panel_vectors block_m epilogue",
    [
        (1, 1, 60, "sigmoid"),
        (1, 8, 240, "swiglu"),
        (2, 4, 120, "swiglu"),
        (3, 6, 60, "sigmoid"),
        (5, 3, 120, "sigmoid"),
        (6, 2, 240, "swiglu"),
        (8, 4, 60, "sigmoid"),
        (12, 2, 60, "swiglu"),
        (14, 8, 60, "sigmoid"),
        (14, 1, 240, "sigmoid"),
    ],
)
def test_any_decisions(rng, target, tile_m, panel_vectors, block_m, epilogue) -> None:
    """Row tails, panel tails and several row blocks at once: 131 rows, 75 columns (or units)."""
    swiglu = epilogue == "swiglu"
    options = {"swiglu": True} if swiglu else {"residual": True, "sigmoid_from": 70}
    decisions = {"tile_m": tile_m, "panel_vectors": panel_vectors, "block_m": block_m}
    spec = DenseSpec((131,), 13, 150 if swiglu else 75, **options)
    _check(rng, target, run_scheduled, spec, **decisions)


@sized("M K N", [(7, 16, 40), (59, 257, 100), (131, 13, 75), (12, 3, 17)])
def test_spread_fetches_change_no_bit(rng, baseline, M, K, N) -> None:
    case = dense_case(rng, DenseSpec((M,), K, N, residual=True))
    arguments = (case.func, baseline, case.inputs, case.expected.shape)
    plain, spread = (run_scheduled(*arguments, spread=spread) for spread in (0, 1))
    assert_parity(spread, case.expected)
    np.testing.assert_array_equal(plain, spread)


@pytest.mark.parametrize("tiles", [2, 3, 5, 10, 20])
@sized("K lines", [(16, 1), (256, 1), (257, 1), (688, 1), (256, 4)])
def test_tiles_share_the_lines_of_a_panel(tiles, K, lines) -> None:
    fetch = fetched_by(tiles, K, lines, spread=True)
    fetched = tiles * fetch.lines * (K // fetch.steps)
    assert fetched >= lines * K
    assert fetch.lines > 1 or tiles * (K // (fetch.steps + 1)) < lines * K, "more than it need be"
    alone = fetched_by(tiles, K, lines, spread=False)
    assert alone.steps == 1 and tiles * alone.lines >= lines


def test_naive_is_the_definition(rng, baseline) -> None:
    for options in ({}, {"residual": True}, {"sigmoid_from": 3}, {"swiglu": True}):
        _check(rng, baseline, run_naive, DenseSpec((2, 3), 5, 6, **options))


def test_nan_stays_in_its_row(rng, target) -> None:
    spec = DenseSpec((1, 7), 13, 40, sigmoid_from=20)
    case = dense_case(rng, spec)
    case.inputs[0][0, 2, 5] = np.nan
    y = run_scheduled(case.func, target, case.inputs, case.expected.shape)
    assert np.isnan(y[0, 2]).all()
    rest = np.arange(7) != 2
    assert_parity(y[0, rest], case.expected[0, rest])


@sized(
    "M K N tile_m block_m",
    [
        (59, 40, 300, 6, 30),  # two halves, each of five tiles
        (59, 40, 13, 10, 30),  # one panel: rows are all that can be split
        (16, 40, 300, 6, 24),  # too few tiles to hide the fetching of a panel
        (257, 40, 300, 6, 120),  # blocks enough
    ],
)
def test_two_threads_have_rows_of_their_own(M, K, N, tile_m, block_m) -> None:
    func = dense(DenseSpec((1, M), K, N))
    chosen = read(sample_decisions(func, cpu_target("x86-64-v4")).mod["main"])
    assert (chosen["tile_m"], chosen["block_m"]) == (tile_m, block_m)
