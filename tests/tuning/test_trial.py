"""What a trial measures: every op's operands agree with its schedules, at odd sizes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mega_tvm.tuning import trial
from mega_tvm.tuning.trial import (
    Loaded,
    WrongResultError,
    build_candidate,
    paired_times,
    task_operands,
)
from schedules.dense.naive import DenseSpec, dense
from schedules.ema_scan.naive import EmaScanSpec, ema_scan
from schedules.gated_attention.naive import GatedAttentionSpec, gated_attention
from schedules.laplace_attention.naive import LaplaceAttentionSpec, laplace_attention
from schedules.layer_norm.naive import LayerNormSpec, layer_norm
from tests.tuning.builders import kernel_of

SIZES = {"batch": 2, "q_len": 7, "k_len": 7, "width": 40, "value_width": 24}
SPLIT = {"q_stride": 40, "k_stride": 40, "v_stride": 24}
# Values and gate stand in one tensor, with columns before and between.
MERGED = {"q_stride": 43, "k_stride": 41, "v_stride": 60, "gate_stride": 60}
OFFSETS = {"q_offset": 2, "k_offset": 1, "v_offset": 3, "gate_offset": 30}

FUNCTIONS = {
    "dense": dense(DenseSpec((1, 59), 13, 40)),
    "dense-one-row": dense(DenseSpec((1, 1), 57, 23)),
    "dense-residual": dense(DenseSpec((2, 7), 40, 40, residual=True)),
    "dense-swiglu": dense(DenseSpec((1, 7), 40, 2 * 23, swiglu=True)),
    "dense-sigmoid": dense(DenseSpec((1, 7), 40, 57, sigmoid_from=16)),
    "layer_norm": layer_norm(LayerNormSpec((1, 7), 40, 1e-5)),
    "layer_norm-plain": layer_norm(LayerNormSpec((3,), 23, 1e-5, affine=False)),
    "layer_norm-clamped": layer_norm(LayerNormSpec((2, 7), 40, 1e-5, clamp_variance=True)),
    "ema_scan": ema_scan(EmaScanSpec(2, 59, 3)),
    "gated": gated_attention(GatedAttentionSpec(**SIZES, **MERGED, **OFFSETS, scale=0.2)),
    "gated-ungated": gated_attention(GatedAttentionSpec(**SIZES, **SPLIT)),
    "gated-last-row": gated_attention(GatedAttentionSpec(**{**SIZES, "q_len": 1}, **SPLIT)),
    "laplace": laplace_attention(LaplaceAttentionSpec(**SIZES, **MERGED, **OFFSETS)),
    "laplace-ungated": laplace_attention(LaplaceAttentionSpec(**SIZES, **SPLIT)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_hand_schedule_is_right_and_has_a_time(name) -> None:
    kernel = kernel_of(FUNCTIONS[name], name)
    operands = task_operands(kernel.task)
    candidate = build_candidate(kernel.task, kernel.space.hand, operands)
    assert 0 < Loaded.here(candidate, operands).measure(0.001) < 1


@pytest.mark.parametrize("name", ["dense", "gated", "layer_norm-clamped", "ema_scan"])
def test_a_wrong_expectation_is_noticed(name) -> None:
    kernel = kernel_of(FUNCTIONS[name], name)
    right = task_operands(kernel.task)
    expected = right.expected.copy()
    expected.flat[-1] += 1e-3
    candidate = build_candidate(kernel.task, kernel.space.hand, right)
    with pytest.raises(WrongResultError, match="outside tolerance"):
        Loaded.here(candidate, dataclasses.replace(right, expected=expected)).check()


def test_every_call_reads_other_weights() -> None:
    kernel = kernel_of(FUNCTIONS["dense"])
    operands = task_operands(kernel.task)
    candidate = build_candidate(kernel.task, kernel.space.hand, operands)
    weights = candidate.arguments[-1]
    assert weights.nbytes >= trial.COLD_BYTES
    assert weights.nbytes % candidate.calls == 0
    # The output is that of the last call: spoiling the last copy must show, the first must not.
    slot = weights.nbytes // candidate.calls
    weights[:4] = np.frombuffer(np.float32(9).tobytes(), np.uint8)
    Loaded.here(candidate, operands).check()
    weights[-slot : -slot + 4] = np.frombuffer(np.float32(9).tobytes(), np.uint8)
    with pytest.raises(WrongResultError):
        Loaded.here(candidate, operands).check()


def test_every_call_counts() -> None:
    """A kernel so small that LLVM sees all of it: without a barrier it runs the last call alone."""
    kernel = kernel_of(dense(DenseSpec((1, 7), 3, 40)))
    operands = task_operands(kernel.task)
    candidate = build_candidate(kernel.task, kernel.space.hand, operands)
    # 7 rows of 40 columns are at least 7 stores of 160 bytes: not done in a nanosecond
    assert Loaded.here(candidate, operands).measure(0.01) > 2e-9


def test_a_pair_tells_which_is_faster() -> None:
    """A kernel of sixteen times the work against another of the same shape of output."""
    slow, fast = (kernel_of(dense(DenseSpec((1, 7), k, 40)), f"k{k}") for k in (640, 40))
    loaded = []
    for kernel in (slow, fast):
        operands = task_operands(kernel.task)
        candidate = build_candidate(kernel.task, kernel.space.hand, operands)
        loaded.append(Loaded.here(candidate, operands))
    first, second, ratio, low = paired_times(*loaded, rounds=5, budget_s=0.05)
    assert first > second
    assert ratio > 2
    assert low <= ratio
