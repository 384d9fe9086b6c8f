from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from mega_tvm import verification
from mega_tvm.verification import prepare, run
from mega_tvm.verify_inputs import INPUTS, ORDINARY, float32_error, meets_jump
from reference import MegaConfig, numpy_mega
from tests.verify.conftest import golden_npz

CONFIG = MegaConfig(embed_dim=8, hidden_size=8, ema_dim=2, num_layers=1)


@pytest.fixture(scope="module")
def params():
    from mega_tvm.model_source import resolve_model

    return resolve_model(CONFIG, seed=0).checkpoint.params


@pytest.mark.parametrize("name", INPUTS)
def test_inputs(name):
    x = INPUTS[name]((2, 5, 8))
    assert x.shape == (2, 5, 8)
    assert x.dtype == np.float32
    assert x.flags.c_contiguous
    np.testing.assert_array_equal(x, INPUTS[name]((2, 5, 8)))


def test_low_variance_lies_below_eps():
    assert INPUTS["low variance"]((2, 5, 64)).var(axis=-1).max() < numpy_mega.LAYER_NORM_EPS / 3


def test_rows_of_large_mean_amplify_rounding(params):
    """A layer norm that subtracts a mean of 1000 from values that differ by 1 loses 10 bits."""
    x = INPUTS[ORDINARY]((1, 5, 8))
    usual, shifted = (
        float32_error(CONFIG, params, rows, numpy_mega.forward(CONFIG, params, rows))
        for rows in (x, x + np.float32(1000))
    )
    assert 1e-8 < usual < 1e-6
    assert 30 < shifted / usual < 10000


@pytest.mark.parametrize(
    ("form", "variance", "meets"),
    [
        ("axon-0.8.0", 1e-5, True),
        ("axon-0.8.0", 1.01e-5, False),
        ("axon-0.8.0", 0.0, False),
        ("plain", 1e-5, False),
    ],
)
def test_jump_of_the_layer_norm(form, variance, meets):
    config = dataclasses.replace(CONFIG, layer_norm=form)
    x = np.tile([1.0, -1.0], (1, 5, 4)) * np.sqrt(variance)
    assert meets_jump(config, x, {"mega_block_1_ema_residual": x + np.arange(8)}) is meets


def test_condition_is_measured_and_told(unfused, monkeypatch):
    """Inputs that lose bits in the first norm pass at widened bounds, which are reported."""
    inputs = {
        ORDINARY: INPUTS[ORDINARY],
        "shifted": lambda shape: INPUTS[ORDINARY](shape) + np.float32(1000),
    }
    monkeypatch.setattr(verification, "INPUTS", inputs)
    report = run(prepare(unfused))
    assert report.ok
    for check in report.checks:
        if check.case == ORDINARY:
            assert (check.condition, check.reason) == (1, "")
        else:
            assert 30 < check.condition < 10000
            assert "amplify rounding" in check.reason
            assert check.parity.bounds.relative_rms == pytest.approx(2e-6 * check.condition)


def test_inputs_beyond_float32_are_left_out(unfused, monkeypatch):
    """Squares of 1e30 overflow: no bound would tell a right kernel from a wrong one."""
    huge = {
        ORDINARY: INPUTS[ORDINARY],
        "huge": lambda shape: INPUTS[ORDINARY](shape) * np.float32(1e30),
    }
    monkeypatch.setattr(verification, "INPUTS", huge)
    report = run(prepare(unfused))
    assert report.ok
    assert [check.case for check in report.checks] == [ORDINARY, ORDINARY]
    assert [skipped.case for skipped in report.skipped] == ["huge", "huge"]
    assert "float32 is not enough" in report.skipped[0].reason


def test_rows_at_the_jump_are_left_out(artifact, monkeypatch):
    subject = prepare(artifact("low_variance", layer_norm="axon-0.8.0"))

    def at_eps(shape):
        row = np.tile(np.float32([1, -1]), shape[-1] // 2) * np.float32(np.sqrt(1e-5))
        return np.broadcast_to(row, shape).copy()

    monkeypatch.setattr(verification, "INPUTS", {ORDINARY: INPUTS[ORDINARY], "at eps": at_eps})
    report = run(subject)
    assert [(skipped.case, skipped.entry) for skipped in report.skipped] == [("at eps", "main")]
    assert "layer norm jumps" in report.skipped[0].reason
    assert "at eps" not in [check.case for check in report.checks]


def test_golden_names_are_beside_weights():
    from mega_tvm.verify_inputs import has_golden

    assert has_golden(golden_npz("tiny"))
    assert not has_golden(golden_npz("tiny_pristine_init"))
