"""Compiled models against the outputs of the real Edifice, and against the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest

import mega_tvm
from mega_tvm.tolerances import TOLERANCES, assert_parity
from mega_tvm.weights import load_checkpoint
from tests.compiler.models import GOLDEN

CASES = {
    "tiny": "plain",
    "tiny_laplace": "plain",
    "equal_dims": "plain",
    "odd": "plain",
    "seq1": "plain",
    "long": "plain",
    "low_variance": "axon-0.8.0",
    "low_variance_axon081": "plain",
}


def test_the_contracts_number_is_the_tables() -> None:
    assert TOLERANCES["float32"].max_abs == 1e-5


# On the other target only what differs there, in kernels and schedules, from the rest.
RUNS = [(case, "native") for case in CASES] + [
    (case, "x86-64-v3") for case in ("tiny", "tiny_laplace", "odd", "seq1", "low_variance")
]


@pytest.mark.parametrize(("case", "target"), RUNS)
def test_agrees_with_edifice(run_golden, case, target) -> None:
    y, found = run_golden(case, CASES[case], target)
    assert np.abs(found.y).max() < 4.5  # so the bounds are not scaled by much
    assert_parity(y, found.y, name="against Edifice")
    assert_parity(y, found.oracle(), name="against float64")


def test_the_wrong_layer_norm_form_would_show(run_golden) -> None:
    """The two low_variance cases differ by far more than the tolerance."""
    y, _ = run_golden("low_variance_axon081", "plain", "native")
    _, other = run_golden("low_variance", "axon-0.8.0", "native")
    assert np.abs(y - other.y).max() > 100 * TOLERANCES["float32"].max_abs


def test_the_default_model(default_case, compile_once) -> None:
    path = compile_once("default", default_case.checkpoint, target="native")
    y = mega_tvm.load(path)(default_case.x)
    assert_parity(y, default_case.y, name="against Edifice")
    assert_parity(y, default_case.oracle(), name="against float64")


def test_a_trained_checkpoint_file(compile_once) -> None:
    file = GOLDEN / "checkpoints" / "tiny_trained.nx"
    with np.load(GOLDEN / "checkpoints" / "tiny_trained.npz") as stored:
        x, y = stored["__input__"], stored["__output__"]
    batch, seq_len, _ = x.shape
    path = compile_once("tiny_trained", file, batch=batch, seq_len=seq_len)
    assert_parity(mega_tvm.load(path)(x), y)
    weights = mega_tvm.load(path).metadata["weights"]
    assert weights["kind"] == "file"
    assert weights["format"] == "nx"
    assert weights["digest"] == load_checkpoint(file).digest
