"""What runs is what was checked: digests, replaced files, permissions, ELF headers, symbols."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest

import mega_tvm.runtime
from mega_tvm import load
from mega_tvm.artifact import write_artifact
from mega_tvm.elf import elf_problem
from mega_tvm.errors import (
    DamagedArtifactError,
    IncompatibleArtifactError,
    UntrustedArtifactError,
)
from tests.runtime.builders import BIAS, MANIFEST, TENSORS, join, split

ZEROS = np.zeros((1, 4, 16), np.float32)


def digest(data):
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copy(artifact, tmp_path / "model.so")


@pytest.fixture
def other(executable, tmp_path):
    """A compiled model with another bias."""
    tensors = [TENSORS[0], BIAS + 100, TENSORS[2]]
    return write_artifact(executable, MANIFEST, tmp_path / "other.so", tensors)


def resigned(path, change):
    """Return the file with a library that a function has changed, and right digests."""
    body, manifest = split(path)
    image = bytearray(body[: manifest["library"]["bytes"]])
    tensors = body[manifest["tensors"]["offset"] :]
    image = bytes(change(image) or image)
    manifest["library"] = {"sha256": digest(image), "bytes": len(image)}
    padding = bytes(-len(image) % 64)
    manifest["tensors"]["offset"] = len(image) + len(padding)
    return join(image + padding + tensors, json.dumps(manifest).encode())


def test_the_file_s_digest_is_accepted(copy):
    right = digest(copy.read_bytes())
    for text in (right, right.upper()):
        np.testing.assert_array_equal(load(copy, sha256=text)(ZEROS), [BIAS])


def test_another_digest_is_refused_before_anything_is_read(copy, monkeypatch):
    for name in ("read_manifest_from", "load_tensors", "load_image", "runtime_library"):
        monkeypatch.setattr(mega_tvm.runtime, name, lambda *_: pytest.fail("was used"))
    wrong = digest(b"")
    with pytest.raises(UntrustedArtifactError, match=f"expected a file with sha256 {wrong}, found"):
        load(copy, sha256=wrong)


@pytest.mark.parametrize("value", ["", "0" * 63, "g" * 64, "0" * 64 + "\n"])
def test_what_is_no_digest_is_refused(copy, value):
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        load(copy, sha256=value)


@pytest.mark.parametrize("step", ["read_manifest_from", "read_library", "load_tensors"])
def test_a_file_that_takes_its_place_is_not_loaded(copy, other, monkeypatch, step):
    # By a link that is swapped after the check, and back before anyone looks.
    link = copy.with_name("link.so")
    link.symlink_to(copy)
    function = getattr(mega_tvm.runtime, step)

    def swap_then(*arguments):
        result = function(*arguments)
        link.unlink()
        link.symlink_to(other)
        return result

    monkeypatch.setattr(mega_tvm.runtime, step, swap_then)
    np.testing.assert_array_equal(load(link)(ZEROS), [BIAS])


@pytest.mark.parametrize("pin", [False, True], ids=["plain", "pinned"])
def test_a_file_written_in_place_is_refused_or_loads_as_checked(copy, other, monkeypatch, pin):
    data, replacement = copy.read_bytes(), other.read_bytes()
    assert len(data) == len(replacement)
    function = mega_tvm.runtime.read_manifest_from

    def write_then(*arguments):
        result = function(*arguments)
        copy.write_bytes(replacement)
        return result

    monkeypatch.setattr(mega_tvm.runtime, "read_manifest_from", write_then)
    if pin:
        np.testing.assert_array_equal(load(copy, sha256=digest(data))(ZEROS), [BIAS])
    else:
        with pytest.raises(DamagedArtifactError, match="expected tensors with sha256"):
            load(copy)


def test_a_loaded_model_does_not_need_its_file(copy):
    model = load(copy)
    copy.write_bytes(b"")  # in place: mapped pages would be gone
    model.warmup()
    np.testing.assert_array_equal(model(ZEROS), [BIAS])
    assert str(copy) not in Path("/proc/self/maps").read_text()


def test_models_side_by_side_and_again(copy, other):
    for _ in range(20):  # descriptors' numbers are used again
        first, second = load(copy), load(other)
        np.testing.assert_array_equal(first(ZEROS), [BIAS])
        np.testing.assert_array_equal(second(ZEROS), [BIAS + 100])
    before = len(os.listdir("/proc/self/fd"))
    load(copy)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("what", ["file", "directory"])
def test_what_every_user_can_write_gives_a_warning(copy, what):
    place = copy if what == "file" else copy.parent
    os.chmod(place, 0o777)
    with pytest.warns(RuntimeWarning, match=rf"mode 777.*chmod o-w {place}, or pass its digest"):
        load(copy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(copy, sha256=digest(copy.read_bytes()))
        os.chmod(place, 0o775)
        load(copy)
        if what == "directory":
            os.chmod(place, 0o1777)  # as /tmp
            load(copy)


def program_header(image, kind):
    """Return where the first program header of a type is."""
    start, size, count = struct.unpack_from("<Q14xHH", image, 32)
    return next(
        at
        for at in range(start, start + size * count, size)
        if struct.unpack_from("<I", image, at)[0] == kind
    )


def put(fmt, offset, value, kind=None):
    def change(image):
        struct.pack_into(fmt, image, (program_header(image, kind) if kind else 0) + offset, value)

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda image: image[:63], "the ELF header is cut off"),
        (lambda image: image[:9000], "was cut off"),
        (put("<H", 16, 2), "expected a shared library"),
        (put("<Q", 32, 1 << 40), "do not lie in the file"),
        (put("<H", 56, 60000), "do not lie in the file"),
        (put("<H", 54, 55), "do not lie in the file"),
        (put("<H", 56, 1), "no program header of type 2"),
        (put("<Q", 8, 1 << 62, kind=1), "was cut off"),
        (put("<Q", 40, 1, kind=1), "in memory"),
        (put("<Q", 16, 1 << 63, kind=1), "in memory"),
        (put("<Q", 32, 1 << 62, kind=2), "was cut off"),
    ],
)
def test_bad_elf_headers_are_refused(artifact, tmp_path, change, words):
    path = tmp_path / "bad.so"
    path.write_bytes(resigned(artifact, change))
    with pytest.raises(DamagedArtifactError, match=words):
        load(path)


def test_good_elf_headers_are_accepted(artifact):
    body, manifest = split(artifact)
    assert elf_problem(body[: manifest["library"]["bytes"]]) is None


def test_a_missing_symbol_is_told_when_loading(artifact, tmp_path):
    def rename(image):
        name = b"TVMFFIErrorSetRaisedFromCStrParts"
        assert image.count(name) >= 1
        image[:] = image.replace(name, name[:-1] + b"X")

    path = tmp_path / "bad.so"
    path.write_bytes(resigned(artifact, rename))
    with pytest.raises(IncompatibleArtifactError, match=r"undefined symbol: TVMFFIError.*PartX"):
        load(path)


def test_a_library_of_another_kind_is_refused(artifact, tmp_path):
    source = tmp_path / "other.c"
    source.write_text("int answer(void) { return 42; }\n")
    built = tmp_path / "foreign.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", built, source], check=True)
    path = tmp_path / "bad.so"
    path.write_bytes(resigned(artifact, lambda _: built.read_bytes()))
    with pytest.raises(DamagedArtifactError, match="entry 'main', which the library does not hold"):
        load(path)
