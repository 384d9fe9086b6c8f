"""The comparison that every parity test and `verify` rest on."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.tolerances import TOLERANCES, assert_parity, compare

EXPECTED = np.linspace(-4, 4, 24).reshape(2, 3, 4)


def test_equal_arrays_agree() -> None:
    parity = compare(EXPECTED.astype(np.float32), EXPECTED)
    assert parity.ok and parity.finite
    assert parity.max_abs <= 2.0**-23
    assert compare([0.0], [0.0]).ok


@pytest.mark.parametrize(("error", "ok"), [(9e-6, True), (1.1e-5, False)])
def test_one_wrong_element(error, ok) -> None:
    actual = EXPECTED.copy()
    actual[1, 2, 3] += error
    parity = compare(actual, EXPECTED)
    assert parity.ok is ok
    assert parity.worst == (1, 2, 3)
    assert parity.max_abs == pytest.approx(error)
    assert parity.relative_rms == pytest.approx(error / np.linalg.norm(EXPECTED))


def test_a_small_error_everywhere_is_seen() -> None:
    assert compare(EXPECTED * (1 + 1e-6), EXPECTED).ok
    parity = compare(EXPECTED * (1 + 2.4e-6), EXPECTED)
    assert parity.max_abs < TOLERANCES["float32"].max_abs
    assert not parity.ok


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1, 1e3, 1e30])
def test_scale(scale) -> None:
    """Larger values get room in proportion; smaller ones the same relative error."""
    assert compare(EXPECTED * scale * (1 + 1e-6), EXPECTED * scale).ok
    assert not compare(EXPECTED * scale * (1 + 3e-6), EXPECTED * scale).ok


def test_condition_widens_both_bounds() -> None:
    actual = EXPECTED * (1 + 1e-4)
    assert not compare(actual, EXPECTED, condition=10).ok
    assert compare(actual, EXPECTED, condition=100).ok


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["actual", "expected", "both"])
def test_what_is_not_finite_never_agrees(value, side) -> None:
    actual, expected = EXPECTED.copy(), EXPECTED.copy()
    if side != "expected":
        actual[0, 1, 2] = value
    if side != "actual":
        expected[0, 1, 2] = value
    parity = compare(actual, expected, condition=1e9)
    assert not parity.ok and not parity.finite
    assert parity.worst == (0, 1, 2)


def test_the_message_says_where_and_what() -> None:
    actual = EXPECTED.copy()
    actual[1, 0, 2] = 7
    with pytest.raises(AssertionError) as info:
        assert_parity(actual, EXPECTED, name="dense")
    message = str(info.value)
    assert message.startswith("dense: outside tolerance, shape [2, 3, 4]: max abs ")
    for part in ("at [1, 0, 2]", "actual 7.0", f"expected {float(EXPECTED[1, 0, 2])}", "1e-05"):
        assert part in message


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[3\] and \[2\]"):
        compare(np.zeros(3), np.zeros(2))
    with pytest.raises(ValueError, match="at least one element"):
        compare([], [])
    with pytest.raises(ValueError, match="condition"):
        compare([1.0], [1.0], condition=0.5)
    with pytest.raises(KeyError, match="int8"):
        compare([1.0], [1.0], "int8")
