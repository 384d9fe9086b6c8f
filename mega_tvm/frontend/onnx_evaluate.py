"""Runs an ONNX model in float64, by ONNX's reference evaluator: the oracle of models from files.

A file may ask for more than any memory holds by a single number, which shape inference does not
always see. So each node is looked at before it runs, once its inputs are known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from ..errors import ModelFileError
from .onnx_file import STANDARD, clip, subgraphs

Array = npt.NDArray[Any]

# Elements that a run may make which only looks at a model: seconds at most.
PROBE_BUDGET = 2.0**28
_MOST_ELEMENTS = 2**27
_MOST_STEPS = 2**14
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


class TooLongError(Exception):
    """A run would make more elements than it was allowed."""


def evaluate(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> list[Array]:
    """Return the outputs of a model.

    Raises
    ------
    ModelFileError
        If a node would make more than any model needs; else whatever the evaluator raises.
    """
    values = evaluate_all(model, feeds)
    return [values[output.name] for output in model.graph.output]


def evaluate_all(
    model: onnx.ModelProto, feeds: Mapping[str, Array], budget: float = math.inf
) -> dict[str, Array]:
    """Return every value of the main graph, by name; raises as `evaluate` does.

    Raises
    ------
    TooLongError
        If all nodes together would make more than ``budget`` elements.
    """
    inline = any(node.domain not in STANDARD for node in model.graph.node)
    flat = onnx.inliner.inline_local_functions(model) if inline else model
    run = _Run(budget)
    with np.errstate(all="ignore"):
        return run.walk(ReferenceEvaluator(flat), dict(feeds))


class _Run:
    """One run of a model, which counts what it makes."""

    def __init__(self, budget: float) -> None:
        self.left = budget

    def walk(self, evaluator: ReferenceEvaluator, outer: dict[str, Any]) -> dict[str, Any]:
        """Run the nodes of a graph, with the values that it sees; return those and its own."""
        values = {**outer, "": None, **evaluator.rt_inits_}
        for node in evaluator.rt_nodes_:
            inputs = [values[name] for name in node.input]
            _check_cost(node.onnx_node, inputs)
            if node.op_type == "If":
                branch = node.then_branch if bool(np.all(inputs[0])) else node.else_branch
                found = self.walk(branch, values)
                outputs = [found[name] for name in branch.output_names]
            elif node.op_type == "Scan":
                outputs = self.scan(node, inputs, values)
            else:
                context = {"context": values} if node.need_context() else {}
                outputs = node.run(*inputs, **context)
            self.left -= sum(np.size(x) for x in outputs)
            if self.left < 0:
                raise TooLongError
            values.update(zip(node.output, outputs, strict=False))
        return values

    def scan(self, node: Any, inputs: Sequence[Array], outer: dict[str, Any]) -> list[Array]:
        """Run a Scan along axis 0, forward: what the evaluator knows, which checks the rest."""
        body, count = node.body, node.num_scan_inputs
        for name in ("input_axes", "output_axes", "input_directions", "output_directions"):
            if any(getattr(node, f"scan_{name}", None) or ()):
                return list(node.run(*inputs, context=outer))
        states, sequences = list(inputs[:-count]), inputs[-count:]
        rows: list[list[Array]] = [[] for _ in body.output_names[len(states) :]]
        for step in zip(*sequences, strict=True):
            found = self.walk(
                body, {**outer, **dict(zip(body.input_names, [*states, *step], strict=True))}
            )
            results = [found[name] for name in body.output_names]
            states = results[: len(states)]
            for row, result in zip(rows, results[len(states) :], strict=True):
                row.append(result)
        return [*states, *(np.stack(row) for row in rows)]


def _check_cost(node: onnx.NodeProto, inputs: Sequence[Any]) -> None:
    """Refuse a node whose result would be absurdly large, or that would not end.

    Raises
    ------
    ModelFileError
    """
    arrays = [x for x in inputs if isinstance(x, np.ndarray)]
    try:
        count = _made(node.op_type, arrays)
    except (ValueError, TypeError, IndexError, OverflowError, ZeroDivisionError):
        return  # it does not run anyway: the evaluator says why
    most = _MOST_STEPS if node.op_type in ("Loop", "Scan") else _MOST_ELEMENTS
    if count > most:
        raise ModelFileError(
            f"operator {clip(node.op_type)} (node {clip(node.name or node.output[0])}) would make "
            f"{count:.3g} {'steps' if most == _MOST_STEPS else 'elements'}; at most {most} are run"
        )


def _made(op: str, arrays: Sequence[Array]) -> float:
    """Return how many elements, or steps of a loop, a node makes of its inputs, if many."""
    if op == "Scan":
        return float(arrays[-1].shape[0])
    if op == "Loop":
        return float(arrays[0].item())
    if op == "Range":
        start, limit, step = (float(x.item()) for x in arrays)
        return (limit - start) / step
    if op == "ConstantOfShape":
        return math.prod(map(float, arrays[0]))
    if op == "Expand":
        return float(arrays[0].size) * math.prod(max(1.0, float(n)) for n in arrays[1])
    if op == "Tile":
        return float(arrays[0].size) * math.prod(map(float, arrays[1]))
    if op == "Pad":
        pads, rank = [float(n) for n in arrays[1]], arrays[0].ndim
        if len(pads) != 2 * rank:  # of some axes
            return math.prod(n + sum(map(abs, pads)) for n in arrays[0].shape)
        around = zip(arrays[0].shape, pads[:rank], pads[rank:], strict=True)
        return math.prod(n + before + after for n, before, after in around)
    if op == "OneHot":
        return float(arrays[0].size) * float(arrays[1].item())
    if op == "MatMul":
        a, b = (x.shape for x in arrays)
        return math.prod(map(float, np.broadcast_shapes(a[:-2], b[:-2]))) * float(a[-2] * b[-1])
    if len(arrays) > 1:
        return math.prod(map(float, np.broadcast_shapes(*(x.shape for x in arrays))))
    return 0.0


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
    return evaluate_all(part, feeds, PROBE_BUDGET)[output]


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
