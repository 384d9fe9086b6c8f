"""Runs an ONNX model in float64, by ONNX's reference evaluator: the oracle of models from files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from .onnx_file import subgraphs

Array = npt.NDArray[Any]

# Attributes that name the type of what a node makes.
_TYPE_ATTRIBUTES = {"Cast": "to", "EyeLike": "dtype"}


def to_float64(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with float64 in the place of float32, in weights and casts too."""
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    _widen_graph(wide.graph)
    for function in wide.functions:
        _widen_nodes(function.node)
    return wide


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Return the outputs of a model that `to_float64` made."""
    with np.errstate(all="ignore"):
        outputs: list[Array] = ReferenceEvaluator(model).run(None, dict(feeds))
    return outputs


def evaluate_all(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Return every value of the main graph, by name."""
    with np.errstate(all="ignore"):
        values: dict[str, Array] = ReferenceEvaluator(model).run(
            None, dict(feeds), intermediate=True
        )
    return values


def evaluate_nodes(
    nodes: Iterable[onnx.NodeProto],
    feeds: Mapping[str, Array],
    output: str,
    like: onnx.ModelProto,
) -> Array:
    """Return what nodes make of ``feeds``, with the opsets and functions of a model."""
    graph = helper.make_graph(
        list(nodes),
        "part",
        [_untyped(name) for name in feeds],
        [_untyped(output)],
    )
    part = helper.make_model(graph, opset_imports=like.opset_import, functions=like.functions)
    part.ir_version = like.ir_version
    return evaluate(part, feeds)[0]


def _untyped(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.UNDEFINED, None)


def _widen_graph(graph: onnx.GraphProto) -> None:
    for tensor in graph.initializer:
        _widen_tensor(tensor)
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
    _widen_nodes(graph.node)


def _widen_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
    for node in nodes:
        for graph in subgraphs(node):
            _widen_graph(graph)
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                value = helper.get_attribute_value(attribute)
                tensor = numpy_helper.from_array(np.array(value, np.float32).astype(np.float64))
                attribute.CopyFrom(helper.make_attribute("value", tensor))
            elif (
                _TYPE_ATTRIBUTES.get(node.op_type) == attribute.name
                and attribute.i == TensorProto.FLOAT
            ):
                attribute.i = TensorProto.DOUBLE
        if node.op_type == "ConstantOfShape" and not node.attribute:
            zero = numpy_helper.from_array(np.zeros(1, np.float64))
            node.attribute.append(helper.make_attribute("value", zero))


def _widen_tensor(tensor: TensorProto) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        array = numpy_helper.to_array(tensor).astype(np.float64)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
