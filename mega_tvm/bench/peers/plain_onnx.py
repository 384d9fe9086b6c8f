"""The plain model as an ONNX graph, written node by node: static shapes, opset 20."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from reference.numpy_mega import ATTENTION_EPS, LAYER_NORM_EPS

from ..workloads import Workload
from .plain import Form, Plan, constants, forward, softmax_forms

OPSET = 20
IR_VERSION = 10
# What one block of rows of |q - k| may take in the Laplace form: the cache it then stays in.
DISTANCE_BYTES = {"l2": 1 << 20, "l3": 8 << 20}
MOST_DISTANCE_BLOCKS = 128  # each is a few nodes: more would take minutes to load


class Value:
    """A tensor of the graph: its name and static shape, with the arithmetic that `forward` uses."""

    def __init__(self, graph: OnnxOps, name: str, shape: Sequence[int]) -> None:
        self.graph = graph
        self.name = name
        self.shape = tuple(shape)

    def __add__(self, other: Value) -> Value:
        return self.graph.elementwise("Add", self, other)

    def __mul__(self, other: Value | float) -> Value:
        return self.graph.elementwise("Mul", self, other)

    def __matmul__(self, other: Value) -> Value:
        batch = np.broadcast_shapes(self.shape[:-2], other.shape[:-2])
        return self.graph.node("MatMul", [self, other], (*batch, self.shape[-2], other.shape[-1]))


class OnnxOps:
    """Builds a graph: each operator appends its nodes and returns the result's `Value`."""

    def __init__(self, form: Form) -> None:
        self.form = form
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, onnx.TensorProto] = {}
        self.integers: dict[tuple[int, ...], Value] = {}

    def node(
        self, op: str, inputs: Sequence[Value], shape: Sequence[int], **attributes: Any
    ) -> Value:
        """Append a node with one output of the given shape."""
        name = f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op, [value.name for value in inputs], [name], **attributes)
        )
        return Value(self, name, shape)

    def constant(self, name: str, value: npt.NDArray[Any]) -> Value:
        """Add an initializer, in float32 unless it is of integers."""
        array = value if value.dtype.kind == "i" else value.astype(np.float32)
        self.initializers[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return Value(self, name, array.shape)

    def ints(self, *values: int) -> Value:
        """Return an int64 vector, made once."""
        if values not in self.integers:
            name = f"ints{len(self.integers)}"
            self.integers[values] = self.constant(name, np.array(values, dtype=np.int64))
        return self.integers[values]

    def scalar(self, value: float) -> Value:
        """Return a float32 scalar, made once."""
        name = f"scalar_{value!r}"
        if name not in self.initializers:
            self.constant(name, np.array(value))
        return Value(self, name, ())

    def elementwise(self, op: str, left: Value, right: Value | float) -> Value:
        """Append a broadcasting operator of two operands."""
        right = right if isinstance(right, Value) else self.scalar(right)
        return self.node(op, [left, right], np.broadcast_shapes(left.shape, right.shape))

    def linear(self, x: Value, w: Value, b: Value) -> Value:
        """Return ``x @ w + b``, as MatMul and Add or as one Gemm over the rows."""
        if self.form.linear == "matmul":
            return (x @ w) + b
        rows = int(np.prod(x.shape[:-1]))
        flat = self.reshape(x, (rows, x.shape[-1]))
        y = self.node("Gemm", [flat, w, b], (rows, w.shape[-1]))
        return self.reshape(y, (*x.shape[:-1], w.shape[-1]))

    def layer_norm(self, x: Value, gamma: Value, beta: Value) -> Value:
        """Normalize the last axis."""
        inputs = [x, gamma, beta]
        return self.node("LayerNormalization", inputs, x.shape, axis=-1, epsilon=LAYER_NORM_EPS)

    def sigmoid(self, x: Value) -> Value:
        """Return ``sigmoid(x)``."""
        return self.node("Sigmoid", [x], x.shape)

    def silu(self, x: Value) -> Value:
        """Return ``x * sigmoid(x)``, a pattern that both runtimes fuse."""
        return x * self.sigmoid(x)

    def softmax(self, x: Value) -> Value:
        """Softmax over the last axis."""
        return self.node("Softmax", [x], x.shape, axis=-1)

    def split(self, x: Value, sizes: Sequence[int]) -> Sequence[Value]:
        """Split the last axis."""
        names = [f"v{len(self.nodes)}_{i}" for i in range(len(sizes))]
        inputs = [x.name, self.ints(*sizes).name]
        self.nodes.append(helper.make_node("Split", inputs, names, axis=-1))
        return [
            Value(self, name, (*x.shape[:-1], size))
            for name, size in zip(names, sizes, strict=True)
        ]

    def rows(self, x: Value, begin: int, end: int, axis: int = 1) -> Value:
        """Return a range of one axis."""
        if (begin, end) == (0, x.shape[axis]):
            return x
        shape = (*x.shape[:axis], end - begin, *x.shape[axis + 1 :])
        return self.node("Slice", [x, self.ints(begin), self.ints(end), self.ints(axis)], shape)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """Join along an axis."""
        shape = list(parts[0].shape)
        shape[axis] = sum(part.shape[axis] for part in parts)
        return self.node("Concat", parts, shape, axis=axis)

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """Reshape; nothing where the shape is the same."""
        if tuple(shape) == x.shape:
            return x
        return self.node("Reshape", [x, self.ints(*shape)], shape)

    def permute(self, x: Value, axes: Sequence[int]) -> Value:
        """Permute the axes."""
        return self.node("Transpose", [x], [x.shape[a] for a in axes], perm=list(axes))

    def pad_time(self, x: Value, count: int) -> Value:
        """Append ``count`` frames of zeros."""
        shape = (x.shape[0], count, x.shape[2])
        zeros = self.constant(f"zeros_{count}", np.zeros(shape))
        return self.concat([x, zeros], 1)

    def fused_attention(self, q: Value, k: Value, v: Value, causal: bool) -> Value:
        """Not used: neither runtime has a causal attention operator that beats the products."""
        raise NotImplementedError

    def laplace_attention(self, q: Value, k: Value, v: Value) -> Value:
        """L1-Laplace attention, the differences of a few query rows at a time."""
        B, Q, H = q.shape
        K = k.shape[1]
        fitting = DISTANCE_BYTES[self.form.attention] // (4 * B * K * H)
        size = max(1, fitting, -(-Q // MOST_DISTANCE_BLOCKS))
        keys = self.reshape(k, (B, 1, K, H))
        blocks = []
        for begin in range(0, Q, size):
            end = min(Q, begin + size)
            query = self.reshape(self.rows(q, begin, end), (B, end - begin, 1, H))
            difference = self.elementwise("Sub", query, keys)
            shape = (B, end - begin, K)
            inputs = [difference, self.ints(-1)]
            blocks.append(self.node("ReduceL1", inputs, shape, keepdims=0))
        distance = self.concat(blocks, 1) if len(blocks) > 1 else blocks[0]
        w = self.node("Reciprocal", [distance + self.scalar(1.0)], distance.shape)
        total = self.node("ReduceSum", [w, self.ints(-1)], (B, Q, 1), keepdims=1)
        return self.elementwise("Div", w @ v, total + self.scalar(ATTENTION_EPS))


def attention_forms(workload: Workload) -> Sequence[str]:
    """Return the forms of attention that suit an ONNX runtime."""
    if not workload.config.laplace_attention:
        return softmax_forms(workload)
    size = 4 * workload.batch * workload.seq_len**2 * workload.config.hidden_size
    return list(DISTANCE_BYTES) if size > DISTANCE_BYTES["l2"] else ["l2"]


def build(plan: Plan, params: Mapping[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """Return the model: input ``x`` [B, T, embed_dim], output ``y`` [B, H]."""
    ops = OnnxOps(plan.form)
    in_shape = (plan.batch, plan.seq_len, plan.config.embed_dim)
    values = {name: ops.constant(name, array) for name, array in constants(plan, params).items()}
    y = forward(ops, values, plan, Value(ops, "x", in_shape))
    y = ops.node("Identity", [y], y.shape)
    graph = helper.make_graph(
        ops.nodes,
        "mega",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, in_shape)],
        [helper.make_tensor_value_info(y.name, TensorProto.FLOAT, y.shape)],
        list(ops.initializers.values()),
    )
    opsets = [helper.make_opsetid("", OPSET)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
    return model
