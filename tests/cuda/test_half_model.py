"""Whole models on tensors of a half type."""

from __future__ import annotations

import pytest

from tests.cuda.devices import on_every_device


@pytest.mark.parametrize("case", ["odd", "tiny_laplace"])
@on_every_device
def test_agrees_with_edifice(case: str) -> None:
    from tests.cuda.models import assert_agrees

    assert_agrees(case, "float16")


@on_every_device
def test_what_is_float16() -> None:
    """Weights and activations are; biases, decays and the ends of an entry are not."""
    import mega_tvm
    from tests.cuda.models import compiled

    manifest = mega_tvm.load(compiled("odd", "float16")[0]).metadata
    assert manifest["dtype"] == "float16"
    assert {
        entry[end]["dtype"] for entry in manifest["entries"] for end in ("input", "output")
    } == {"float32"}
    stored = {item["dtype"]: item for item in manifest["tensors"]["items"]}
    assert set(stored) == {"float16", "float32"}
    by_type = {"float16": 0, "float32": 0}
    for item in manifest["tensors"]["items"]:
        by_type[item["dtype"]] += 1 if len(item["shape"]) > 1 else 0
    assert by_type["float16"] > 0
    assert by_type["float32"] == 0, "a matrix is float32"


@on_every_device
def test_verify(tmp_path) -> None:
    from mega_tvm.verify import main
    from mega_tvm.weights import save_checkpoint
    from tests.cuda.models import compiled

    path, golden, _ = compiled("odd", "float16")
    weights = tmp_path / "odd.npz"
    save_checkpoint(weights, golden.config, golden.params)
    assert main([str(path), "--weights", str(weights)]) == 0


def test_cpus_refuse_it_before_they_work(tmp_path, capsys) -> None:
    from mega_tvm.compile import main

    output = tmp_path / "model.so"
    arguments = ["--target", "x86-64-v3", "--dtype", "float16", "-o", str(output)]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "dtype 'float16' is not supported by target x86-64-v3; supported: float32; " in error
    assert "float16 is for GPUs, --target cuda" in error
    assert not output.exists()
