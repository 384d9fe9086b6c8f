"""Attention over a cache: rows of different lengths, wrap-around, one row and many."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from schedules.cached_attention.naive import CachedAttentionSpec, cached_attention
from schedules.common.kernel import ScheduledKernel
from tests.schedules.cases import sized
from tests.schedules.harness import Kernel, scheduled


def _expected(spec: CachedAttentionSpec, q, k, v, lengths, cache):
    """Return output and cache, in float64, by the definition."""
    W, v_off = spec.width, spec.value_offset
    cache = cache.astype(np.float64)
    out = np.empty((spec.batch, spec.q_len, spec.value_width))
    for b, c in np.ndindex(spec.batch, spec.new_len):
        position = lengths[b] + c
        cache[b, position % spec.max_len, :W] = k[b, c]
        if not spec.shared:
            cache[b, position % spec.max_len, v_off : v_off + spec.value_width] = v[b, c]
        i = c - (spec.new_len - spec.q_len)
        if i >= 0:
            rows = cache[b, : min(position + 1, spec.max_len)]
            scores = spec.scale * rows[:, :W] @ q[b, i].astype(np.float64)
            weights = np.exp(scores - scores.max())
            values = rows[:, v_off : v_off + spec.value_width]
            out[b, i] = weights @ values / (weights.sum() + 1e-8)
    return out, cache


def _check(rng, target, spec: CachedAttentionSpec, lengths, schedule=True, **decisions):
    func = cached_attention(spec)
    if schedule:
        kernel = Kernel(scheduled(func, target, **decisions), target)
    else:
        kernel = Kernel(ScheduledKernel(func), target, pipeline=None)
    lengths = np.array(lengths, np.int64)
    shapes = [(spec.q_len, spec.width), (spec.new_len, spec.width)]
    shapes += [] if spec.shared else [(spec.new_len, spec.value_width)]
    rows = [rng.standard_normal((spec.batch, *s), dtype=np.float32) for s in shapes]
    # Rows that no query sees are NaN, and so are columns between and behind keys and values.
    cache = np.full((spec.batch, spec.max_len, spec.row_width), np.nan, np.float32)
    for b, length in enumerate(lengths):
        seen = cache[b, : min(length, spec.max_len)]
        for at, width in ((0, spec.width), (spec.value_offset, spec.value_width)):
            part = seen[:, at : at + width]
            part[...] = rng.standard_normal(part.shape, dtype=np.float32)
    expected, expected_cache = _expected(spec, *rows[:2], rows[-1], lengths, cache)
    out, (*_, after) = kernel.update([*rows, lengths, cache], expected.shape)
    assert_parity(out, expected, name=spec.name)
    assert np.array_equal(after, expected_cache.astype(np.float32), equal_nan=True)


def _spec(B, C, Q, N, W, V=None, scale=None) -> CachedAttentionSpec:
    shared, V = V is None, W if V is None else V
    return CachedAttentionSpec(B, C, Q, N, W, V, shared, scale or 1 / math.sqrt(W))


@sized(
    "B C Q N W V lengths",
    [
        (1, 1, 1, 1, 1, None, [0]),
        (1, 1, 1, 300, 256, None, [299]),
        (3, 1, 1, 70, 40, None, [69, 0, 13]),
        (2, 1, 1, 131, 13, 103, [130, 64]),
        (2, 7, 7, 70, 40, None, [0, 63]),
        (2, 59, 59, 300, 100, 13, [241, 7]),
        (2, 59, 1, 300, 13, None, [241, 0]),
    ],
)
def test_parity(rng, target, B, C, Q, N, W, V, lengths) -> None:
    _check(rng, target, _spec(B, C, Q, N, W, V), lengths)


@pytest.mark.parametrize("length", [59, 60, 177], ids="after{}".format)
def test_full_cache_slides(rng, target, length) -> None:
    """The oldest row makes place, and a query sees all rows, in whatever order they lie."""
    _check(rng, target, _spec(2, 1, 1, 60, 40), [length, 3])


@sized("tile_q tile_k", [(2, 2), (3, 6), (6, 3)])
def test_any_decisions(rng, target, tile_q, tile_k) -> None:
    _check(rng, target, _spec(1, 59, 59, 131, 40), [72], tile_q=tile_q, tile_k=tile_k)


@sized("C Q V", [(1, 1, None), (7, 7, None), (7, 1, 13)])
def test_naive_form(rng, baseline, C, Q, V) -> None:
    _check(rng, baseline, _spec(2, C, Q, 31, 13, V), [24, 3], schedule=False)
