"""Loading: what it needs, what it refuses, and that nothing malformed reaches the loader."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi

import mega_tvm
from mega_tvm import load
from mega_tvm.artifact import write_artifact
from mega_tvm.errors import DamagedArtifactError, IncompatibleArtifactError
from mega_tvm.host import _request_amx
from mega_tvm.inputs import aligned_empty
from tests.runtime.builders import BIAS, MANIFEST, TENSORS, build_executable, join, split

RUN = """
model = mega_tvm.load(sys.argv[1])
y = model(np.ones((1, 4, 16), np.float32))
print(y.tolist() == [[4.0 + i for i in range(16)]])
print(sorted({"torch", "tvm"} & set(sys.modules)))
"""


def test_needs_neither_compilers_nor_path(artifact, run_python):
    assert run_python(RUN, artifact).split() == ["True", "[]"]


@pytest.mark.parametrize("where", ["directory", "file", "beside", "distribution"])
def test_the_runtime_library_is_found(artifact, run_python, tmp_path, where):
    file = Path(importlib.metadata.distribution("apache-tvm").locate_file("tvm/lib"))
    file /= "libtvm_runtime.so"
    path = artifact
    variable = {"directory": str(file.parent), "file": str(file)}.get(where, "")
    if where == "beside":
        path = Path(shutil.copy(artifact, tmp_path))
        file = Path(shutil.copy(file, tmp_path))
    script = """
with open("/proc/self/maps") as maps:
    print({line.split(maxsplit=5)[5].strip() for line in maps if "libtvm_runtime" in line})
"""
    out = run_python(RUN + script, path, env={"MEGA_TVM_RUNTIME": variable})
    assert out.splitlines() == ["True", "[]", str({str(file)})]


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("/no/such/place", "MEGA_TVM_RUNTIME names '/no/such/place'"),
        ("text.so", "cannot be loaded"),
        ("libc.so.6", "not the runtime library of TVM 0.27"),
        ("", "MEGA_TVM_RUNTIME is not set"),
    ],
    ids=["missing", "no library", "another library", "none"],
)
def test_an_unusable_runtime_library_is_refused(artifact, run_python, tmp_path, variable, words):
    (tmp_path / "text.so").write_text("text")
    if variable == "text.so":
        variable = str(tmp_path / variable)
    if variable == "libc.so.6":
        variable = str(next(Path("/lib").rglob("libc.so.6")))
    script = """
import importlib.metadata, mega_tvm.runtime_library
def nothing(name):
    raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.distribution = nothing
try:
    mega_tvm.load(sys.argv[1])
except mega_tvm.runtime.IncompatibleArtifactError as error:
    print(error)
"""
    assert words in run_python(script, artifact, env={"MEGA_TVM_RUNTIME": variable})


def test_tvm_can_be_imported_after_loading(artifact, run_python):
    # And a kernel of the compiler's run, from torch to torch.
    after = """
import tvm, torch, tvm_ffi
x = torch.arange(4.0)
print(np.from_dlpack(tvm.runtime.from_dlpack(x)).tolist() == x.tolist())
print(tvm.__version__)
"""
    script = "import mega_tvm, numpy as np, sys" + RUN + after
    out = run_python(script, artifact, env={"MEGA_TVM_RUNTIME": ""}, prelude="")
    assert out.split()[0] == out.split()[-2] == "True"
    assert out.split()[-1].startswith("0.27")


def test_torch_is_not_imported_and_works_afterwards(artifact, run_python):
    script = """
import sys, numpy as np, mega_tvm
model = mega_tvm.load(sys.argv[1])
print("torch" in sys.modules)
import torch
y = model(torch.ones(1, 4, 16))
print(torch.from_dlpack(y).tolist() == [[4.0 + i for i in range(16)]])
"""
    assert run_python(script, artifact, prelude="").split() == ["False", "True"]


def test_import_of_the_package_is_light(run_python):
    script = """
print([m for m in ("torch", "tvm", "tvm_ffi", "reference") if m in sys.modules])
mega_tvm.load, mega_tvm.MegaConfig
print([m for m in ("torch", "tvm", "reference.torch_mega") if m in sys.modules])
"""
    assert run_python(script).splitlines() == ["[]", "[]"]


def test_version_is_the_project_s():
    project = Path(mega_tvm.__file__).parents[1] / "pyproject.toml"
    assert f'\nversion = "{mega_tvm.__version__}"\n' in project.read_text()


def test_metadata_and_entries(artifact, model):
    assert model.metadata["target"]["name"] == "x86-64-v3"
    assert [entry.name for entry in model.entries] == ["main", "main_b2", "long"]
    assert model.entries[1].input_shape == (2, 4, 16)
    assert model.entries[1].output_shape == (2, 16)
    assert model.num_threads == 1
    assert str(artifact) in repr(model)
    model.warmup()


def test_missing_cpu_features_are_named(edited):
    features = ["avx2", "avx1024", "fma", "warp_drive"]
    path = edited(lambda m: m["target"].update(cpu_features=features))
    with pytest.raises(IncompatibleArtifactError, match=r"lacks avx1024, warp_drive; compile"):
        load(path)


def test_amx_tiles_are_granted_or_refused_with_a_reason():
    try:
        _request_amx("model.so")
    except IncompatibleArtifactError as error:
        assert "model.so: uses AMX tiles, which this kernel does not grant (" in str(error)
    else:
        assert "amx_tile" in Path("/proc/cpuinfo").read_text()


@pytest.mark.parametrize("package", ["tvm", "tvm_ffi"])
def test_other_versions_are_refused(edited, package):
    path = edited(lambda m: m["versions"].update({package: "0.99.1"}))
    name = f"apache-{package}".replace("_", "-")
    with pytest.raises(IncompatibleArtifactError, match=rf"compiled with {name} 0\.99\.1, found"):
        load(path)


def test_patch_releases_are_accepted(edited):
    def change(manifest):
        for package in ("tvm", "tvm_ffi"):
            major, minor, *_ = manifest["versions"][package].split(".")
            manifest["versions"][package] = f"{major}.{minor}.99"

    load(edited(change))


def test_a_missing_entry_is_named(edited):
    path = edited(lambda m: m["entries"][0].update(name="nope"))
    with pytest.raises(DamagedArtifactError, match=r"an entry 'nope', which the library does not"):
        load(path)


def test_an_output_that_the_manifest_does_not_announce_is_refused(edited):
    model = load(edited(lambda m: m["entries"][0]["output"].update(shape=[1, 17])))
    with pytest.raises(DamagedArtifactError, match=r"does not take what its manifest says"):
        model(np.zeros((1, 4, 16), np.float32))


def test_a_library_without_a_virtual_machine(edited, artifact):
    # The code of another kind of library, under a manifest that vouches for it.
    other = next(Path("/lib").rglob("libm.so.6")).read_bytes()
    _, manifest = split(artifact)
    padding = -len(other) % 64
    manifest["library"] = {"sha256": hashlib.sha256(other).hexdigest(), "bytes": len(other)}
    manifest["tensors"] = {
        "offset": len(other) + padding,
        "bytes": 0,
        "sha256": hashlib.sha256(b"").hexdigest(),
        "items": [],
    }
    path = edited(lambda m: None)
    path.write_bytes(join(other + bytes(padding), json.dumps(manifest).encode()))
    with pytest.raises(DamagedArtifactError, match=r"entry 'main', which the library does not"):
        load(path)


def with_bias(bias):
    return [TENSORS[0], bias, TENSORS[2]]


def test_tensors_are_as_written_and_aligned(model):
    assert len(model.tensors) == len(TENSORS)
    for tensor, expected in zip(model.tensors, TENSORS, strict=True):
        array = np.from_dlpack(tensor)
        np.testing.assert_array_equal(array, expected, strict=True)
        assert array.ctypes.data % 64 == 0


def test_a_model_without_tensors(tmp_path):
    path = write_artifact(build_executable(()), MANIFEST, tmp_path / "model.so")
    model = load(path)
    assert len(model.tensors) == 0
    assert model.metadata["tensors"]["bytes"] == 0
    x = np.arange(64, dtype=np.float32).reshape(1, 4, 16)
    np.testing.assert_array_equal(model(x), x.sum(axis=1))


def test_a_machine_of_one_s_own(model):
    called = []

    def instrument(_function, name, before, _result, *_arguments):
        if before:
            called.append(name)

    machine = model.new_machine()
    machine["set_instrument"](tvm_ffi.convert(instrument))
    x = aligned_empty((2, 4, 16))
    x[...] = 2
    y = np.from_dlpack(model.invoke(machine["main_b2"], x))
    np.testing.assert_array_equal(y, [BIAS + 8] * 2)
    assert "column_sums_main_b2" in called
    count = len(called)
    np.testing.assert_array_equal(model(x), [BIAS + 8] * 2)
    assert len(called) == count


def test_tensors_outlive_the_model(artifact):
    tensors = load(artifact).tensors
    gc.collect()
    np.testing.assert_array_equal(np.from_dlpack(tensors[1]), BIAS)


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages"
)
def test_large_tensors_ask_for_huge_pages(tmp_path):
    tensors = [TENSORS[0], BIAS, np.zeros(3 << 20, np.int8)]
    path = write_artifact(build_executable(tensors), MANIFEST, tmp_path / "model.so", tensors)
    model = load(path)
    address = np.from_dlpack(model.tensors[0]).ctypes.data
    assert address % (2 << 20) == 0
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif found and line.startswith("VmFlags:"):
            assert {"hg", "wr"} <= set(line.split())
            assert "sh" not in line.split()
            return
    pytest.fail("the mapping is not found")


def test_large_tensors_are_in_memory_once(executable, run_python, tmp_path):
    large = np.arange(14 << 18, dtype=np.float32)
    tensors = [TENSORS[0], BIAS, large]
    path = write_artifact(build_executable(tensors), MANIFEST, tmp_path / "large.so", tensors)
    script = """
import tvm_ffi
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
small = mega_tvm.load(sys.argv[1])
before = resident()
model = mega_tvm.load(sys.argv[2])
model(np.ones((1, 4, 16), np.float32))
print(14 <= resident() - before <= 18)
large = np.from_dlpack(model.tensors[2])
print((large == np.arange(14 << 18)).all(), large.ctypes.data % 64)
del model, small, large
print(resident() - before < 3)
"""
    small = write_artifact(executable, MANIFEST, tmp_path / "small.so", TENSORS)
    assert run_python(script, small, path).splitlines() == ["True", "True 0", "True"]


def test_a_replaced_file_is_loaded_anew(artifact, executable, tmp_path):
    path = Path(shutil.copy(artifact, tmp_path / "model.so"))
    x = np.zeros((1, 4, 16), np.float32)
    first = load(path)
    assert write_artifact(executable, MANIFEST, path, with_bias(BIAS + 100)) == path
    second, again = load(path), load(path)
    np.testing.assert_array_equal(first(x), [BIAS])
    np.testing.assert_array_equal(second(x), [BIAS + 100])
    np.testing.assert_array_equal(again(x), [BIAS + 100])
