"""Both attention kernels, blocked and by row: parity at odd shapes, and at the scores' extremes."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from mega_tvm.tuning.space import Space
from schedules.common.attention import AttentionSpec
from schedules.common.attention_blocks import TRANSPOSITION, balanced_tiles, split_tiles
from schedules.gated_attention.naive import gated_attention
from schedules.laplace_attention.naive import laplace_attention
from tests.schedules.cases import attention_case, attention_spec, sized
from tests.schedules.harness import Kernel, cpu_target, run_naive, run_scheduled, scheduled

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


@pytest.mark.parametrize("Q", [59, 1], ids="Q{}".format)
def test_equal_vectors_have_distance_zero(rng, target, Q) -> None:
    """Weights are then exactly equal, and the output is the mean of the values."""
    spec = attention_spec(True, 1, Q, 59, 13, gate=False)
    vector = rng.standard_normal((1, 1, 13), dtype=np.float32)
    q, k = np.repeat(vector, Q, axis=1), np.repeat(vector, 59, axis=1)
    case = attention_case(rng, spec, q, k)
    assert_parity(case.expected[0, 0], case.inputs[2][0].mean(axis=0, dtype=np.float64))
    _check(rng, target, spec, q, k)


@pytest.mark.parametrize("Q", [59, 1], ids="Q{}".format)
def test_near_equal_vectors(rng, target, Q) -> None:
    """|q - k| far below |q|: the sum of maxima would cancel."""
    spec = attention_spec(True, 1, Q, 59, 40)
    centre = 100 + rng.standard_normal((1, 1, 40))
    q = (centre + 1e-3 * rng.standard_normal((1, Q, 40))).astype(np.float32)
    k = (centre + 1e-3 * rng.standard_normal((1, 59, 40))).astype(np.float32)
    _check(rng, target, spec, q, k)


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
