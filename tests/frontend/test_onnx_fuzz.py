"""Damaged ONNX files import or raise one of our errors."""

from __future__ import annotations

import random

import pytest

from mega_tvm.errors import MegaError
from mega_tvm.frontend.onnx import import_onnx, load_onnx
from reference import MegaConfig
from reference.onnx_mega import build_model, inline
from reference.torch_mega import build
from tests.frontend.mutations import damaged

ROUNDS = 100
SHAPES = {"main": (1, 3, 3)}


def small_model(laplace, inlined):
    config = MegaConfig(3, hidden_size=4, ema_dim=2, num_layers=1, laplace_attention=laplace)
    model = build_model(config, build(config, seed=0).to_params())
    return inline(model) if inlined else model


CASES = {
    "softmax": small_model(False, False),
    "laplace": small_model(True, False),
    "inlined": small_model(True, True),
}


@pytest.mark.parametrize("case", CASES)
def test_damaged_files_import_or_raise(case, tmp_path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(CASES[case].SerializeToString())
    import_onnx(load_onnx(path), SHAPES)
    rng = random.Random(case)
    refused = 0
    for _ in range(ROUNDS):
        path.write_bytes(damaged(CASES[case], rng))
        try:
            import_onnx(load_onnx(path), SHAPES)
        except MegaError as error:
            refused += 1
            assert str(path) in str(error)
            assert "\n" not in str(error)
    assert refused > ROUNDS // 2
