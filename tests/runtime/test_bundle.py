"""A bundle: complete, small, built and run in C++ where nothing of Python is seen."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from mega_tvm import load
from mega_tvm.bundle import write_bundle
from mega_tvm.compile import main
from mega_tvm.errors import CompileError, NotAnArtifactError
from mega_tvm.thread_pool import available_cpus
from tests.runtime.builders import join, split

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


def build_plain(bundle, folder, source="example/main.cpp", flags=()):
    program = folder / "run_model"
    run(
        *("g++", "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *flags),
        *("-isystem", "include", source, "-L.", "-ltvm_ffi", "-ltvm_runtime"),
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


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 59, 13), []),
        ((1, 59, 13), ["--threads", "2"]),
        ((3, 29, 13), []),
        ((2, 58, 13), ["--threads", "2"]),
    ],
)
def test_other_shapes_and_threads(bundle, program, many_shapes, tmp_path, shape, options):
    model = load(many_shapes, num_threads=min(2 if options else 1, available_cpus()))
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    x.tofile(tmp_path / "x.f32")
    options = [*options, "--shape", ",".join(map(str, shape))]
    files = [tmp_path / "x.f32", tmp_path / "y.f32"]
    out = run(program, "model.so", *options, *files, cwd=bundle).stdout
    y = np.fromfile(files[1], np.float32).reshape(shape[0], -1)
    np.testing.assert_array_equal(y, model(x))
    assert out.startswith(f"{model.entry_at(shape).name}: ")
    assert f"threads {model.num_threads}," in out


def test_the_example_streams(bundle, program, many_shapes, tmp_path):
    model = load(many_shapes)
    x = np.random.default_rng(2).standard_normal((3, 59, 13), dtype=np.float32)
    x.tofile(tmp_path / "x.f32")
    files = [tmp_path / "x.f32", tmp_path / "y.f32"]
    run(program, "model.so", "--stream", "--shape", "3,59,13", *files, cwd=bundle)
    stream = model.stream(3)
    stream.prefill(x[:, :29])
    for t in range(29, 59):
        expected = stream.step(x[:, t])
    y = np.fromfile(files[1], np.float32).reshape(expected.shape)
    np.testing.assert_array_equal(y, expected)


def test_a_bad_shape_is_refused_with_the_list(bundle, program, many_shapes):
    known = [str(list(entry.input_shape)) for entry in load(many_shapes).entries]
    known += map(str, load(many_shapes).symbolic_entries)
    bad = run(program, "model.so", "--shape", "1,59,14", cwd=bundle, status=1)
    assert f"expected an array of shape {' or '.join(known)}, found [1, 59, 14]" in bad.stderr
    bad = run(program, "model.so", "--threads", "0", cwd=bundle, status=1)
    assert "num_threads must be positive, found 0" in bad.stderr


def test_the_header(bundle, tmp_path_factory):
    folder, source = tmp_path_factory.mktemp("header"), Path(__file__).parent / "check_header.cpp"
    flags = ["-D_GLIBCXX_ASSERTIONS", "-pthread"]
    program = build_plain(bundle, folder, source, flags)
    assert run(program, "model.so", cwd=bundle).stdout == "done\n"


def test_a_model_that_cannot_stream_says_why(bundle, program, many_shapes, tmp_path):
    body, manifest = split(many_shapes)
    manifest["stream"] = {"left_out": "of a reason"}
    (tmp_path / "model.so").write_bytes(join(body, json.dumps(manifest).encode()))
    bad = run(program, "model.so", "--stream", cwd=tmp_path, status=1)
    assert "cannot stream: of a reason" in bad.stderr
    run(program, "model.so", cwd=tmp_path)


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.pop("entries"), "its manifest is damaged"),
        (lambda m: m["entries"][0].update(workspace=-1), "workspace cannot be -1"),
        (lambda m: m["entries"][0]["input"].update(shape=[1 << 30, 1 << 30]), "cannot be"),
        (lambda m: m["symbolic_entries"][0]["limits"].pop("batch"), "its manifest is damaged"),
        (lambda m: m["entries"][0].update(name="none"), "the library lacks its entry none"),
        (lambda m: m["tensors"].update(bytes=1), "states other lengths than the file has"),
    ],
    ids=["no entries", "workspace", "huge", "no limits", "no function", "lengths"],
)
def test_a_wrong_manifest_is_refused(bundle, program, many_shapes, tmp_path, change, words):
    body, manifest = split(many_shapes)
    change(manifest)
    (tmp_path / "bad.so").write_bytes(join(body, json.dumps(manifest).encode()))
    stderr = run(program, "bad.so", cwd=tmp_path, status=1).stderr
    assert stderr.startswith("error: bad.so: ") and words in stderr


def test_what_it_holds(bundle, many_shapes):
    run("sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS", cwd=bundle)
    files = {str(file.relative_to(bundle)) for file in bundle.rglob("*") if file.is_file()}
    listed = {line.split("  ", 1)[1] for line in (bundle / "SHA256SUMS").read_text().splitlines()}
    assert files == listed | {"SHA256SUMS"}
    assert {
        *("model.so", "model.json", "libtvm_runtime.so", "libtvm_ffi.so"),
        *(
            "include/mega_tvm.h",
            "include/mega_tvm/stream.h",
            "include/tvm/ffi/tvm_ffi.h",
            "include/dlpack/dlpack.h",
        ),
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
