"""Squares and sums of vectors, by shuffles that NumPy does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from schedules.common import reduce, transpose

NUMPY = SimpleNamespace(Shuffle=lambda vectors, indices: np.concatenate(vectors)[indices])


@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_columns_become_rows(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    monkeypatch.setattr(transpose, "tirx", NUMPY)
    square = np.arange(lanes * lanes).reshape(lanes, lanes)
    np.testing.assert_array_equal(transpose.transposed(list(square)), square.T)


@pytest.mark.parametrize("lanes", [2, 4, 8, 16])
def test_a_lane_holds_the_sum_of_its_row(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    monkeypatch.setattr(reduce, "tirx", NUMPY)
    square = np.arange(lanes * lanes).reshape(lanes, lanes) ** 2
    np.testing.assert_array_equal(reduce.row_sums(list(square)), square.sum(axis=1))
