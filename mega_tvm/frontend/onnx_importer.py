"""Walks an ONNX graph and emits Relax operators: `Importer`.

Mega's operators are those of `KERNELS`; TVM's converters do the others, one by one. Shapes are
static, so that shape arithmetic, and all else that depends on constants alone, is computed by
ONNX's reference evaluator on the way; an If then takes its branch, and a Scan is unrolled.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper
from tvm import relax
from tvm.ir.expr import GenericConst
from tvm.relax.frontend.onnx import onnx_frontend as tvm_onnx

from reference.numpy_mega import LAYER_NORM_EPS

from .. import relax_ops
from ..errors import UnsupportedModelError
from .onnx_evaluate import evaluate_all
from .onnx_file import all_nodes, clip, first_line
from .onnx_parts import KERNEL_DOMAIN, Shape

_MOST_UNROLLED = 20_000  # nodes
# Not computed ahead, even of constants.
_NOT_CONSTANT = frozenset(
    {"Bernoulli", "Dropout", "If", "Multinomial", "RandomNormal", "RandomUniform", "Scan"}
)


class Importer:
    """Walks a graph in its order; ``values`` holds what each name stands for."""

    def __init__(self, builder: relax.BlockBuilder, opset: int) -> None:
        self.opset = opset
        self.builder = builder
        self.converters = tvm_onnx._get_convert_map()
        self.values: dict[str, relax.Expr] = {}
        self.unrolled = 0

    def run(self, graph: onnx.GraphProto, name: str, entry: str, shape: Shape) -> None:
        """Add a function ``entry`` of the graph, whose input ``name`` has a static shape."""
        x = relax.Var("x", relax.TensorType(list(shape), "float32"))
        self.values[name] = x
        with self.builder.function(entry, [x]):
            with self.builder.dataflow():
                self.walk(graph)
                out = self.builder.emit_output(self.values[graph.output[0].name])
            self.builder.emit_func_output(out)

    def walk(self, graph: onnx.GraphProto) -> None:
        """Import a graph's nodes; the names of an enclosing graph stay visible."""
        for tensor in graph.initializer:
            self.values[tensor.name] = _constant(numpy_helper.to_array(tensor))
        for node in graph.node:
            inputs = [self.values[name] if name else None for name in node.input]
            try:
                with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                    warnings.simplefilter("ignore")
                    outputs = self.convert(node, inputs)
            except UnsupportedModelError:
                raise
            except Exception as error:  # TVM's converters raise whatever they meet
                raise UnsupportedModelError(
                    f"operator {clip(node.op_type)} (node {clip(node.name or node.output[0])}) "
                    f"cannot be imported: {first_line(error)}"
                ) from error
            self.values.update(zip(node.output, outputs, strict=False))

    def convert(
        self, node: onnx.NodeProto, inputs: Sequence[relax.Expr | None]
    ) -> Sequence[relax.Expr]:
        """Return what a node computes."""
        if node.domain == KERNEL_DOMAIN:
            attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
            return [KERNELS[node.op_type](self.builder.emit, attributes, *inputs)]
        if node.op_type in ("Shape", "Size"):
            inputs = [_constant(np.empty(relax_ops.shape_of(inputs[0]), np.bool_))]
        present = [x for x in inputs if x is not None]
        constant = all(isinstance(x, GenericConst) for x in present)
        if constant and node.op_type not in _NOT_CONSTANT:
            return [_constant(array) for array in self.compute(node, inputs)]
        if node.op_type == "If":
            return self.branch(node, inputs[0])
        if node.op_type == "Scan":
            return self.unroll(node, inputs)
        if node.op_type == "Gather" and isinstance(inputs[1], GenericConst):
            return [self.gather(node, inputs[0], inputs[1].value.numpy())]
        return self.by_tvm(node, inputs)

    def gather(self, node: onnx.NodeProto, x: relax.Expr, index: npt.NDArray[Any]) -> relax.Expr:
        """Take constant indices of an axis; TVM's converter would compute them at run time."""
        shape = relax_ops.shape_of(x)
        axis = next((int(a.i) for a in node.attribute if a.name == "axis"), 0) % len(shape)
        if (index < -shape[axis]).any() or (index >= shape[axis]).any():
            raise UnsupportedModelError(
                f"operator Gather (node {clip(node.name or node.output[0])}) takes index "
                f"{clip(str(index.tolist()))} of an axis of {shape[axis]}"
            )
        positive = _constant(np.where(index < 0, index + shape[axis], index))
        return self.builder.emit(relax.op.take(x, positive, axis))

    def compute(
        self, node: onnx.NodeProto, inputs: Sequence[relax.Expr | None]
    ) -> Sequence[npt.NDArray[Any]]:
        """Run a node on constants."""
        feeds = {
            name: x.value.numpy()
            for name, x in zip(node.input, inputs, strict=True)
            if x is not None
        }
        graph = helper.make_graph(
            [node],
            "constant",
            [helper.make_tensor_value_info(name, 0, None) for name in feeds],
            [helper.make_tensor_value_info(name, 0, None) for name in node.output if name],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)])
        found = evaluate_all(model, feeds)
        return [found[name] if name else np.zeros((), np.float32) for name in node.output]

    def by_tvm(
        self, node: onnx.NodeProto, inputs: Sequence[relax.Expr | None]
    ) -> Sequence[relax.Expr]:
        """Convert a node by TVM's converter."""
        attributes = tvm_onnx.ONNXGraphImporter({}, "float32")._parse_attr(node.attribute)
        attributes["tvm_custom"] = {"name": node.name, "num_outputs": len(node.output)}
        if "epsilon" in attributes:  # float32 in the file: 1e-5 is meant, not 9.99999974e-6
            attributes["epsilon"] = float(str(np.float32(attributes["epsilon"])))
        convert = self.converters[node.op_type].get_converter(self.opset)
        given = tvm_onnx.onnx_input()
        given.extend(inputs)
        found = convert(self.builder, given, attributes, [self.values, {}])
        found = self.builder.normalize(found)
        if isinstance(found, relax.Tuple):
            return [self.builder.emit(field) for field in found.fields]
        found = self.builder.emit(found)
        if isinstance(found.ty, relax.TupleType):
            count = len(found.ty.fields)
            return [self.builder.emit(relax.TupleGetItem(found, i)) for i in range(count)]
        return [found]

    def branch(self, node: onnx.NodeProto, condition: relax.Expr) -> Sequence[relax.Expr]:
        """Import the branch of an If that a constant condition takes."""
        if not isinstance(condition, GenericConst):
            raise UnsupportedModelError(
                f"operator If (node {clip(node.name)}) branches on data: only a condition that "
                "follows from shapes and weights is supported"
            )
        branches = {a.name: a.g for a in node.attribute}
        graph = branches["then_branch" if bool(condition.value.numpy()) else "else_branch"]
        self.walk(graph)
        return [self.values[output.name] for output in graph.output]

    def unroll(
        self, node: onnx.NodeProto, inputs: Sequence[relax.Expr | None]
    ) -> Sequence[relax.Expr]:
        """Import a Scan as its steps one after another."""
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        body, count = attributes["body"], int(attributes["num_scan_inputs"])
        states, sequences = list(inputs[: len(inputs) - count]), inputs[len(inputs) - count :]
        made = len(body.output) - len(states)
        in_axes = attributes.get("scan_input_axes", [0] * count)
        out_axes = attributes.get("scan_output_axes", [0] * made)
        in_back = attributes.get("scan_input_directions", [0] * count)
        out_back = attributes.get("scan_output_directions", [0] * made)
        lengths = {relax_ops.shape_of(x)[a] for x, a in zip(sequences, in_axes, strict=True)}
        steps = lengths.pop()
        self.unrolled += steps * sum(1 for _ in all_nodes(body.node))
        if lengths or self.unrolled > _MOST_UNROLLED:
            raise UnsupportedModelError(
                f"operator Scan (node {clip(node.name or node.output[0])}) would be unrolled into "
                f"more than {_MOST_UNROLLED} nodes: give a shorter sequence"
            )
        names = [value.name for value in body.input]
        rows: list[list[relax.Expr]] = [[] for _ in range(made)]
        for t in range(steps):
            taken = [
                self.row(x, int(axis), steps - 1 - t if back else t)
                for x, axis, back in zip(sequences, in_axes, in_back, strict=True)
            ]
            self.values.update(zip(names, [*states, *taken], strict=True))
            self.walk(body)
            results = [self.values[output.name] for output in body.output]
            states = results[: len(states)]
            for row, result in zip(rows, results[len(states) :], strict=True):
                row.append(result)
        outputs = []
        for row, axis, back in zip(rows, out_axes, out_back, strict=True):
            ordered = row[::-1] if back else row
            wide = [self.builder.emit(relax.op.expand_dims(x, int(axis))) for x in ordered]
            outputs.append(self.builder.emit(relax.op.concat(wide, int(axis))))
        return [*states, *outputs]

    def row(self, x: relax.Expr, axis: int, index: int) -> relax.Expr:
        """Return ``x`` at one index of an axis, without that axis."""
        if isinstance(x, GenericConst):
            return _constant(np.take(x.value.numpy(), index, axis))
        return self.builder.emit(relax.op.take(x, relax.const(index, "int64"), axis))


def _constant(array: npt.NDArray[Any]) -> GenericConst:
    values = np.asarray(array, order="C")
    return relax.const(values, str(values.dtype))


Emit = Callable[[relax.Expr], relax.Var]


def _ema_scan(emit: Emit, _: dict[str, Any], p: relax.Expr, alpha: relax.Expr) -> relax.Var:
    decay = emit(relax.op.sigmoid(alpha))
    return _ema(emit, p, decay, emit(relax.op.subtract(relax.const(1.0, "float32"), decay)))


def _identified_ema(
    emit: Emit, _: dict[str, Any], p: relax.Expr, decay: GenericConst, gain: GenericConst
) -> relax.Var:
    exact, factor = decay.value.numpy(), gain.value.numpy()
    rounded = exact.astype(np.float32)
    if np.allclose(factor, 1 - exact, rtol=1e-4, atol=1e-9):
        factor = 1 - rounded  # as the decay is rounded, so that a constant input stays itself
    return _ema(emit, p, _constant(rounded), _constant(factor.astype(np.float32)))


def _ema(emit: Emit, p: relax.Expr, decay: relax.Expr, gain: relax.Expr) -> relax.Var:
    return emit(relax_ops.ema_scan(emit(relax.op.multiply(p, gain)), decay))


def _gated_attention(emit: Emit, attributes: dict[str, Any], *operands: relax.Expr) -> relax.Var:
    width = relax_ops.shape_of(operands[0])[-1]
    laplace = bool(attributes["laplace"])
    root = 1.0 / math.sqrt(width)
    scale = 1.0 if laplace else float(attributes.get("scale", root))
    return emit(
        relax_ops.attention(
            operands,
            laplace=laplace,
            # An attribute of ONNX is float32: the usual scale is meant exactly.
            scale=root if math.isclose(scale, root, rel_tol=1e-6) and not laplace else scale,
            width=width,
            value_width=relax_ops.shape_of(operands[2])[-1],
            offsets=(0, 0, 0, 0),
        )
    )


def _axon_layer_norm(
    emit: Emit, _: dict[str, Any], x: relax.Expr, gamma: relax.Expr, beta: relax.Expr
) -> relax.Var:
    return emit(relax_ops.layer_norm(x, gamma, beta, eps=LAYER_NORM_EPS, clamp_variance=True))


KERNELS: dict[str, Callable[..., relax.Var]] = {
    "ema_scan": _ema_scan,
    "identified_ema": _identified_ema,
    "gated_attention": _gated_attention,
    "axon_layer_norm": _axon_layer_norm,
}
