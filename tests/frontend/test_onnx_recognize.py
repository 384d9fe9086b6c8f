"""What of an ONNX graph becomes Mega's operators, and what is said of the rest."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from mega_tvm.errors import UnsupportedModelError
from tests.compiler.models import mega
from tests.frontend.onnx_models import (
    SHAPE,
    exported,
    function_node,
    operators,
    saved,
    surrounded,
    with_head,
)

LAPLACE = pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
INLINED = pytest.mark.parametrize("inlined", [False, True], ids=["functions", "inlined"])


def kernels(counts):
    return {name: n for name, n in counts.items() if name.startswith("mega.")}


@LAPLACE
@INLINED
def test_an_exported_mega(tmp_path, laplace, inlined) -> None:
    model = exported(mega(laplace_attention=laplace, num_layers=2), inlined=inlined)
    counts, notes = operators(saved(model, tmp_path))
    assert kernels(counts) == {"mega.ema_scan": 2, "mega.attention": 2}
    assert notes == ()
    # The bodies have left nothing behind.
    assert not counts.keys() & {"exp", "where", "nn.softmax", "concat", "reshape", "permute_dims"}


@INLINED
def test_axons_layer_norm(tmp_path, inlined) -> None:
    model = exported(mega(layer_norm="axon-0.8.0"), inlined=inlined)
    counts, notes = operators(saved(model, tmp_path))
    expected = {"mega.ema_scan": 1, "mega.attention": 1}
    # Inlined, it is plain operators, each within its row: nothing to find or to tell.
    assert kernels(counts) == expected | ({} if inlined else {"mega.layer_norm": 4})
    assert notes == ()


@INLINED
@pytest.mark.parametrize("make", [with_head, surrounded])
def test_a_mega_among_other_layers(tmp_path, make, inlined) -> None:
    _, model = make(inlined=inlined)
    shape = SHAPE if make is with_head else (2, 5, 9)
    counts, notes = operators(saved(model, tmp_path), shape)
    assert kernels(counts) == {"mega.ema_scan": 1, "mega.attention": 1}
    assert notes == ()


@LAPLACE
def test_a_file_that_onnx_runtime_has_inlined_and_folded(tmp_path, laplace) -> None:
    ort = pytest.importorskip("onnxruntime")
    source = saved(exported(mega(laplace_attention=laplace)), tmp_path)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(tmp_path / "optimized.onnx")
    assert not optimized.functions
    assert not any(node.op_type == "Atanh" for node in optimized.graph.node)  # folded
    counts, notes = operators(tmp_path / "optimized.onnx")
    assert kernels(counts) == {"mega.ema_scan": 1, "mega.attention": 1}
    assert notes == ()


def test_a_file_of_fixed_sizes(tmp_path) -> None:
    model = exported(mega(), inlined=True)
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, SHAPE, strict=True):
        dim.dim_value = size
    model.graph.output[0].type.tensor_type.shape.dim[0].dim_value = SHAPE[0]
    counts, notes = operators(saved(model, tmp_path))
    assert kernels(counts) == {"mega.ema_scan": 1, "mega.attention": 1}
    assert notes == ()


def test_a_window_that_is_longer_than_a_short_probe(tmp_path) -> None:
    """Attention to the last 200 frames is Mega's over 131 frames, and not over 250."""
    model = exported(mega(), inlined=True)
    mask = next(n for n in model.graph.node if n.op_type == "Trilu")
    at = list(model.graph.node).index(mask)
    masked, causal = mask.input[0], mask.output[0]
    mask.output[0] = "future"
    model.graph.node.insert(at + 1, helper.make_node("Add", ["future", "past"], [causal]))
    model.graph.node.insert(
        at + 1, helper.make_node("Trilu", [masked, "window"], ["past"], upper=0)
    )
    model.graph.initializer.append(numpy_helper.from_array(np.array(-200, np.int64), "window"))
    path = saved(model, tmp_path)
    assert kernels(operators(path, (1, 5, 13))[0]) == {"mega.ema_scan": 1, "mega.attention": 1}
    counts, notes = operators(path, (1, 250, 13))
    assert kernels(counts) == {"mega.ema_scan": 1}
    assert len(notes) == 1


def test_names_tell_nothing(tmp_path) -> None:
    """Values of other names, and nodes of none."""
    model = exported(mega(), inlined=True)
    names = {out: f"v{i}" for i, n in enumerate(model.graph.node) for out in n.output if out != "y"}
    for node in model.graph.node:
        node.ClearField("name")
        node.input[:] = [names.get(name, name) for name in node.input]
        node.output[:] = [names.get(name, name) for name in node.output]
    counts, notes = operators(saved(model, tmp_path))
    assert kernels(counts) == {"mega.ema_scan": 1, "mega.attention": 1}
    assert notes == ()


# What is not Mega's


def test_a_function_that_computes_something_else(tmp_path) -> None:
    """Its name is right, its body not: an eps of 1 in the place of 1e-8."""
    model = exported(mega(laplace_attention=True))
    body = function_node(model, "gated_attention", "ReduceSum")
    assert body.output[0] == "total"
    for node in next(f for f in model.functions if f.name == "gated_attention").node:
        if node.output[0] == "epsilon":
            node.attribute[0].f = 1.0
    counts, notes = operators(saved(model, tmp_path))
    assert kernels(counts) == {"mega.ema_scan": 1}
    assert "the function mega.gated_attention does not compute what" in notes[0]
    assert "mixes frames in a way that is neither Mega's EMA nor its attention" in notes[1]


def test_attention_that_sees_the_future(tmp_path) -> None:
    model = exported(mega(), inlined=True)
    node = next(n for n in model.graph.node if "causal_scores" in n.output[0])
    node.op_type = "Sub"  # adds 1e9 where the mask would take it away
    counts, notes = operators(saved(model, tmp_path))
    assert kernels(counts) == {"mega.ema_scan": 1}
    assert len(notes) == 1
    assert "mega_block_1_gattn_compute" in notes[0] or "mixed" in notes[0]
    assert "MatMul x 2" in notes[0]


def test_an_average_that_is_not_exponential(tmp_path) -> None:
    """Chunks that forget the one before: right within the first 64 frames."""
    model = exported(mega(), inlined=True)
    carried = next(n for n in model.graph.node if "carried" in n.output[0])
    state = next(n for n in model.graph.node if carried.output[0] in n.input)
    state.input[:] = [state.input[0], state.input[0]]
    counts, notes = operators(saved(model, tmp_path))
    assert kernels(counts) == {"mega.attention": 1}
    assert len(notes) == 1


def test_all_unsupported_operators_are_reported_at_once(tmp_path) -> None:
    path = saved(_with_unknown(exported(mega())), tmp_path)
    with pytest.raises(UnsupportedModelError) as error:
        operators(path)
    message = str(error.value)
    assert message.startswith(f"{path}: 2 operator(s) of this model are not supported: ")
    assert ": Det, com.example.Wave. Rewrite" in message


def _with_unknown(model):
    """Add two operators that nothing knows, one of another domain, one of them twice."""
    last = model.graph.node[-1]
    last.output[0] = "state"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    model.graph.node.extend(
        [
            helper.make_node("Wave", ["state"], ["waved"], domain="com.example"),
            helper.make_node("Wave", ["waved"], ["waved_2"], domain="com.example"),
            helper.make_node("MatMul", ["waved_2", "square"], ["squared"]),
            helper.make_node("Det", ["square"], ["scale"]),
            helper.make_node("Mul", ["squared", "scale"], ["y"]),
        ]
    )
    square = numpy_helper.from_array(np.eye(16, dtype=np.float32), "square")
    model.graph.initializer.append(square)
    return model
