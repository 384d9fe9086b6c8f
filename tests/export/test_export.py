"""python -m mega_tvm.export, and what is left behind when it fails."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from torch import nn

from mega_tvm import export
from mega_tvm.errors import ExportError
from mega_tvm.export import export_onnx, main
from mega_tvm.weights import Checkpoint, load_checkpoint, save_checkpoint
from reference import MegaConfig
from tests.compiler.models import GOLDEN, golden, mega

CHECKPOINTS = GOLDEN / "checkpoints"
INLINE = pytest.mark.parametrize("inline", [False, True], ids=["functions", "inlined"])


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def same_bits(a, b):
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and a[name].tobytes() == b[name].tobytes() for name in a
    )


@INLINE
@pytest.mark.parametrize("name", ["odd.nx", "tiny_trained.nx", "tiny_bf16.nx", "odd.safetensors"])
def test_checkpoint_to_onnx_to_weights_is_the_identity(here, name, inline) -> None:
    checkpoint = load_checkpoint(CHECKPOINTS / name)
    back = load_checkpoint(export_onnx(CHECKPOINTS / name, "m.onnx", inline=inline))
    assert back.format == "onnx"
    assert back.config == checkpoint.config
    assert back.digest == checkpoint.digest
    assert same_bits(back.params, checkpoint.params)
    save_checkpoint("m.npz", back.config, back.params)
    assert same_bits(load_checkpoint("m.npz").params, checkpoint.params)


def test_unusual_values_survive(here) -> None:
    """Negative zeros and numbers below the normal range, bit for bit."""
    config = mega().config
    params = mega().to_params()
    params["final_norm/beta"][:3] = np.array([-0.0, 1e-45, np.finfo(np.float32).max])
    back = load_checkpoint(export_onnx(Checkpoint(config, params), "m.onnx"))
    assert same_bits(back.params, params)


def test_the_config_comes_back(here) -> None:
    case = golden("low_variance", "axon-0.8.0")
    config = MegaConfig.from_dict({**case.config.to_dict(), "dropout": 0.3, "window_size": 17})
    back = load_checkpoint(export_onnx(Checkpoint(config, case.params), "m.onnx"))
    assert back.config == config
    assert back.warnings == ()


def test_the_same_bytes_again(here) -> None:
    first = export_onnx(mega(), "a.onnx").read_bytes()
    assert first == export_onnx(mega(), "b.onnx").read_bytes()
    again = export_onnx("a.onnx", "c.onnx")
    assert again.read_bytes() == first


def test_the_command(here, capsys) -> None:
    source = CHECKPOINTS / "odd.nx"
    assert main([str(source), "--layer-norm", "axon-0.8.0", "--inline"]) == 0
    out = capsys.readouterr().out
    assert "config.layer_norm         axon-0.8.0" in out
    assert f"wrote {here / 'odd.onnx'}" in out
    assert [p.name for p in here.iterdir()] == ["odd.onnx"]
    assert load_checkpoint("odd.onnx").config.layer_norm == "axon-0.8.0"
    assert not onnx.load("odd.onnx").functions


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["missing.nx"], "missing.nx: no such file"),
        ([__file__], "not a checkpoint of a known format"),
        ([str(CHECKPOINTS / "odd.nx"), "-o", "m.so"], "ends in .onnx"),
        ([str(CHECKPOINTS / "odd.nx"), "-o", "none/m.onnx"], "there is no directory"),
    ],
    ids=["missing", "no_checkpoint", "suffix", "directory"],
)
def test_errors_of_use(here, capsys, argv, words) -> None:
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert words in error
    assert not list(here.iterdir())


def test_a_module_around_a_mega(here) -> None:
    with pytest.raises(ExportError, match=r"Sequential is not a Mega alone: .*merge_models"):
        export_onnx(nn.Sequential(mega(), nn.Linear(16, 3)), "m.onnx")


def test_a_wrong_model_is_not_written(here, monkeypatch) -> None:
    """What differs from the oracle stays unwritten, and the former file stays."""
    (here / "m.onnx").write_bytes(b"former")
    right = export.numpy_mega.forward
    monkeypatch.setattr(export.numpy_mega, "forward", lambda *args: right(*args) + 1e-3)
    with pytest.raises(ExportError, match="differs from the float64 reference"):
        export_onnx(mega(), "m.onnx")
    assert [p.name for p in here.iterdir()] == ["m.onnx"]
    assert (here / "m.onnx").read_bytes() == b"former"
