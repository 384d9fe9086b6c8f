"""Products in pairs in whole models, and what decides on them."""

from __future__ import annotations

import importlib
import json
from unittest import mock

import numpy as np
import pytest

import mega_tvm
from mega_tvm import core_probe, pipeline
from mega_tvm.targets import resolve_target
from mega_tvm.tolerances import assert_parity
from reference import numpy_mega
from tests.compiler.models import golden, mega

# The module: its package holds the pass under the same name.
PASS = importlib.import_module("mega_tvm.passes.pair_products")
# Both attention forms, odd rows, one frame, rows of nearly equal elements.
CASES = {"tiny_laplace": "plain", "odd": "plain", "seq1": "plain", "low_variance": "axon-0.8.0"}


@pytest.fixture
def everywhere():
    """Scales all layers but the first, on any machine."""
    with (
        mock.patch.object(PASS, "LEAST_SIZE", 1),
        mock.patch.object(pipeline, "pairs_pay", lambda target: True),
    ):
        yield


def _paired(path) -> int:
    kernels = mega_tvm.load(path).metadata["kernels"]
    return sum(bool(kernel["spec"] and kernel["spec"].get("paired")) for kernel in kernels)


@pytest.mark.parametrize("case", list(CASES))
def test_agrees_with_edifice(everywhere, compile_once, case) -> None:
    found = golden(case, CASES[case])
    batch, seq_len, _ = found.x.shape
    path = compile_once(f"{case}_paired", found.checkpoint, batch=batch, seq_len=seq_len)
    assert _paired(path)
    y = mega_tvm.load(path)(found.x)
    assert_parity(y, found.y, name="against Edifice")
    assert_parity(y, found.oracle(), name="against float64")
    np.testing.assert_array_equal(mega_tvm.load(path, num_threads=2)(found.x), y)


def test_the_default_model(everywhere, default_case, compile_once) -> None:
    """Every wide layer of the golden default model, on real Edifice's weights."""
    with mock.patch.object(PASS, "LEAST_SIZE", 128):
        path = compile_once("default_paired", default_case.checkpoint)
    assert _paired(path)
    y = mega_tvm.load(path)(default_case.x)
    assert_parity(y, default_case.y, name="against Edifice")
    assert_parity(y, default_case.oracle(), name="against float64")


def test_entries_streams_and_windows_share_the_weights(everywhere, tmp_path) -> None:
    model = mega(embed_dim=13, hidden_size=136, num_layers=2)
    path = mega_tvm.compile_model(
        model, batch=1, seq_len=31, output=tmp_path / "m.so", symbolic=True, stream=True
    )
    loaded = mega_tvm.load(path)
    assert _paired(path)
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    assert json.loads(path.with_suffix(".json").read_text())["tensors"]["bytes"] < 1.3 * weights
    rng = np.random.default_rng(0)
    params, config = model.to_params(), model.config
    for shape in ((1, 31, 13), (3, 9, 13)):
        x = rng.standard_normal(shape, dtype=np.float32)
        assert_parity(loaded(x), numpy_mega.forward(config, params, x), name=str(shape))
    x = rng.standard_normal((1, 31, 13), dtype=np.float32)
    stream = loaded.stream(batch=1, max_len=31)
    stream.prefill(x[:, :20])
    for t in range(20, 31):
        y = stream.step(x[:, t])
    assert_parity(y, numpy_mega.forward(config, params, x))
    window = loaded.window(1)
    for t in range(31):
        pushed = window.push(x[:, t])
    np.testing.assert_array_equal(pushed, loaded(x))


def test_machines_are_measured_once(monkeypatch) -> None:
    target = resolve_target("native").tvm_target()
    core_probe.pairs_pay.cache_clear()
    seconds = {0: 3.0, core_probe.PAIRED_ROWS: 2.0}
    monkeypatch.setattr(core_probe, "vector_unit", lambda target: mock.Mock(lanes=16))
    monkeypatch.setattr(core_probe, "_seconds", lambda target, pairs: seconds[pairs])
    assert core_probe.pairs_pay(target)
    monkeypatch.setattr(core_probe, "_seconds", mock.Mock(side_effect=AssertionError))
    assert core_probe.pairs_pay(target)
    core_probe.pairs_pay.cache_clear()
    monkeypatch.setattr(core_probe, "_seconds", lambda target, pairs: 1.0)
    assert not core_probe.pairs_pay(target)
    core_probe.pairs_pay.cache_clear()
    monkeypatch.setattr(core_probe, "vector_unit", lambda target: mock.Mock(lanes=8))
    assert not core_probe.pairs_pay(target), "AVX2"
    core_probe.pairs_pay.cache_clear()


def test_the_measurement_runs_here() -> None:
    target = resolve_target("native").tvm_target()
    if core_probe.vector_unit(target).lanes != core_probe.LANES:
        pytest.skip("this machine has no AVX-512")
    for pairs in (0, core_probe.PAIRED_ROWS):
        assert 0 < core_probe._seconds(target, pairs) < 1
