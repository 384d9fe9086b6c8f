from __future__ import annotations

import json

from mega_tvm import inspect
from mega_tvm.artifact_format import read_manifest
from tests.verify.conftest import golden_npz


def test_for_people(tiny, capsys):
    assert inspect.main([str(tiny)]) == 0
    out = capsys.readouterr().out
    manifest = read_manifest(tiny)
    for fact in (
        str(tiny),
        manifest["weights"]["digest"],
        str(golden_npz("tiny")),
        manifest["versions"]["tvm"],
        "hidden_size",
        "2 x 16 x 32",
        "checked when compiled",
        *(kernel["name"] for kernel in manifest["kernels"]),
    ):
        assert fact in out


def test_as_json(tiny, capsys):
    assert inspect.main([str(tiny), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {"kind", "file", "file_size", "flops_per_call", "manifest"}
    assert report["kind"] == "artifact"
    assert report["file_size"] == tiny.stat().st_size
    assert report["manifest"] == read_manifest(tiny)
    assert report["flops_per_call"]["dense_2x16x32x64"] == 2 * (2 * 16) * 32 * 64
    assert report["flops_per_call"]["last_timestep"] is None


def test_module_without_parity(tiny, edited, capsys):
    def change(manifest):
        manifest["weights"] = {"kind": "module", "class": "Classifier"}
        manifest["config"] = None
        manifest["parity"] = {"checked": False, "reason": "another machine"}

    assert inspect.main([str(edited(tiny, change))]) == 0
    out = capsys.readouterr().out
    assert "those of a module, Classifier" in out
    assert "not checked when compiled: another machine" in out
    assert "hidden_size" not in out


def test_damaged(tiny, tmp_path, capsys):
    data = bytearray(tiny.read_bytes())
    data[4096] ^= 1
    (tmp_path / "bad.so").write_bytes(data)
    assert inspect.main([str(tmp_path / "bad.so")]) == 2
    assert "sha256" in capsys.readouterr().err
    offset = read_manifest(tiny)["tensors"]["offset"]
    data[4096] ^= 1
    data[offset] ^= 1
    (tmp_path / "bad.so").write_bytes(data)
    assert inspect.main([str(tmp_path / "bad.so")]) == 2
    assert "tensors" in capsys.readouterr().err


def test_missing(tmp_path, capsys):
    assert inspect.main([str(tmp_path / "none.so")]) == 2
    assert "no such file" in capsys.readouterr().err
