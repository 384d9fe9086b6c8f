"""ONNX models for the tests of the frontend: exported, surrounded, bent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import torch
from onnx import TensorProto, compose, helper, numpy_helper
from torch import nn

from mega_tvm.frontend.onnx import import_onnx, load_onnx
from reference.onnx_mega import build_model, inline
from tests.compiler.models import mega
from tests.passes.harness import Graph

B, T, EMBED, WIDTH = 2, 5, 13, 16
SHAPE = (B, T, EMBED)


def exported(module, *, inlined=False):
    model = build_model(module.config, module.to_params())
    return inline(model) if inlined else model


def saved(model, folder, name="m.onnx") -> Path:
    path = folder / name
    path.write_bytes(model.SerializeToString())
    return path


def operators(path, shape=SHAPE):
    """Import a file; return how often each Relax operator stands in it, and the notes."""
    mod, notes = import_onnx(load_onnx(path), {"main": shape})
    names = (str(call.op.name).removeprefix("relax.") for call in Graph(mod["main"]))
    return Counter(names), notes


def linear(name, layer):
    weights = (layer.weight.detach().numpy().T, layer.bias.detach().numpy())
    names = [f"{name}_w", f"{name}_b"]
    return [
        numpy_helper.from_array(np.ascontiguousarray(value), key)
        for key, value in zip(names, weights, strict=True)
    ]


def part(nodes, x, y, initializers=()):
    """Return a model of opset 17 that `compose.merge_models` can join to an exported one."""
    graph = helper.make_graph(
        nodes,
        "part",
        [helper.make_tensor_value_info(x[0], TensorProto.FLOAT, x[1])],
        [helper.make_tensor_value_info(y[0], TensorProto.FLOAT, y[1])],
        list(initializers),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def head():
    """Return a head as a torch module and as an ONNX model, ``h`` to ``action``."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(WIDTH, 24), nn.Tanh(), nn.Linear(24, 6), nn.Softmax(-1))
    nodes = [
        helper.make_node("Gemm", ["h", "first_w", "first_b"], ["first"]),
        helper.make_node("Tanh", ["first"], ["squashed"]),
        helper.make_node("MatMul", ["squashed", "last_w"], ["product"]),
        helper.make_node("Add", ["product", "last_b"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["action"], axis=-1),
    ]
    weights = linear("first", module[0]) + linear("last", module[2])
    return module, part(nodes, ("h", ["batch", WIDTH]), ("action", ["batch", 6]), weights)


def front():
    """Return layers ahead of a Mega as a torch module and as an ONNX model."""
    torch.manual_seed(1)
    module = nn.Sequential(nn.Linear(9, EMBED), nn.LayerNorm(EMBED))
    norm = [
        numpy_helper.from_array(value.detach().numpy(), name)
        for name, value in zip(("gamma", "beta"), module[1].parameters(), strict=True)
    ]
    nodes = [
        helper.make_node("MatMul", ["frames", "in_w"], ["in_product"]),
        helper.make_node("Add", ["in_product", "in_b"], ["projected"]),
        helper.make_node("LayerNormalization", ["projected", "gamma", "beta"], ["embedded"]),
    ]
    x, y = ("frames", ["batch", "seq_len", 9]), ("embedded", ["batch", "seq_len", EMBED])
    return module, part(nodes, x, y, linear("in", module[0]) + norm)


def with_head(*, inlined=False):
    """Return a Mega with a head, as a torch module and as an ONNX model."""
    body, (module, model) = mega(), head()
    joined = compose.merge_models(exported(body, inlined=inlined), model, io_map=[("y", "h")])
    return nn.Sequential(body, module), joined


def surrounded(*, inlined=False):
    """Return a Mega between other layers, as a torch module and as an ONNX model."""
    ahead, first = front()
    module, joined = with_head(inlined=inlined)
    return nn.Sequential(ahead, *module), compose.merge_models(
        first, joined, io_map=[("embedded", "x")]
    )


def node_of(model, op_type):
    return next(node for node in model.graph.node if node.op_type == op_type)


def function_node(model, function, op_type):
    body = next(f for f in model.functions if f.name == function)
    return next(node for node in body.node if node.op_type == op_type)
