"""Weights from .onnx files: only of a file that holds exactly the Mega that it names."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper, numpy_helper

from mega_tvm.weights import WeightsError
from reference.onnx_mega import build_model
from tests.weights.builders import CONFIG, small_params

PARAMS = small_params()


def model():
    return build_model(CONFIG, PARAMS)


def initializer(m, name):
    return next(tensor for tensor in m.graph.initializer if tensor.name == name)


def other_attribute(m):
    next(n for n in m.graph.node if n.op_type == "Gather").attribute[0].i = 0


def other_operator(m):
    next(n for n in m.graph.node if n.op_type == "Sigmoid").op_type = "Tanh"


def swapped(m):
    node = next(n for n in m.graph.node if n.op_type == "gated_attention")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def other_body(m):
    next(n for n in m.functions[0].node if n.op_type == "Atanh").op_type = "Tan"


def other_options(m):
    m.metadata_props[0].value = m.metadata_props[0].value.replace("false", "true")


def many_layers(m):
    text = m.metadata_props[0].value
    m.metadata_props[0].value = text.replace('"num_layers": 1', '"num_layers": 999999999')


def head(m):
    m.graph.node.append(helper.make_node("Relu", ["y"], ["z"]))
    m.graph.output[0].name = "z"


@pytest.mark.parametrize(
    "change",
    [other_attribute, other_operator, swapped, other_body, other_options, many_layers, head],
)
def test_a_graph_that_is_not_the_exporters_is_refused(change, load_bytes) -> None:
    m = model()
    change(m)
    with pytest.raises(WeightsError, match=r"the graph is not the one .* with --model"):
        load_bytes(m.SerializeToString(), ".onnx")


def no_metadata(m):
    del m.metadata_props[:]


def bad_json(m):
    m.metadata_props[0].value = "{"


def bad_option(m):
    m.metadata_props[0].value = '{"embed_dim": 3, "hiden_size": 4}'


def twice(m):
    m.graph.initializer.append(m.graph.initializer[0])


def short(m):
    tensor = initializer(m, "final_norm/gamma")
    tensor.raw_data = tensor.raw_data[:-4]


def integers(m):
    value = numpy_helper.from_array(np.ones(4, np.int32), "final_norm/gamma")
    initializer(m, "final_norm/gamma").CopyFrom(value)


def external(m):
    tensor = initializer(m, "final_norm/gamma")
    tensor.ClearField("raw_data")
    tensor.data_location = 1
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"


def missing(m):
    m.graph.initializer.remove(initializer(m, "final_norm/gamma"))


def not_finite(m):
    value = numpy_helper.from_array(np.full(4, np.nan, np.float32), "final_norm/gamma")
    initializer(m, "final_norm/gamma").CopyFrom(value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (no_metadata, "without mega_config in its metadata"),
        (bad_json, "is not valid JSON"),
        (bad_option, "Did you mean 'hidden_size'"),
        (twice, "stands twice"),
        (short, "holds 12 bytes of raw data; its shape [4] of float32 takes 16"),
        (integers, "is of ONNX type 6; expected a float type"),
        (external, "lies in an external data file"),
        (missing, "missing tensors: final_norm/gamma"),
        (not_finite, "not finite"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_malformed_files(change, words, load_bytes) -> None:
    m = model()
    change(m)
    with pytest.raises(WeightsError) as error:
        load_bytes(m.SerializeToString(), ".onnx")
    assert words in str(error.value)


@pytest.mark.parametrize("content", [b"\x08", b"not an ONNX file", bytes(100)])
def test_what_is_no_onnx_file(content, load_bytes) -> None:
    with pytest.raises(WeightsError):
        load_bytes(content, ".onnx")


def test_a_truncated_file(load_bytes) -> None:
    content = model().SerializeToString()
    assert load_bytes(content, ".onnx").params.keys() == PARAMS.keys()
    for cut in range(1, 40):
        with pytest.raises(WeightsError):
            load_bytes(content[: -37 * cut], ".onnx")
