"""The ema_scan kernel: parity at odd sizes, and the two ends of the decay."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.tolerances import assert_parity
from schedules.common.kernel import ScheduledKernel
from schedules.ema_scan.naive import EmaScanSpec, ema_scan
from tests.schedules.cases import ema_case, sized
from tests.schedules.harness import Kernel, run_naive, run_scheduled, scheduled


def _check(rng, target, spec: EmaScanSpec, run=run_scheduled, **decisions: int) -> None:
    case = ema_case(rng, spec)
    h = run(case.func, target, case.inputs, case.expected.shape, **decisions)
    assert_parity(h, case.expected, name=spec.name)


@sized(
    "B T D",
    [
        (1, 1, 1),
        (1, 7, 3),
        (3, 7, 40),
        (2, 59, 16),
        (1, 59, 100),
        (2, 257, 13),
        (1, 257, 257),
        (3, 257, 100),  # parallel
    ],
)
def test_parity(rng, target, B, T, D) -> None:
    _check(rng, target, EmaScanSpec(B, T, D))


@pytest.mark.parametrize("group", [1, 2, 4, 8])
@pytest.mark.parametrize("D", [13, 100], ids="D{}".format)
def test_any_decisions(rng, target, D, group) -> None:
    _check(rng, target, EmaScanSpec(2, 59, D), group=group)


def test_decay_zero_and_one(rng, target) -> None:
    """0 copies the input; 1 sums it up."""
    p = rng.integers(-8, 8, (2, 59, 2)).astype(np.float32)  # sums are exact
    decay = np.float32([0, 1])
    h = run_scheduled(ema_scan(EmaScanSpec(2, 59, 2)), target, (p, decay), p.shape)
    np.testing.assert_array_equal(h[..., 0], p[..., 0])
    np.testing.assert_array_equal(h[..., 1], p[..., 1].cumsum(axis=1))


@sized("B C D naive", [(1, 1, 16, False), (2, 7, 40, False), (3, 257, 100, False), (2, 7, 3, True)])
def test_carried_state(rng, target, B, C, D, naive) -> None:
    """Three scans that each go on where the one before ended are one scan over all."""
    case = ema_case(rng, EmaScanSpec(B, 3 * C, D))
    p, decay = case.inputs
    func = ema_scan(EmaScanSpec(B, C, D, carried=True))
    if naive:
        kernel = Kernel(ScheduledKernel(func), target, pipeline=None)
    else:
        kernel = Kernel(scheduled(func, target), target)
    state = np.full((B, EmaScanSpec(B, C, D).state_width), np.nan, np.float32)
    state[:, :D], parts = 0, []
    for part in np.split(p, 3, axis=1):
        h, (_, _, state) = kernel.update([part, decay, state], part.shape)
        parts.append(h)
    assert_parity(np.concatenate(parts, axis=1), case.expected)
    np.testing.assert_array_equal(state[:, :D], parts[-1][:, -1])
    assert np.isnan(state[:, D:]).all()


def test_naive_is_the_definition(rng, baseline) -> None:
    _check(rng, baseline, EmaScanSpec(2, 5, 3), run=run_naive)
