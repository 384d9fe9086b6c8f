"""Compiled from an ONNX file: the same library as from the checkpoint, or as from torch."""

from __future__ import annotations

import numpy as np
import pytest
from torch import nn

import mega_tvm
from mega_tvm.artifact_format import read_manifest
from mega_tvm.compile import main
from mega_tvm.compiler import compile_model
from mega_tvm.errors import CompileError
from mega_tvm.inspect import inspect_file
from mega_tvm.tolerances import assert_parity
from mega_tvm.verify import VerificationError, verify_artifact
from tests.compiler.models import float64, mega
from tests.frontend.onnx_models import B, T, exported, node_of, saved, surrounded, with_head

SHAPES = {"batch": B, "seq_len": T}


@pytest.fixture(scope="session")
def compile_file(compile_once, tmp_path_factory):
    """Compile an ONNX model by way of a file; return the library's path and the notes."""
    folder = tmp_path_factory.mktemp("onnx")
    notes = {}

    def compile_it(name, model, **options):
        path = saved(model, folder, f"{name}.onnx")
        told = notes.setdefault(name, [])
        options = {**SHAPES, **options}
        return compile_once(f"onnx_{name}", path, on_note=told.append, **options), told

    return compile_it


def run(path, rng):
    model = mega_tvm.load(path)
    x = rng.standard_normal(model.entries[0].input_shape, dtype=np.float32)
    return model(x), x


@pytest.mark.parametrize("inlined", [False, True], ids=["functions", "inlined"])
@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
def test_equals_the_checkpoints(compile_once, compile_file, rng, laplace, inlined) -> None:
    """Not only in its output: the same kernels, and the same packed weights to the bit."""
    module = mega(laplace_attention=laplace)
    expected = compile_once(f"checkpoint_{laplace}", module, **SHAPES)
    found, notes = compile_file(f"{laplace}_{inlined}", exported(module, inlined=inlined))
    a, b = read_manifest(expected), read_manifest(found)
    assert {"ema_scan", "laplace_attention" if laplace else "gated_attention"} <= {
        kernel["op"] for kernel in b["kernels"]
    }
    assert a["kernels"] == b["kernels"]
    assert a["tensors"] == b["tensors"]
    assert a["weights"]["digest"] == b["weights"]["digest"]
    assert a["config"] == b["config"]
    y, x = run(found, rng)
    assert np.array_equal(y, mega_tvm.load(expected)(x))
    assert notes == []


def test_can_be_verified(compile_file) -> None:
    path, _ = compile_file("False_False", exported(mega()))
    report = verify_artifact(path)
    assert report.ok
    assert report.settings["weights"].endswith(".onnx")


def test_a_file_with_a_head_is_inspected_but_not_verified(compile_file) -> None:
    path, _ = compile_file("with_head_False", with_head()[1], input_shape=(B, T, 13))
    assert inspect_file(path).to_dict()["manifest"]["weights"]["kind"] == "onnx"
    with pytest.raises(VerificationError, match=r"compiled from a module \(.*with_head.*onnx\)"):
        verify_artifact(path)


@pytest.mark.parametrize("inlined", [False, True], ids=["functions", "inlined"])
@pytest.mark.parametrize("make", [with_head, surrounded])
def test_among_other_layers_equals_torch(compile_once, compile_file, rng, make, inlined) -> None:
    module, model = make(inlined=inlined)
    shape = {"input_shape": (B, T, 9 if make is surrounded else 13)}
    expected = compile_once(f"torch_{make.__name__}", module, **shape)
    found, notes = compile_file(f"{make.__name__}_{inlined}", model, **shape)
    manifest = read_manifest(found)
    mega_ops = {"ema_scan", "gated_attention", "dense", "layer_norm"}
    of_torch = {k["name"] for k in read_manifest(expected)["kernels"] if k["op"] in mega_ops}
    assert of_torch == {k["name"] for k in manifest["kernels"] if k["op"] in mega_ops}
    y, x = run(found, rng)
    assert_parity(y, float64(module, x), name="against torch in float64")
    assert_parity(y, mega_tvm.load(expected)(x).astype(np.float64), name="against torch's library")
    assert manifest["weights"]["kind"] == "onnx"
    assert manifest["config"] is None
    assert notes == []


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
def test_what_is_not_recognised_is_compiled_as_it_stands(compile_file, rng, laplace) -> None:
    """Chunks that subtract the carry, an eps of 1 or no mask: not Mega's, and yet they run."""
    model = exported(mega(laplace_attention=laplace), inlined=True)
    if laplace:
        next(n for n in model.graph.node if "epsilon" in n.output[0]).attribute[0].f = 1.0
    else:
        next(n for n in model.graph.node if "causal_scores" in n.output[0]).op_type = "Sub"
    carried = next(n for n in model.graph.node if "carried" in n.output[0])
    next(n for n in model.graph.node if carried.output[0] in n.input).op_type = "Sub"
    found, notes = compile_file(f"plain_{laplace}", model)
    manifest = read_manifest(found)
    assert not {"ema_scan", "gated_attention", "laplace_attention"} & {
        kernel["op"] for kernel in manifest["kernels"]
    }
    assert all(kernel["schedule"] for kernel in manifest["kernels"])
    assert manifest["parity"]["entries"]["main"]["checked"]
    assert any("mega_block_1_ema_scan mixes frames" in note for note in notes)
    assert any("mega_block_1_ema_scan" not in note for note in notes)
    assert run(found, rng)[0].shape == (B, 16)


def test_many_shapes_of_one_file(compile_file, rng) -> None:
    path, _ = compile_file("shapes", exported(mega()), batch=[1, 3], seq_len=[1, 7])
    model, module = mega_tvm.load(path), mega()
    assert [entry.input_shape[:2] for entry in model.entries] == [(1, 1), (1, 7), (3, 1), (3, 7)]
    for entry in model.entries:
        x = rng.standard_normal(entry.input_shape, dtype=np.float32)
        assert_parity(model(x), float64(module, x))


def test_the_command(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    _, model = with_head()
    saved(model, tmp_path, "policy.onnx")
    assert main(["--model", "policy.onnx", "--seq-len", "3"]) == 0
    out = capsys.readouterr().out
    assert "  model            policy.onnx" in out
    assert "max abs error against float64" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["policy.json", "policy.onnx", "policy.so"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--model", "m.onnx", "--weights", "m.nx"], "not both"),
        (["--weights", "m.onnx"], "give it by --model"),
        (["--model", "m.nx"], "--model takes an .onnx file"),
        (["--model", "missing.onnx"], "missing.onnx: no such file"),
        (["--model", "m.onnx", "--hidden-size", "16"], "hidden_size cannot be given beside it"),
        (["--model", "m.onnx", "--batch", "0"], "batch must be a positive integer; got 0"),
        (["--model", "m.onnx", "--batch", "2,2"], "must give distinct shapes"),
    ],
    ids=["both", "as_weights", "checkpoint_as_model", "missing", "option", "batch", "twice"],
)
def test_errors_of_use(tmp_path, monkeypatch, capsys, argv, words) -> None:
    monkeypatch.chdir(tmp_path)
    saved(exported(mega()), tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_length_that_nobody_tells(tmp_path) -> None:
    model = exported(mega())
    del model.metadata_props[:]
    path = saved(model, tmp_path)
    with pytest.raises(CompileError, match=r"leaves the sequence length open, .* give seq_len"):
        compile_model(path, output=tmp_path / "m.so")


def test_a_size_that_the_file_fixes(tmp_path) -> None:
    model = exported(mega())
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 3
    path = saved(model, tmp_path)
    with pytest.raises(CompileError, match=r"the input is \[3, \?, 13\], which \[1, 5, 13\] does"):
        compile_model(path, output=tmp_path / "m.so")


def test_the_wrong_kernel_would_show(tmp_path, monkeypatch) -> None:
    """The oracle of a file with a head runs the file, not what was recognised in it."""
    from mega_tvm.frontend import onnx_recognize

    monkeypatch.setattr(onnx_recognize, "_form_of", lambda wide, name: "softmax")
    _, model = with_head()
    for function in model.functions:
        if function.name == "gated_attention":
            next(n for n in function.node if n.op_type == "Sqrt").op_type = "Identity"
    with pytest.raises(CompileError, match="differs from the float64 reference"):
        compile_model(saved(model, tmp_path), output=tmp_path / "m.so", **SHAPES)
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


def test_a_part_of_a_mega(compile_file, rng) -> None:
    """All states in place of the last one: the graph decides, not the names of the weights."""
    module = mega()
    model = exported(module)
    gather = node_of(model, "Gather")
    model.graph.node.remove(gather)
    model.graph.output[0].CopyFrom(model.graph.input[0])
    model.graph.output[0].name = gather.input[0]
    model.graph.output[0].type.tensor_type.shape.dim[2].dim_value = 16
    found, _ = compile_file("states", model)
    y, x = run(found, rng)
    assert y.shape == (B, T, 16)
    assert_parity(y[:, -1], float64(nn.Sequential(module), x))
