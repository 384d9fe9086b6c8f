"""Both attention kernels, blocked and by row: parity at odd shapes, and at the scores' extremes."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from mega_tvm.tuning.space import Space
from schedules.common.attention import AttentionSpec
from schedules.common.attention_blocks import TRANSPOSITION, balanced_tiles, split_tiles
from schedules.gated_attention.naive import gated_attention
from schedules.laplace_attention.cpu import DIFFERENCE, MAXIMUM
from schedules.laplace_attention.naive import laplace_attention
from tests.schedules.cases import attention_case, attention_spec, sized
from tests.schedules.harness import Kernel, cpu_target, run_naive, run_scheduled, scheduled

L1_FORM = pytest.mark.parametrize("l1_form", [DIFFERENCE, MAXIMUM], ids=["difference", "maximum"])
LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])


def _check(rng, target, spec: AttentionSpec, q=None, k=None, run=run_scheduled, **decisions):
    case = attention_case(rng, spec, q, k)
    y = run(case.func, target, case.inputs, case.expected.shape, **decisions)
    assert_parity(y, case.expected, name=spec.name, condition=case.condition)


@LAPLACE
@sized(
    "B T W V",
    [
        (1, 2, 1, 1),
        (3, 7, 13, 3),
        (2, 20, 40, 16),
        (2, 59, 100, 103),
        (1, 257, 13, 17),
    ],
)
def test_parity(rng, target, laplace, B, T, W, V) -> None:
    _check(rng, target, attention_spec(laplace, B, T, T, W, V))


@LAPLACE
@pytest.mark.parametrize(
    ("keys", "width"),
    [(2, 16), (16, 16), (17, 32), (32, 32), (33, 64), (300, 64), ("seq_len", 64)],
)
def test_a_panel_is_no_wider_than_the_keys(laplace, keys, width) -> None:
    naive = laplace_attention if laplace else gated_attention
    func = naive(attention_spec(laplace, 1, keys, keys, 4))
    hand = Space.of(func, cpu_target("x86-64-v4")).hand
    assert hand["panel_vectors"] * hand.get("lanes", 16) == width


@LAPLACE
@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("B", [1, 2, 3], ids="B{}".format)
@pytest.mark.parametrize(("T", "W"), [(7, 13), (59, 40), (59, 103)], ids=["T7", "T59", "T59-wide"])
def test_blocks_with_keys_of_their_own(rng, target, laplace, B, T, W, lanes) -> None:
    """Elements whole, and split over two blocks (odd batch, enough work)."""
    spec = attention_spec(laplace, B, T, T, W)
    sizes = {"tile_q": 4, "panel_vectors": 2, "span_panels": 4}
    _check(rng, target, spec, own_keys=1, lanes=lanes, **sizes)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("tiles", [2, 3, 10, 15])
def test_two_blocks_of_equal_work(tiles, causal) -> None:
    """Moving a tile to the other block would not help."""
    split = split_tiles(tiles, 4, causal)
    work = [t + 1 if causal else tiles for t in range(tiles)]
    packed = [tiles if not causal else split, tiles]
    first = sum(work[:split]) + packed[0] * TRANSPOSITION / 4
    second = sum(work[split:]) + packed[1] * TRANSPOSITION / 4
    assert 0 < split < tiles
    assert abs(first - second) <= max(work) + TRANSPOSITION / 4


@LAPLACE
@sized("B T W V gated", [(2, 59, 13, 40, True), (2, 7, 40, 3, False)])
def test_merged_operands(rng, target, laplace, B, T, W, V, gated) -> None:
    """Operands at offsets of one tensor; all other columns are NaN."""
    _check(rng, target, attention_spec(laplace, B, T, T, W, V, gate=gated, merged=True))


@LAPLACE
@sized(
    "B K W V gated",
    [
        (1, 1, 1, 1, True),
        (2, 59, 40, 43, False),
        (1, 257, 100, 13, True),
        (3, 7, 3, 100, False),
        (1, 300, 259, 300, True),
    ],
)
def test_last_row(rng, target, laplace, B, K, W, V, gated) -> None:
    _check(rng, target, attention_spec(laplace, B, 1, K, W, V, gate=gated))


@LAPLACE
def test_last_rows_of_many_keys(rng, target, laplace) -> None:
    """A query sees the keys up to its own position, which is not its row."""
    _check(rng, target, attention_spec(laplace, 2, 7, 131, 13))


@LAPLACE
@sized(
    "tile_q panel_vectors span_panels block_q",
    [(2, 1, 4, 12), (8, 4, 2, 96), (3, 4, 1, 24), (5, 1, 8, 30)],
)
def test_any_decisions(rng, target, laplace, tile_q, panel_vectors, span_panels, block_q) -> None:
    decisions = {
        "tile_q": tile_q,
        "panel_vectors": panel_vectors,
        "span_panels": span_panels,
        "block_q": block_q,
    }
    _check(rng, target, attention_spec(laplace, 1, 300, 300, 13, 21), **decisions)


@pytest.mark.parametrize("Q", [107, 1], ids="Q{}".format)
def test_extreme_scores(rng, target, Q) -> None:
    """Scores up to 1e4 and down to -1e4, whose exponentials would be inf or all zeros; and scores
    that rise from key to key, so that every panel shrinks all earlier output.
    """
    spec = attention_spec(False, 3, Q, 107, 13)
    q = np.abs(rng.standard_normal((3, Q, 13), dtype=np.float32))
    k = np.abs(rng.standard_normal((3, 107, 13), dtype=np.float32))
    k[2] = np.arange(107)[:, None] / 4
    q[:2] *= np.float32(1e4 / ((q @ k.swapaxes(1, 2))[:2].max() * spec.scale))
    q[1] *= -1
    _check(rng, target, spec, q, k)


@sized(
    "B Q K W V",
    [
        (1, 2, 2, 1, 1),
        (3, 7, 7, 13, 3),
        (2, 59, 59, 100, 103),
        (1, 257, 257, 13, 17),
        (2, 7, 131, 40, 16),
    ],
)
def test_distances_of_maxima(rng, target, B, Q, K, W, V) -> None:
    _check(rng, target, attention_spec(True, B, Q, K, W, V, merged=Q == K), l1_form=MAXIMUM)


@L1_FORM
@pytest.mark.parametrize("span_panels", [1, 2], ids="span{}".format)
def test_distances_of_any_decisions(rng, target, l1_form, span_panels) -> None:
    spec = attention_spec(True, 1, 300, 300, 13, 21)
    sizes = {"tile_q": 3, "panel_vectors": 2, "span_panels": span_panels, "block_q": 24}
    _check(rng, target, spec, l1_form=l1_form, **sizes)


def _forms(Q: int) -> list[dict[str, int]]:
    return [{}] if Q == 1 else [{"l1_form": DIFFERENCE}, {"l1_form": MAXIMUM}]


@pytest.mark.parametrize("Q", [59, 1], ids="Q{}".format)
def test_equal_vectors_have_distance_zero(rng, target, Q) -> None:
    """Weights are then exactly equal, and the output is the mean of the values."""
    spec = attention_spec(True, 1, Q, 59, 13, gate=False)
    vector = rng.standard_normal((1, 1, 13), dtype=np.float32)
    q, k = np.repeat(vector, Q, axis=1), np.repeat(vector, 59, axis=1)
    case = attention_case(rng, spec, q, k)
    assert_parity(case.expected[0, 0], case.inputs[2][0].mean(axis=0, dtype=np.float64))
    for form in _forms(Q):
        _check(rng, target, spec, q, k, **form)


def _near(rng: np.random.Generator, n: int) -> np.ndarray:
    centre = 100 + np.random.default_rng(1).standard_normal((1, 1, 40))
    return (centre + 1e-3 * rng.standard_normal((1, n, 40))).astype(np.float32)


@pytest.mark.parametrize("Q", [59, 1], ids="Q{}".format)
def test_near_equal_vectors(rng, target, Q) -> None:
    """|q - k| far below |q|: the sum of maxima would cancel."""
    spec = attention_spec(True, 1, Q, 59, 40)
    q, k = _near(rng, Q), _near(rng, 59)
    for form in _forms(Q):
        _check(rng, target, spec, q, k, **form)


def _run_forms(rng, target, spec, q, k, *forms: dict[str, int]) -> list[np.ndarray]:
    case = attention_case(rng, spec, q, k)
    shape = case.expected.shape
    return [run_scheduled(case.func, target, case.inputs, shape, **form) for form in forms]


def test_near_vectors_get_the_bits_of_differences(rng, target) -> None:
    """Where no score of maxima is kept, none is different; where some are, all are right."""
    normal = (rng.standard_normal((1, 59, 40), dtype=np.float32) for _ in range(2))
    spec = attention_spec(True, 1, 59, 59, 40)
    difference, maximum = _run_forms(rng, target, spec, *normal, *_forms(59))
    assert not np.array_equal(maximum, difference), "no score of maxima was kept"
    q, k = _near(rng, 59), _near(rng, 59)
    difference, maximum = _run_forms(rng, target, spec, q, k, *_forms(59))
    np.testing.assert_array_equal(maximum, difference)
    q[:, ::3], k[:, 1::3] = (rng.standard_normal((1, 20, 40), dtype=np.float32) for _ in range(2))
    _check(rng, target, spec, q, k, l1_form=MAXIMUM)


def test_a_score_of_maxima_does_not_depend_on_its_tile(rng, target) -> None:
    """Whether it is kept is its own matter: other tiles give the same bits."""
    spec = attention_spec(True, 1, 59, 59, 40)
    q, k = _near(rng, 59), _near(rng, 59)
    k[:, ::7] = rng.standard_normal((1, 9, 40), dtype=np.float32)
    sizes = [{"tile_q": 6, "panel_vectors": 4}, {"tile_q": 5, "panel_vectors": 2}]
    forms = [{"l1_form": MAXIMUM, "span_panels": 8, **size} for size in sizes]
    first, second = _run_forms(rng, target, spec, q, k, *forms)
    np.testing.assert_array_equal(first, second)


@L1_FORM
def test_distances_keep_nan_and_infinity(rng, target, l1_form) -> None:
    """A NaN in a query is its row's; an infinite component gives weight 0, and no NaN."""
    spec = attention_spec(True, 1, 59, 59, 40)
    q, k = (rng.standard_normal((1, 59, 40), dtype=np.float32) for _ in range(2))
    q[0, 5, 7], k[0, 11, 3] = np.nan, np.inf
    (y,) = _run_forms(rng, target, spec, q, k, {"l1_form": l1_form})
    assert np.isnan(y[0, 5]).all()
    assert np.isfinite(np.delete(y[0], 5, axis=0)).all()


def test_future_keys_do_not_matter(rng, target) -> None:
    """The causal form gives the same bits whatever comes later, NaN included."""
    spec = attention_spec(False, 1, 59, 59, 13)
    case = attention_case(rng, spec)
    kernel = Kernel(scheduled(case.func, target), target)
    before = kernel(case.inputs, case.expected.shape)
    q, k, v, gate = (a.copy() for a in case.inputs)
    k[:, 40:] = np.nan
    q[:, 40:] = np.nan
    after = kernel((q, k, v, gate), case.expected.shape)
    np.testing.assert_array_equal(after[:, :40], before[:, :40])


@LAPLACE
@pytest.mark.parametrize("Q", [5, 3, 1], ids="Q{}".format)
def test_naive_is_the_definition(rng, baseline, laplace, Q) -> None:
    for gate in (True, False):
        spec = attention_spec(laplace, 2, Q, 5, 7, 6, gate=gate)
        _check(rng, baseline, spec, run=run_naive)
    spec = attention_spec(laplace, 2, 5, 5, 7, 6, merged=True)
    _check(rng, baseline, spec, run=run_naive)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all"])
@pytest.mark.parametrize("tiles", [1, 2, 3, 7, 10, 12, 43, 171])
def test_two_threads_share_the_tiles(tiles, causal) -> None:
    """Neither has more than its half and what one tile more would be."""
    block = balanced_tiles(tiles, 8, causal)
    assert 1 <= block <= min(8, tiles)
    blocks = -(-tiles // block)
    order = [u // 2 if u % 2 == 0 else blocks - 1 - u // 2 for u in range(blocks)]
    work = [t + 1 if causal else 1 for t in range(tiles)]
    first = [n for nth in order[: -(-blocks // 2)] for n in work[nth * block :][:block]]
    larger = max(sum(first), sum(work) - sum(first))
    assert larger <= 1.02 * (sum(work) / 2 + max(work))
