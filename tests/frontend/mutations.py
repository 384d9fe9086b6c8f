"""Damages ONNX models: bytes of the file, and fields of the model."""

from __future__ import annotations

import random

import onnx
from onnx import TensorProto

from tests.weights.test_fuzz import mutate

SIZES = (-(2**63), -1, 0, 1, 2, 3, 7, 64, 65, 2**16, 2**31, 2**40, 2**63 - 1)
OPERATORS = (
    "Add", "Cast", "Concat", "ConstantOfShape", "Conv", "CumSum", "Expand", "Flatten", "Gather",
    "Gemm", "If", "Loop", "MatMul", "MaxPool", "NonZero", "OneHot", "Pad", "Range", "ReduceSum",
    "Reshape", "Resize", "Scan", "Shape", "Slice", "Softmax", "Split", "Squeeze", "Tile", "TopK",
    "Transpose", "Trilu", "Unsqueeze", "Where", "Nonsense", "",
)  # fmt: skip


def nodes_of(model):
    groups = [model.graph.node, *(function.node for function in model.functions)]
    for group in list(groups):
        for node in group:
            groups.extend(a.g.node for a in node.attribute if a.HasField("g"))
    return [group for group in groups if len(group)]


def bend(model: onnx.ModelProto, rng: random.Random) -> None:
    """Change one field of a model in place."""
    group = rng.choice(nodes_of(model))
    node = rng.choice(group)
    names = [name for other in group for name in (*other.input, *other.output)] + ["", "\x00", "?"]
    tensor = rng.choice(model.graph.initializer)
    dims = rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.shape.dim
    kind = rng.randrange(17)
    if kind == 0:
        node.op_type = rng.choice(OPERATORS)
    elif kind == 1 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif kind == 2:
        node.output[0] = rng.choice(names)
    elif kind == 3:
        group.remove(node)
    elif kind == 4:
        group.append(node)
    elif kind == 5:
        node.domain = rng.choice(("mega", "", "ai.onnx", "com.microsoft", "mega_tvm.kernel"))
    elif kind == 6 and node.input:
        del node.input[rng.randrange(len(node.input))]
    elif kind == 7 and node.attribute:
        _bend_attribute(rng.choice(node.attribute), rng)
    elif kind == 8 and node.attribute:
        del node.attribute[rng.randrange(len(node.attribute))]
    elif kind == 9 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(SIZES)
    elif kind == 10:
        tensor.data_type = rng.randrange(25)
    elif kind == 11:
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]
    elif kind == 12 and dims:
        dims[rng.randrange(len(dims))].dim_value = rng.choice(SIZES)
    elif kind == 13:
        rng.choice(model.graph.input).type.tensor_type.elem_type = rng.randrange(25)
    elif kind == 14:
        rng.choice(model.opset_import).version = rng.choice((-1, 0, 1, 7, 12, 13, 18, 26, 999))
    elif kind == 15:
        tensor.data_location = TensorProto.EXTERNAL
        entry = tensor.external_data.add()
        entry.key = rng.choice(("location", "offset", "length"))
        entry.value = rng.choice(("/etc/passwd", "../x", "", ".", "m.onnx", "9" * 30, "-1", "\x00"))
    elif kind == 16:
        tensor.name = rng.choice(names)


def _bend_attribute(attribute: onnx.AttributeProto, rng: random.Random) -> None:
    if attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice(SIZES)
    elif attribute.HasField("t") and attribute.t.dims:
        attribute.t.dims[0] = rng.choice(SIZES)
    elif attribute.type == onnx.AttributeProto.INT:
        attribute.i = rng.choice(SIZES)
    elif attribute.type == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice((0.0, -1.0, float("nan"), float("inf"), 1e38))
    else:
        attribute.type = rng.randrange(15)


def damaged(model: onnx.ModelProto, rng: random.Random) -> bytes:
    """Return a damaged file: of the model's fields three times in four, else of its bytes."""
    if rng.random() < 0.25:
        return mutate(model.SerializeToString(), rng)
    bent = onnx.ModelProto()
    bent.CopyFrom(model)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        bend(bent, rng)
    return bent.SerializeToString()
