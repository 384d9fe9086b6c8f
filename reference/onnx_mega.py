"""Mega as an ONNX model: standard operators, and Mega's own as functions with standard bodies.

Batch and length are symbolic. Initializers have Axon's names (``layer/param``), a layer's value
the layer's, and the metadata holds the config, so that a reader gets the checkpoint back from the
file. `inline` replaces the functions by their bodies, for runtimes that do not expand functions
(OpenVINO 2026.4 is one).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper

from . import onnx_functions
from .config import MegaConfig
from .numpy_mega import LAYER_NORM_EPS
from .onnx_functions import DOMAIN, OPSET, VERSION

__all__ = ["CONFIG_KEY", "build_model", "inline"]

CONFIG_KEY = "mega_config"
IR_VERSION = 8  # what opset 17 came with: the oldest runtimes that know the opset take it
PRODUCER = "mega_tvm"
BATCH, LENGTH = "batch", "seq_len"


def build_model(config: MegaConfig, params: Mapping[str, npt.NDArray[Any]]) -> onnx.ModelProto:
    """Return the model: ``x`` [batch, seq_len, embed_dim] to ``y`` [batch, hidden_size], float32.

    Parameters
    ----------
    config : MegaConfig
    params : mapping of str to array
        Every parameter under its Axon name; written as float32. Without any, the graph alone is
        returned, which a reader compares with a file's.
    """
    functions = [
        onnx_functions.ema_scan(),
        onnx_functions.gated_attention(config.laplace_attention),
    ]
    if config.layer_norm == "axon-0.8.0":
        functions.append(onnx_functions.axon_layer_norm())
    x_type = helper.make_tensor_value_info(
        "x", TensorProto.FLOAT, [BATCH, LENGTH, config.embed_dim]
    )
    y_type = helper.make_tensor_value_info("y", TensorProto.FLOAT, [BATCH, config.hidden_size])
    graph = helper.make_graph(
        list(_nodes(config)),
        "mega",
        [x_type],
        [y_type],
        [
            numpy_helper.from_array(np.ascontiguousarray(value, "<f4"), name)
            for name, value in params.items()
        ],
    )
    model = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid(DOMAIN, VERSION)],
        ir_version=IR_VERSION,
        producer_name=PRODUCER,
        functions=functions,
    )
    helper.set_model_props(model, {CONFIG_KEY: json.dumps(config.to_dict())})
    return model


def inline(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with every function replaced by its body: standard operators alone."""
    flat = onnx.inliner.inline_local_functions(model)
    del flat.opset_import[:]
    flat.opset_import.extend(o for o in model.opset_import if o.domain != DOMAIN)
    return flat


def _nodes(config: MegaConfig) -> Iterator[onnx.NodeProto]:
    """Yield the graph's nodes in order; what a node computes is named after its layer."""
    x = "x"
    if config.has_input_projection:
        yield from _dense("input_projection", x)
        x = "input_projection"
    for i in range(1, config.num_layers + 1):
        block = f"mega_block_{i}"
        yield from _block(config, block, x)
        x = f"{block}_ffn_residual"
    yield from _norm(config, "final_norm", x)
    yield _node("Constant", [], "last_index", value_int=-1)
    yield _node("Gather", ["final_norm", "last_index"], "y", axis=1)


def _block(config: MegaConfig, b: str, x: str) -> Iterator[onnx.NodeProto]:
    ema = f"{b}_ema/{b}_ema"
    yield from _norm(config, f"{b}_ema_norm", x)
    yield from _affine(f"{b}_ema_proj", f"{b}_ema_norm", f"{ema}_proj_w", f"{ema}_proj_b")
    yield _node("ema_scan", [f"{b}_ema_proj", f"{ema}_alpha"], f"{b}_ema_scan", domain=DOMAIN)
    yield from _affine(f"{b}_ema", f"{b}_ema_scan", f"{ema}_out_w", f"{ema}_out_b")
    yield _node("Add", [x, f"{b}_ema"], f"{b}_ema_residual")

    yield from _norm(config, f"{b}_attn_norm", f"{b}_ema_residual")
    for part in ("q", "k", "v", "gate"):
        yield from _dense(f"{b}_gattn_{part}", f"{b}_attn_norm")
    yield _node("Sigmoid", [f"{b}_gattn_gate"], f"{b}_gattn_gate_sigmoid")
    yield _node(
        "gated_attention",
        [f"{b}_gattn_{part}" for part in ("q", "k", "v", "gate_sigmoid")],
        f"{b}_gattn_compute",
        domain=DOMAIN,
        laplace=int(config.laplace_attention),
    )
    yield from _dense(f"{b}_gattn_out", f"{b}_gattn_compute")
    yield _node("Add", [f"{b}_ema_residual", f"{b}_gattn_out"], f"{b}_attn_residual")

    yield from _norm(config, f"{b}_ffn_norm", f"{b}_attn_residual")
    yield from _dense(f"{b}_ffn_gate", f"{b}_ffn_norm")
    yield _node("Sigmoid", [f"{b}_ffn_gate"], f"{b}_ffn_gate_sigmoid")
    yield _node("Mul", [f"{b}_ffn_gate", f"{b}_ffn_gate_sigmoid"], f"{b}_ffn_gate_act")
    yield from _dense(f"{b}_ffn_up", f"{b}_ffn_norm")
    yield _node("Mul", [f"{b}_ffn_gate_act", f"{b}_ffn_up"], f"{b}_ffn_mul")
    yield from _dense(f"{b}_ffn_down", f"{b}_ffn_mul")
    yield _node("Add", [f"{b}_attn_residual", f"{b}_ffn_down"], f"{b}_ffn_residual")


def _dense(name: str, x: str) -> Iterator[onnx.NodeProto]:
    return _affine(name, x, f"{name}/kernel", f"{name}/bias")


def _affine(name: str, x: str, w: str, b: str) -> Iterator[onnx.NodeProto]:
    yield _node("MatMul", [x, w], f"{name}_product")
    yield _node("Add", [f"{name}_product", b], name)


def _norm(config: MegaConfig, name: str, x: str) -> Iterator[onnx.NodeProto]:
    inputs = [x, f"{name}/gamma", f"{name}/beta"]
    if config.layer_norm == "axon-0.8.0":
        yield _node("axon_layer_norm", inputs, name, domain=DOMAIN)
    else:
        yield _node("LayerNormalization", inputs, name, axis=-1, epsilon=LAYER_NORM_EPS)


def _node(
    op: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any
) -> onnx.NodeProto:
    return helper.make_node(op, inputs, [output], name=output, domain=domain, **attributes)
