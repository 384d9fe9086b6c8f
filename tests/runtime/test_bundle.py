"""A bundle: complete, small, built and run in C++ where nothing of Python is seen."""

from __future__ import annotations

import os
import shutil
import subprocess

import numpy as np
import pytest

from mega_tvm import load
from mega_tvm.bundle import write_bundle
from mega_tvm.compile import main
from mega_tvm.errors import CompileError, NotAnArtifactError

# g++ needs as, ld and cc1plus of its own, and nothing of ours.
CLEAN = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": "/nonexistent"}


@pytest.fixture(scope="module")
def bundle(many_shapes, tmp_path_factory):
    return write_bundle(many_shapes, tmp_path_factory.mktemp("host") / "a bundle")


def run(*command, cwd, status=0):
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=CLEAN, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done


def build_plain(bundle, folder):
    program = folder / "run_model"
    run(
        *("g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"),
        *("-isystem", "include", "example/main.cpp", "-L.", "-ltvm_ffi", "-ltvm_runtime"),
        *(f"-Wl,-rpath,{bundle}", "-o", program),
        cwd=bundle,
    )
    return program


def build_cmake(bundle, folder):
    run("cmake", "-S", "example", "-B", folder, cwd=bundle)
    run("cmake", "--build", folder, cwd=bundle)
    return folder / "run_model"


@pytest.fixture(
    scope="module",
    params=[
        "g++",
        pytest.param(
            "cmake", marks=pytest.mark.skipif(shutil.which("cmake") is None, reason="no CMake")
        ),
    ],
)
def program(request, bundle, tmp_path_factory):
    build = build_plain if request.param == "g++" else build_cmake
    return build(bundle, tmp_path_factory.mktemp("build"))


def test_the_example_computes_what_python_does(bundle, program, many_shapes, tmp_path):
    model = load(many_shapes)
    x = np.random.default_rng(0).standard_normal(model.entries[0].input_shape, dtype=np.float32)
    x.tofile(tmp_path / "x.f32")
    out = run(program, "model.so", tmp_path / "x.f32", tmp_path / "y.f32", cwd=bundle).stdout
    y = np.fromfile(tmp_path / "y.f32", np.float32).reshape(model.entries[0].output_shape)
    np.testing.assert_array_equal(y, model(x))
    assert out.startswith(f"{model.entries[0].name}: {x.size} -> {y.size} floats, ")


def test_the_example_runs_from_anywhere_and_tells_what_is_wrong(bundle, program, tmp_path):
    run(program, bundle / "model.so", cwd=tmp_path)
    data = (bundle / "model.so").read_bytes()
    for content, words in [
        (b"text", "not a compiled model"),
        (data[:-1], "not a compiled model"),
        (data[:5000] + data[-3000:], "is damaged"),
    ]:
        (tmp_path / "bad.so").write_bytes(content)
        assert words in run(program, "bad.so", cwd=tmp_path, status=1).stderr
    assert "cannot be opened" in run(program, "none.so", cwd=tmp_path, status=1).stderr
    (tmp_path / "x.f32").write_bytes(bytes(4))
    bad = run(program, bundle / "model.so", "x.f32", "y.f32", cwd=tmp_path, status=1)
    assert "x.f32: expected " in bad.stderr and not (tmp_path / "y.f32").exists()
    assert run(program, cwd=tmp_path, status=2).stderr.startswith("usage:")


def test_what_it_holds(bundle, many_shapes):
    run("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS", cwd=bundle)
    files = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    listed = {line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()}
    assert files == listed | {"SHA256SUMS"}
    assert {
        *("model.so", "model.json", "libtvm_runtime.so", "libtvm_ffi.so"),
        *("include/mega_tvm.h", "include/tvm/ffi/tvm_ffi.h", "include/dlpack/dlpack.h"),
        *("example/main.cpp", "example/CMakeLists.txt"),
        *("licenses/mega-tvm/LICENSE", "licenses/apache-tvm-ffi/LICENSE"),
    } <= files
    assert (bundle / "model.so").read_bytes() == many_shapes.read_bytes()
    weights = load(many_shapes).metadata["tensors"]["bytes"]
    assert sum((bundle / file).stat().st_size for file in files) - weights < 15e6


def test_python_runs_it_too(bundle, run_python):
    script = """
print(mega_tvm.load(sys.argv[1]).entries[0].name)
with open("/proc/self/maps") as maps:
    print({line.split(maxsplit=5)[5].strip() for line in maps if "libtvm_runtime" in line})
"""
    out = run_python(script, bundle / "model.so", env={"MEGA_TVM_RUNTIME": ""}).splitlines()
    assert out[1] == str({str(bundle / "libtvm_runtime.so")})


def test_other_destinations_are_refused_and_left_alone(many_shapes, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("kept")
    (tmp_path / "link").symlink_to("full")
    for name, words in [
        ("full", "is not empty"),
        ("full/file", "is no directory"),
        ("link", "is no directory"),
        ("none/there", "create it first"),
    ]:
        with pytest.raises(CompileError, match=words):
            write_bundle(many_shapes, tmp_path / name)
    with pytest.raises(NotAnArtifactError):
        write_bundle(tmp_path / "full" / "file", tmp_path / "new")
    assert sorted(os.listdir(tmp_path)) == ["full", "link"]
    (tmp_path / "empty").mkdir()
    assert write_bundle(many_shapes, tmp_path / "empty") == tmp_path / "empty"


def test_a_failure_leaves_nothing(many_shapes, tmp_path, monkeypatch):
    def full_disk(source, target):
        if str(target).endswith("SHA256SUMS") or "licenses" in str(target):
            raise OSError(28, "No space left on device")
        return copy(source, target)

    copy = shutil.copyfile
    monkeypatch.setattr(shutil, "copyfile", full_disk)
    with pytest.raises(CompileError, match=r"cannot be written: .*No space left"):
        write_bundle(many_shapes, tmp_path / "new")
    assert os.listdir(tmp_path) == []


def test_the_command(tmp_path, capsys):
    options = ["--embed-dim=13", "--hidden-size=16", "--ema-dim=3", "--num-layers=1"]
    options += ["--seq-len=5", "--target=x86-64-v3"]
    assert main([*options, f"--bundle={tmp_path / 'bundle'}"]) == 0
    assert f"bundled into {tmp_path / 'bundle'} (" in capsys.readouterr().out
    assert load(tmp_path / "bundle" / "model.so").entries[0].input_shape == (1, 5, 13)
    assert main([*options, f"--bundle={tmp_path / 'bundle'}"]) == 2
    assert "is not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*options, f"--bundle={tmp_path / 'other'}", "-o", "x.so"])
    assert "give one of them" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["bundle"]
