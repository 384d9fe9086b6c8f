"""Files that cannot be compiled for what they are: one clear error each, nothing written."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mega_tvm.compile import main
from mega_tvm.errors import MegaError
from mega_tvm.frontend.onnx import import_onnx, load_onnx
from tests.compiler.models import mega
from tests.frontend.onnx_models import SHAPE, exported, part, saved

WEIGHT = "final_norm/gamma"


def refused(path) -> str:
    with pytest.raises(MegaError) as error:
        import_onnx(load_onnx(path), {"main": SHAPE})
    message = str(error.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "holds no IR version"),
        (b"#!/bin/sh\necho no model\n", "not an ONNX file, or truncated"),
        (b"\x7fELF" + bytes(60), "not an ONNX file, or truncated"),
        (b"\x08\x08", "holds no IR version or no nodes"),
    ],
    ids=["empty", "text", "elf", "header_alone"],
)
def test_what_is_not_onnx(tmp_path, content, words) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    assert words in refused(path)


def test_truncated(tmp_path) -> None:
    content = exported(mega()).SerializeToString()
    path = tmp_path / "m.onnx"
    for cut in range(1, 30):
        path.write_bytes(content[: -97 * cut])
        refused(path)


def test_what_is_no_file(tmp_path) -> None:
    assert "no such file" in refused(tmp_path / "missing.onnx")
    (tmp_path / "folder.onnx").mkdir()
    assert "not a regular file" in refused(tmp_path / "folder.onnx")


# External data


def outside(model, location, **entries):
    tensor = next(t for t in model.graph.initializer if t.name == WEIGHT)
    data = tensor.raw_data
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **entries}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return data


def test_data_beside_the_model_are_read(tmp_path) -> None:
    model = exported(mega())
    data = outside(model, "weights.bin", offset=64, length=64)
    path = saved(model, tmp_path)
    assert "weights.bin, which is not in the model's folder" in refused(path)
    (tmp_path / "weights.bin").write_bytes(bytes(64) + data)
    found = load_onnx(path).proto
    tensor = next(t for t in found.graph.initializer if t.name == WEIGHT)
    assert tensor.raw_data == data
    (tmp_path / "weights.bin").write_bytes(data)
    assert "claims bytes 64 to 128 of weights.bin, which holds 64" in refused(path)


@pytest.mark.parametrize("location", ["/etc/hostname", "../secret.bin", "a/../../secret.bin"])
def test_data_outside_the_folder_are_refused(tmp_path, location) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "inside").mkdir()
    model = exported(mega())
    outside(model, location)
    assert "outside the model's folder" in refused(saved(model, tmp_path / "inside"))


def test_a_link_that_leads_outside_is_refused(tmp_path) -> None:
    (tmp_path / "secret.bin").write_bytes(bytes(64))
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "w.bin").symlink_to(tmp_path / "secret.bin")
    model = exported(mega())
    outside(model, "w.bin")
    assert "outside the model's folder" in refused(saved(model, tmp_path / "inside"))


@pytest.mark.parametrize(
    "entries", [{"offset": "x"}, {"length": -1}, {"offset": 2**80}, {"length": "9" * 30}], ids=str
)
def test_wrong_spans_of_external_data(tmp_path, entries) -> None:
    (tmp_path / "w.bin").write_bytes(bytes(64))
    model = exported(mega())
    outside(model, "w.bin", **entries)
    assert WEIGHT in refused(saved(model, tmp_path))


# Models


def old_opset(model):
    for opset in model.opset_import:
        if opset.domain == "":
            opset.version = 11


def new_opset(model):
    model.opset_import[0].version = 999


def no_opset(model):
    del model.opset_import[:]


def half(model):
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16


def strings(model):
    tensor = helper.make_tensor("words", TensorProto.STRING, [1], [b"word"])
    model.graph.initializer.append(tensor)


def two_outputs(model):
    model.graph.output.append(
        helper.make_tensor_value_info("final_norm", TensorProto.FLOAT, ["batch", "seq_len", 16])
    )


def cycle(model):
    model.graph.node[0].input[0] = model.graph.node[5].output[0]


def missing_value(model):
    model.graph.node[3].input[0] = "nowhere"


def own_call(model):
    function = model.functions[0]
    function.node.append(helper.make_node(function.name, ["p", "alpha"], ["again"], domain="mega"))
    function.opset_import.append(helper.make_opsetid("mega", 1))


def misshapen(model):
    tensor = next(t for t in model.graph.initializer if t.name == WEIGHT)
    tensor.CopyFrom(numpy_helper.from_array(np.ones(7, np.float32), WEIGHT))


def negative(model):
    next(t for t in model.graph.initializer if t.name == WEIGHT).dims[0] = -16


def absurd(model):
    next(t for t in model.graph.initializer if t.name == WEIGHT).dims[0] = 2**62


def no_frames(model):
    model.graph.input[0].type.tensor_type.shape.dim[1].dim_value = 0


def no_shape(model):
    model.graph.input[0].type.tensor_type.ClearField("shape")


def line_break(model):
    model.graph.node[0].op_type = "Mat\nMul\x1b[31m"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (old_opset, "the model has opset 11; opsets 13 to"),
        (new_opset, "the model has opset 999"),
        (no_opset, "the model states no opset"),
        (half, "inconsistent type"),
        (strings, "values of string are not compiled"),
        (two_outputs, "it has 1 and 2 (x, y, final_norm)"),
        (cycle, "not a valid ONNX model: "),
        (missing_value, "not a valid ONNX model: "),
        (own_call, "function ema_scan calls itself"),
        (misshapen, "cannot be run at input shape [2, 5, 13]"),
        (negative, "such a shape is not allowed"),
        (absurd, "such a shape is not allowed"),
        (no_frames, "has the sizes [0, 13]"),
        (no_shape, "'shape' of 'type' is required"),
        (line_break, "Mat"),
    ],
    ids=lambda v: v.__name__ if callable(v) else "",
)
def test_models_that_cannot_be_compiled(tmp_path, change, words) -> None:
    model = exported(mega())
    change(model)
    message = refused(saved(model, tmp_path))
    assert words in message
    assert message.isprintable()


def ints(name, *values):
    return numpy_helper.from_array(np.array(values, np.int64), name)


BOMBS = {
    "Expand": ([helper.make_node("Expand", ["x", "n"], ["z"])], ints("n", 2**40, 5, 13)),
    "Tile": ([helper.make_node("Tile", ["x", "n"], ["z"])], ints("n", 2**20, 2**20, 1)),
    "Pad": ([helper.make_node("Pad", ["x", "n"], ["z"])], ints("n", 0, 0, 0, 0, 2**40, 0)),
    "ConstantOfShape": (
        [
            # Shape inference does not follow these numbers.
            helper.make_node("Mod", ["n", "n_minus"], ["same"]),
            helper.make_node("ConstantOfShape", ["same"], ["huge"]),
            helper.make_node("ReduceSum", ["huge"], ["zero"], keepdims=0),
            helper.make_node("Add", ["x", "zero"], ["z"]),
        ],
        ints("n", 2**20, 2**20),
    ),
}


@pytest.mark.parametrize("op", BOMBS)
def test_a_number_that_asks_for_all_memory(tmp_path, op) -> None:
    nodes, number = BOMBS[op]
    nodes = [*nodes, helper.make_node("ReduceMean", ["z"], ["y"], axes=[0, 1], keepdims=0)]
    weights = [number, ints("n_minus", -(2**40))] if len(nodes) > 2 else [number]
    path = saved(part(nodes, ("x", [1, 5, 13]), ("y", [13]), weights), tmp_path)
    with pytest.raises(MegaError, match="elements") as error:
        import_onnx(load_onnx(path), {"main": (1, 5, 13)})
    assert str(path) in str(error.value)


def test_the_command_writes_nothing(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    model = exported(mega())
    missing_value(model)
    saved(model, tmp_path)
    assert main(["--model", "m.onnx"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: m.onnx: not a valid ONNX model: ") and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("elem_type", [TensorProto.FLOAT16, TensorProto.INT64])
def test_models_of_other_types(tmp_path, elem_type) -> None:
    model = part([helper.make_node("Abs", ["x"], ["y"])], ("x", [2, 3]), ("y", [2, 3]))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = elem_type
    name = TensorProto.DataType.Name(elem_type).lower()
    assert f"the input x must be float32; it is {name}" in refused(saved(model, tmp_path))


def test_a_name_that_is_not_utf_8(tmp_path) -> None:
    content = (
        exported(mega()).SerializeToString().replace(b"final_norm/beta", b"final_\xff\xfem/beta")
    )
    (tmp_path / "m.onnx").write_bytes(content)
    assert refused(tmp_path / "m.onnx").isprintable()


def test_an_older_opset_that_is_known(tmp_path) -> None:
    """Opset 13, of a model without a Mega."""
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    model = part(nodes, ("x", [2, 3]), ("y", [2, 3]))
    model.opset_import[0].version = 13
    mod, notes = import_onnx(load_onnx(saved(model, tmp_path)), {"main": (2, 3)})
    assert "main" in [gvar.name_hint for gvar in mod.get_global_vars()]
    assert notes == ()
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 13
