"""The packed layout of dense weights: every element once, zeros elsewhere, back without loss."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from schedules.dense.naive import DenseSpec
from schedules.dense.packing import PanelLayout


@st.composite
def layouts(draw: st.DrawFn) -> PanelLayout:
    swiglu = draw(st.booleans(), label="swiglu")
    n = draw(st.integers(1, 150), label="units") * (2 if swiglu else 1)
    spec = DenseSpec((1,), draw(st.integers(1, 9), label="k"), n, swiglu=swiglu)
    lanes = draw(st.sampled_from([8, 16]), label="lanes")
    vectors = draw(st.integers(1, 4), label="vectors") * (2 if swiglu else 1)
    return PanelLayout(spec, lanes, vectors * lanes)


def _unpack(layout: PanelLayout, packed: np.ndarray) -> np.ndarray:
    """Read ``[k, n]`` back, column by column, as the kernel addresses it."""
    spec, lanes = layout.spec, layout.lanes
    w = np.empty((spec.k, spec.n), packed.dtype)
    for column in range(spec.n):
        if spec.swiglu:
            up, unit = divmod(column, spec.out_n)
            at = (unit // lanes * 2 + up) * lanes + unit % lanes
        else:
            at = column
        panel, offset = divmod(at, layout.width)
        width = layout.width if panel < layout.full_panels else layout.tail_width
        base = panel * layout.width * spec.k
        w[:, column] = packed[base + offset + np.arange(spec.k) * width]
    return w


@settings(max_examples=150, deadline=None)
@given(layout=layouts())
def test_packing_is_invertible(layout: PanelLayout) -> None:
    k, n = layout.spec.k, layout.spec.n
    w = np.arange(1, k * n + 1, dtype=np.float32).reshape(k, n)
    packed = layout.pack_weight(w)
    assert packed.shape == (layout.size,)
    assert packed.dtype == np.float32 and packed.flags.c_contiguous
    np.testing.assert_array_equal(_unpack(layout, packed), w)
    np.testing.assert_array_equal(np.sort(packed[packed != 0]), w.ravel())  # each exactly once
    assert np.count_nonzero(packed == 0) == layout.size - k * n


@settings(max_examples=100, deadline=None)
@given(layout=layouts())
def test_bias_follows_the_columns(layout: PanelLayout) -> None:
    """The bias lies as a row of the packed weights does, panel after panel."""
    n = layout.spec.n
    bias = np.arange(1, n + 1, dtype=np.float32)
    packed = layout.pack_bias(bias)
    one_row = PanelLayout(
        DenseSpec((1,), 1, n, swiglu=layout.spec.swiglu), layout.lanes, layout.width
    )
    assert packed.shape == (layout.padded_n,)
    np.testing.assert_array_equal(packed, one_row.pack_weight(bias[None]))


@settings(max_examples=100, deadline=None)
@given(layout=layouts())
def test_panels_cover_the_columns_and_pad_no_more_than_a_vector(layout: PanelLayout) -> None:
    assert layout.full_panels * layout.width + layout.tail_width == layout.padded_n
    assert layout.padded_n % layout.lanes == 0
    halves = 2 if layout.spec.swiglu else 1
    assert 0 <= layout.padded_n - layout.spec.n < layout.lanes * halves
