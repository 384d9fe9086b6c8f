"""``fast_products``: whole models by Strassen's method."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest

import mega_tvm
from mega_tvm import compile as compile_command
from mega_tvm.artifact_format import read_manifest
from mega_tvm.compiler import compile_model
from mega_tvm.errors import CompileError
from mega_tvm.manifest_schema import manifest_problem
from mega_tvm.passes import fast_products
from mega_tvm.tolerances import assert_parity
from tests.compiler.models import golden, mega

# Both attention forms, odd rows, one frame, rows of nearly equal elements.
CASES = {"tiny_laplace": "plain", "odd": "plain", "seq1": "plain", "low_variance": "axon-0.8.0"}


def ops(manifest: dict) -> set[str]:
    return {kernel["op"] for kernel in manifest["kernels"]}


@pytest.fixture
def everywhere():
    """Uses the method for every dense layer of known rows, whether it pays or not."""
    with mock.patch.object(
        fast_products, "pays", lambda spec: all(isinstance(dim, int) for dim in spec.lead)
    ):
        yield


@pytest.mark.parametrize("case", list(CASES))
def test_agrees_with_edifice(everywhere, compile_once, case) -> None:
    found = golden(case, CASES[case])
    batch, seq_len, _ = found.x.shape
    path = compile_once(
        f"{case}_fast", found.checkpoint, batch=batch, seq_len=seq_len, fast_products=True
    )
    model = mega_tvm.load(path)
    assert "strassen_dense" in ops(model.metadata)
    y = model(found.x)
    assert_parity(y, found.y, name="against Edifice")
    assert_parity(y, found.oracle(), name="against float64")
    two = mega_tvm.load(path, num_threads=2)(found.x)
    np.testing.assert_array_equal(two, y)


def test_the_default_model(default_case, compile_once) -> None:
    path = compile_once("default_fast", default_case.checkpoint, fast_products=True)
    model = mega_tvm.load(path)
    assert {"dense", "strassen_dense"} <= ops(model.metadata)
    assert_parity(model(default_case.x), default_case.y, name="against Edifice")
    assert_parity(model(default_case.x), default_case.oracle(), name="against float64")


def test_other_shapes_and_streams_stay_dense(everywhere, compile_once) -> None:
    path = compile_once("small_fast", mega(), fast_products=True, symbolic=True, stream=True)
    manifest = read_manifest(path)
    rows: dict[str, set[bool]] = {"dense": set(), "strassen_dense": set()}
    for kernel in manifest["kernels"]:
        if kernel["op"] in rows:
            known = all(isinstance(dim, int) for dim in kernel["spec"]["lead"])
            rows[kernel["op"]].add(known)
    assert False in rows["dense"] and rows["strassen_dense"] == {True}


def test_the_manifest_tells(small_path, compile_once, capsys) -> None:
    assert read_manifest(small_path)["fast_products"] is False
    assert "strassen_dense" not in ops(read_manifest(small_path))
    output = small_path.with_name("command_fast.so")
    sizes = ["--embed-dim=13", "--hidden-size=16", "--num-layers=1", "--seq-len=5"]
    options = ["--fast-products", "--no-symbolic", "--no-stream", "-o", str(output)]
    assert compile_command.main([*sizes, *options]) == 0
    assert "where they pay" in capsys.readouterr().out
    manifest = read_manifest(output)
    assert manifest["fast_products"] is True
    wrong = {**manifest, "fast_products": "yes"}
    assert manifest_problem(wrong) == "fast_products must be true or false, found 'yes'"
    del manifest["fast_products"]  # as older files
    assert manifest_problem(manifest) is None


def test_gpus_are_refused(tmp_path) -> None:
    with pytest.raises(CompileError, match=r"fast products are for CPUs: target cuda .*leave"):
        compile_model(mega(), target="cuda", fast_products=True, output=tmp_path / "m.so")
    assert not list(tmp_path.iterdir())
