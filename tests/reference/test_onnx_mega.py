"""The exported ONNX model: valid, and equal to the oracle in every runtime that is here."""

from __future__ import annotations

import functools
import json

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from mega_tvm.tolerances import assert_parity
from reference import MegaConfig, numpy_mega
from reference.onnx_mega import CONFIG_KEY, build_model, inline

LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
FORM = pytest.mark.parametrize("form", ["plain", "axon-0.8.0"])
SHAPES = [(1, 1), (2, 7), (3, 60), (1, 64), (2, 65), (1, 257)]


def small_config(laplace=False, form="plain"):
    return MegaConfig(
        13, hidden_size=40, ema_dim=3, num_layers=2, laplace_attention=laplace, layer_norm=form
    )


@functools.cache
def session(model_bytes):
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    run = ort.InferenceSession(model_bytes, options, providers=["CPUExecutionProvider"]).run
    return lambda x: run(None, {"x": x})[0]


@functools.cache
def openvino_request(model_bytes):
    ov = pytest.importorskip("openvino")
    core = ov.Core()
    settings = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    model = core.compile_model(core.read_model(model_bytes), "CPU", settings)
    return lambda x: model(x)[0]


# OpenVINO's importer does not expand functions: it runs the inlined form.
RUNTIMES = {
    "onnxruntime": (session, lambda model: model),
    "onnxruntime_inlined": (session, inline),
    "openvino_inlined": (openvino_request, inline),
}
RUNTIME = pytest.mark.parametrize("runtime", RUNTIMES)


def runner(runtime, model):
    make, form = RUNTIMES[runtime]
    return make(form(model).SerializeToString(deterministic=True))


@LAPLACE
@FORM
@RUNTIME
def test_agrees_at_every_size_from_one_file(runtime, laplace, form, random_params) -> None:
    config = small_config(laplace, form)
    params = random_params(config, dtype=np.float32)
    run = runner(runtime, build_model(config, params))
    for batch, length in SHAPES:
        x = np.random.default_rng(length).standard_normal((batch, length, 13), dtype=np.float32)
        expected = numpy_mega.forward(config, params, x)
        assert_parity(run(x), expected, name=f"{batch}x{length}")


@RUNTIME
def test_agrees_with_edifice(runtime, golden) -> None:
    run = runner(runtime, build_model(golden.config, golden.params))
    assert_parity(run(golden.x), golden.output, name="against Edifice")


@RUNTIME
def test_long_sequences_and_extreme_decays(runtime, random_params) -> None:
    """Decays from 0 to 1 - 4e-6: a power that is divided by would be infinite or not a number."""
    config = MegaConfig(5, hidden_size=8, ema_dim=6, num_layers=1)
    params = random_params(config, dtype=np.float32)
    alpha = np.array([-100, -30, -1, 3, 9, 12.5], np.float32)
    params["mega_block_1_ema/mega_block_1_ema_alpha"] = alpha
    x = np.random.default_rng(0).standard_normal((1, 2500, 5), dtype=np.float32)
    y = runner(runtime, build_model(config, params))(x)
    assert_parity(y, numpy_mega.forward(config, params, x))


@LAPLACE
@FORM
def test_is_valid(laplace, form, random_params) -> None:
    config = small_config(laplace, form)
    called = build_model(config, random_params(config))
    for model in (called, inline(called)):
        onnx.checker.check_model(model, full_check=True)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
        opset = next(o.version for o in model.opset_import if o.domain == "")
        assert opset >= 17
        dims = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
        assert dims == ["batch", "seq_len", 13]
    props = {p.key: p.value for p in build_model(config, {}).metadata_props}
    assert MegaConfig.from_dict(json.loads(props[CONFIG_KEY])) == config


@LAPLACE
@FORM
def test_functions_are_named_as_the_torch_operators(laplace, form) -> None:
    import torch

    import reference.ops  # noqa: F401  (registers them)

    model = build_model(small_config(laplace, form), {})
    for function in model.functions:
        assert function.domain == "mega"
        assert hasattr(torch.ops.mega, function.name)
        assert {node.domain for node in function.node} == {""}
    counts = {"ema_scan": 2, "gated_attention": 2, "axon_layer_norm": 7}
    if form == "plain":
        del counts["axon_layer_norm"]
    called = [node.op_type for node in model.graph.node if node.domain == "mega"]
    assert {name: called.count(name) for name in set(called)} == counts
    flat = inline(model)
    assert not flat.functions
    assert {node.domain for node in flat.graph.node} == {""}
    assert [opset.domain for opset in flat.opset_import] == [""]


@LAPLACE
def test_no_value_grows_with_length_squared_times_width(laplace, random_params) -> None:
    config = small_config(laplace)
    model = inline(build_model(config, random_params(config)))
    length = 97
    x = np.zeros((1, length, 13), np.float32)
    values = ReferenceEvaluator(model).run(None, {"x": x}, intermediate=True)
    largest = max(np.size(value) for value in values.values())
    assert largest < 4 * length**2  # scores, and 4 rows of differences; not length^2 * width
