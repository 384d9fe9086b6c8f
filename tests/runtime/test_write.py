"""Writing an artifact: whole or not at all, and what stands in the way is told."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest

from mega_tvm import load
from mega_tvm.artifact import write_artifact
from mega_tvm.errors import ArtifactError, CompileError
from tests.runtime.builders import BIAS, TENSORS


class Fails:
    def __init__(self, error):
        self.error = error

    def export_library(self, file_name, **_):
        with open(file_name, "wb") as file:
            file.write(b"\x7fELF half of a library")
        raise self.error


@pytest.mark.parametrize("name", ["model.so", "with space.so", "größe \N{SNOWMAN}.so", "a.b.so"])
def test_any_name(executable, manifest, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path = write_artifact(executable, manifest, name, TENSORS)
    assert path == tmp_path / name
    assert sorted(os.listdir()) == sorted([name, name[:-3] + ".json"])
    np.testing.assert_array_equal(load(name)(np.zeros((1, 4, 16), np.float32)), [BIAS])


def test_the_longest_name(executable, manifest, tmp_path):
    name = "n" * 250 + ".so"
    assert write_artifact(executable, manifest, tmp_path / name).name == name


@pytest.mark.parametrize("error", [RuntimeError("ld: no"), KeyboardInterrupt(), MemoryError()])
def test_a_failure_leaves_what_was_there(executable, manifest, tmp_path, error):
    (tmp_path / "model.so").write_text("before")
    expected = CompileError if isinstance(error, RuntimeError) else type(error)
    with pytest.raises(expected):
        write_artifact(Fails(error), manifest, tmp_path / "model.so")
    assert os.listdir(tmp_path) == ["model.so"]
    assert (tmp_path / "model.so").read_text() == "before"


@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_rename(executable, manifest, tmp_path, monkeypatch, existing):
    if existing:
        (tmp_path / "model.json").write_text("before")
    replace = os.replace

    def fail_for_library(source, target):
        if str(target).endswith(".so"):
            raise PermissionError(1, "not permitted")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_library)
    with pytest.raises(CompileError, match=r"model\.so: cannot be written: .*not permitted"):
        write_artifact(executable, manifest, tmp_path / "model.so")
    assert os.listdir(tmp_path) == (["model.json"] if existing else [])


def test_a_full_disk(executable, manifest, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mega_tvm.artifact.append_trailer", full)
    with pytest.raises(CompileError, match="No space left"):
        write_artifact(executable, manifest, tmp_path / "model.so")
    assert os.listdir(tmp_path) == []


def test_unsuitable_paths(executable, manifest, tmp_path):
    def refuses(path, words):
        with pytest.raises(CompileError, match=words):
            write_artifact(executable, manifest, path)

    refuses(tmp_path / "model", r"ends in \.so, such as model\.so")
    refuses(tmp_path / "model.dll", r"ends in \.so")
    refuses(tmp_path / "no" / "model.so", "there is no directory")
    (tmp_path / "dir.so").mkdir()
    refuses(tmp_path / "dir.so", "is a directory")
    (tmp_path / "model.json").mkdir()
    refuses(tmp_path / "model.so", r"model\.json: is a directory")
    if not os.access("/proc", os.W_OK) or os.geteuid() == 0:
        refuses("/proc/model.so", "cannot be written")


def test_no_linker(executable, manifest, tmp_path, monkeypatch):
    for variable in ("CXX", "CC"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CompileError, match=r"apt install g\+\+"):
        write_artifact(executable, manifest, tmp_path / "model.so")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match="names 'no-such-compiler'"):
        write_artifact(executable, manifest, tmp_path / "model.so")
    false = tmp_path / "false"
    false.write_text("#!/bin/sh\necho out of registers\nexit 1\n")
    false.chmod(0o755)
    monkeypatch.setenv("CXX", str(false))
    with pytest.raises(CompileError, match=r"(?s)cannot be linked: .*out of registers"):
        write_artifact(executable, manifest, tmp_path / "model.so")
    assert os.listdir(tmp_path) == ["false"]


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (np.zeros((2, 0)), r"tensors\.items\[1\]\.shape\[1\] must be at least 1"),
        (np.zeros(2, np.complex64), r"dtype must match bool\|int8.*, found 'complex64'"),
        (np.array(["text"]), r"dtype must match bool\|int8.*, found 'str128'"),
    ],
    ids=["empty", "complex", "text"],
)
def test_unsuitable_tensors_are_told_before_linking(manifest, tmp_path, tensor, words):
    with pytest.raises(ArtifactError, match=words):
        write_artifact(
            Fails(AssertionError("linked")), manifest, tmp_path / "model.so", [BIAS, tensor]
        )


def test_tensors_of_any_layout(executable, manifest, tmp_path):
    wide = np.zeros((16, 3), ">f4")
    wide[:, 1] = BIAS
    tensors = [TENSORS[0], wide[:, 1], TENSORS[2]]
    model = load(write_artifact(executable, manifest, tmp_path / "model.so", tensors))
    np.testing.assert_array_equal(model(np.zeros((1, 4, 16), np.float32)), [BIAS])


def test_writing_and_loading_print_nothing(executable, manifest, tmp_path, capfd):
    load(write_artifact(executable, manifest, tmp_path / "model.so", TENSORS)).warmup()
    assert capfd.readouterr() == ("", "")


def test_a_bad_manifest_is_told_before_linking(manifest, tmp_path):
    del manifest["target"]
    with pytest.raises(ArtifactError, match="target is missing"):
        write_artifact(Fails(AssertionError("linked")), manifest, tmp_path / "model.so")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda n: n.name)
def test_an_interrupt_leaves_nothing(manifest, tmp_path, number):
    class Slow:
        def export_library(self, file_name, **_):
            with open(file_name, "wb"):
                os.write(linking, b"x")
            for _ in range(6000):  # a signal just ahead of one long sleep would be seen after it
                time.sleep(0.01)

    started, linking = os.pipe()
    child = os.fork()  # a new process would import TVM first
    if child == 0:
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            write_artifact(Slow(), manifest, tmp_path / "model.so")
        except KeyboardInterrupt:
            os._exit(128 + signal.SIGINT)
        except SystemExit as leave:
            os._exit(leave.code)
        finally:
            os._exit(1)
    assert os.read(started, 1) == b"x"
    assert len(os.listdir(tmp_path)) == 1
    os.kill(child, number)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 128 + number
    assert os.listdir(tmp_path) == []


def test_signal_handlers_are_put_back(executable, manifest, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    write_artifact(executable, manifest, tmp_path / "model.so")
    assert signal.getsignal(signal.SIGTERM) == before
