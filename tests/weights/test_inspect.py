from __future__ import annotations

import json
import subprocess
import sys

import pytest

from mega_tvm.inspect import main
from mega_tvm.weights import load_checkpoint, save_checkpoint
from tests.weights.builders import CONFIG, GOLDEN, nx_file, small_params

SPEC_FILE = GOLDEN / "checkpoints/tiny_spec.nx"


def test_text(capsys):
    assert main([str(SPEC_FILE)]) == 0
    out = capsys.readouterr().out
    for word in (
        load_checkpoint(SPEC_FILE).digest,
        "115,232",
        "466,729 bytes",
        "mega_block_2_ema/mega_block_2_ema_proj_w",
        "64 x 176",
        "__edifice_spec__",
        "edifice_version",
        "default",
    ):
        assert word in out
    assert "warning" not in out


def test_json(capsys):
    assert main([str(SPEC_FILE), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kind"] == "checkpoint"
    assert report["format"] == "nx"
    assert report["config"]["seq_len"] == 16
    assert report["parameter_count"] == 115_232
    assert len(report["tensors"]) == 2 * 27 + 4
    tensor = report["tensors"][0]
    assert (tensor["name"], tensor["shape"]) == ("input_projection/kernel", [32, 64])
    assert tensor["min"] < tensor["mean"] < tensor["max"]


@pytest.mark.parametrize(
    "file", ["tiny.npz", "checkpoints/odd.safetensors", "checkpoints/tiny_bf16.nx"]
)
def test_every_format(file, capsys):
    assert main([str(GOLDEN / file)]) == 0
    assert "laplace_attention: softmax is assumed" in capsys.readouterr().out


def test_file_of_unknown_suffix(tmp_path, capsys):
    path = tmp_path / "weights.npz"
    save_checkpoint(path, CONFIG, small_params())
    assert main([str(path.rename(tmp_path / "weights.old"))]) == 0
    assert "npz" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_untrusted_text_cannot_drive_the_terminal(flags, tmp_path, capsys):
    path = tmp_path / "model.nx"
    path.write_bytes(
        nx_file(small_params(), metadata={b"note": b"\x1b[2J[red]\xff", b"a": b"\x1b["})
    )
    assert main([str(path), *flags]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_unreadable_metadata_is_shown_as_a_warning(tmp_path, capsys):
    path = tmp_path / "model.nx"
    path.write_bytes(nx_file(small_params(), metadata=b"\x83\x00"))
    assert main([str(path)]) == 0
    assert "warning: the metadata cannot be read" in capsys.readouterr().out


def test_error_goes_to_stderr(tmp_path, capsys):
    path = tmp_path / "model.nx"
    path.write_bytes(b"\x00\x00")
    assert main([str(path)]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.startswith(f"error: {path}: ")
    assert len(captured.err.splitlines()) == 1


def test_command_line(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "mega_tvm.inspect", str(tmp_path)], capture_output=True, text=True
    )
    assert run.returncode == 2
    assert run.stderr == f"error: {tmp_path}: not a regular file\n"


def test_missing_rich_names_the_extra(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main([str(SPEC_FILE)]) == 2
    assert "pip install mega-tvm[compile]" in capsys.readouterr().err
    assert main([str(SPEC_FILE), "--json"]) == 0
