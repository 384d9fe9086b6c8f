"""Every malformed file is refused with one clear error, before any of its code runs."""

from __future__ import annotations

import ctypes.util
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from mega_tvm import load
from mega_tvm.artifact_format import append_trailer, read_manifest
from mega_tvm.errors import (
    ArtifactError,
    DamagedArtifactError,
    IncompatibleArtifactError,
    NotAnArtifactError,
)
from tests.runtime.builders import MANIFEST, TENSORS, join, split


@pytest.fixture
def refuses(tmp_path):
    """Check that a file is refused by this error, whose message names it and holds these words."""

    def check(content, error, *words):
        path = content
        if isinstance(content, bytes):
            path = tmp_path / "bad.so"
            path.write_bytes(content)
        for read in (read_manifest, load):
            with pytest.raises(ArtifactError) as info:
                read(path)
            assert type(info.value) is error, repr(info.value)
            assert str(path) in str(info.value)
            for word in words:
                assert word in str(info.value)

    return check


@pytest.fixture
def refuses_load(tmp_path):
    """Check that these bytes are refused by `load`, with these words."""

    def check(data, words):
        path = tmp_path / "bad.so"
        path.write_bytes(data)
        with pytest.raises(DamagedArtifactError, match=words):
            load(path)

    return check


def test_the_file_is_as_documented(artifact):
    body, manifest = split(artifact)
    assert manifest == read_manifest(artifact)
    assert manifest == json.loads(artifact.with_suffix(".json").read_text("utf-8"))
    library, tensors = manifest["library"], manifest["tensors"]
    end, start = library["bytes"], tensors["offset"]
    assert hashlib.sha256(body[:end]).hexdigest() == library["sha256"]
    assert (start - 64 < end <= start, start % 64, set(body[end:start]) <= {0}) == (True, 0, True)
    assert len(body) == start + tensors["bytes"]
    blob = body[start:]
    assert hashlib.sha256(blob).hexdigest() == tensors["sha256"]
    assert len(tensors["items"]) == len(TENSORS)
    for item, tensor in zip(tensors["items"], TENSORS, strict=True):
        assert item["offset"] % 64 == 0
        read = np.frombuffer(blob, item["dtype"], tensor.size, item["offset"])
        np.testing.assert_array_equal(read.reshape(item["shape"]), tensor, strict=True)
    assert manifest["format_version"] == 2
    assert set(manifest["versions"]) == {"mega_tvm", "tvm", "tvm_ffi", "llvm"}
    assert manifest | MANIFEST == manifest


def test_append_trailer_writes_what_read_manifest_reads(artifact, tmp_path):
    body, manifest = split(artifact)
    manifest["weights"]["source"] = "gewählt \N{SNOWMAN}"
    path = tmp_path / "model.so"
    path.write_bytes(body[: manifest["library"]["bytes"]])
    blob = memoryview(body)[manifest["tensors"]["offset"] :]
    append_trailer(path, manifest, [blob[:5], blob[5:]])
    assert path.read_bytes()[: len(body)] == body
    assert read_manifest(path) == manifest
    before = path.read_bytes()
    for bad in ({**manifest, "dtype": 1}, {**manifest, "config": {"a": float("nan")}}):
        with pytest.raises(ArtifactError, match="manifest: "):
            append_trailer(path, bad)
    assert path.read_bytes() == before


def test_what_is_no_file_is_refused(refuses, tmp_path):
    refuses(tmp_path / "missing.so", NotAnArtifactError, "no such file")
    refuses(tmp_path, NotAnArtifactError, "no regular file")
    os.mkfifo(tmp_path / "pipe.so")
    refuses(tmp_path / "pipe.so", NotAnArtifactError, "no regular file")
    with pytest.raises(NotAnArtifactError, match="cannot be read"):
        read_manifest("nul\0.so")


def test_other_files_are_refused(refuses):
    refuses(b"", NotAnArtifactError, "empty file")
    refuses(b"\x7fELF", DamagedArtifactError, "cut off after 4")
    refuses(b"Dear reader,\n" * 50, NotAnArtifactError, "ELF shared library", "b'Dear rea'")
    libm = next(iter(Path("/lib").rglob("libm.so.6")), None) or ctypes.util.find_library("m")
    refuses(Path(libm), NotAnArtifactError, "another kind of shared library")


def test_truncated_files_are_refused(artifact, tmp_path):
    data = artifact.read_bytes()
    body, manifest = split(artifact)
    library = manifest["library"]["bytes"]
    lengths = {*range(80), *range(0, len(data), 997), *range(len(body) - 3, len(data))}
    path = tmp_path / "cut.so"
    for length in lengths | {library - 1, library, library + 1}:
        path.write_bytes(data[:length])
        # The library alone may be anybody's; less than its header says, or more, is damage.
        whole = length < 4 or length == library
        with pytest.raises(NotAnArtifactError if whole else DamagedArtifactError):
            read_manifest(path)


def test_appended_or_missing_bytes_are_refused(artifact, refuses):
    body, manifest = split(artifact)
    text = json.dumps(manifest).encode()
    refuses(join(body, text) + b"\n", DamagedArtifactError, "changed behind its library")
    refuses(join(body + b"\0", text), DamagedArtifactError, "expected a library and tensors of")
    refuses(join(body[:-1], text), DamagedArtifactError, "expected a library and tensors of")
    refuses(
        join(body, text) + join(b"", text),
        DamagedArtifactError,
        "expected a library and tensors of",
    )


def test_flipped_bits_of_manifest_and_footer_is_refused(artifact, tmp_path):
    data = bytearray(artifact.read_bytes())
    body, _ = split(artifact)
    path = tmp_path / "flipped.so"
    for i in [*range(len(body), len(data) - 48, 3), *range(len(data) - 48, len(data))]:
        data[i] ^= 1 << i % 8
        path.write_bytes(data)
        with pytest.raises((NotAnArtifactError, DamagedArtifactError)):
            read_manifest(path)
        data[i] ^= 1 << i % 8


def test_flipped_bits_of_library_and_tensors_are_refused_by_load(artifact, tmp_path):
    data = bytearray(artifact.read_bytes())
    body, manifest = split(artifact)
    path = tmp_path / "flipped.so"

    def refuses(places, words):
        for i in places:
            data[i] ^= 1 << i % 8
            path.write_bytes(data)
            with pytest.raises(DamagedArtifactError, match=words):
                load(path)
            data[i] ^= 1 << i % 8

    end, start = manifest["library"]["bytes"], manifest["tensors"]["offset"]
    refuses([*range(20, end, 131), end - 1], "expected a library with sha256")
    refuses(range(start, len(body)), "expected tensors with sha256")


@pytest.mark.parametrize("cut", range(3))
def test_padding_behind_the_library_is_zeros(artifact, refuses_load, cut):
    # A shorter library, so that there is some padding whatever the linker wrote.
    body, manifest = split(artifact)
    end = manifest["tensors"]["offset"] - 2
    library = body[:end]
    manifest["library"] = {"bytes": end, "sha256": hashlib.sha256(library).hexdigest()}
    padding = [b"\1\0", b"\0\1", b"\xff\xff"][cut]
    data = join(library + padding + body[end + 2 :], json.dumps(manifest).encode())
    refuses_load(data, "expected zeros between library and tensors")


@pytest.mark.parametrize(
    ("offset", "value", "words"),
    [
        (18, struct.pack("<H", 183), ("64-bit AArch64",)),
        (18, struct.pack("<H", 999), ("machine 999",)),
        (4, b"\1", ("32-bit x86-64",)),
        (5, b"\2", ("not little-endian",)),
    ],
    ids=["aarch64", "unknown machine", "32-bit", "big-endian"],
)
def test_another_machine_is_refused(artifact, refuses, offset, value, words):
    body, manifest = split(artifact)
    changed = body[:offset] + value + body[offset + len(value) :]
    text = json.dumps(manifest).encode()
    refuses(join(changed, text), IncompatibleArtifactError, "compile the model for", *words)


def test_lengths_in_the_footer_are_bounded(artifact, refuses):
    body, _ = split(artifact)
    for length in (0, 1, len(body) + 1, 1 << 40, (1 << 64) - 1):
        footer = struct.pack("<32sQ8s", hashlib.sha256(b"").digest(), length, b"MEGATVM1")
        refuses(body + footer, DamagedArtifactError, f"a manifest of {length} bytes")


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b"[]",
        b"null",
        b"not JSON",
        b"\xff\xfe",
        b'{"dtype": NaN}',
        b"[" * 100_000,
        b"9" * 10_000,
        b'{"format_version": "1"}',
        b'{"format_version": true}',
        b'{"format_version": 2}',
    ],
    ids=lambda t: repr(t[:20]),
)
def test_other_json_is_refused(artifact, refuses, text):
    refuses(join(split(artifact)[0], text), DamagedArtifactError, "manifest")


def test_another_format_version_is_refused(artifact, refuses):
    for version in (0, 1, 3, 10**30):
        text = json.dumps({"format_version": version}).encode()
        refuses(
            join(split(artifact)[0], text),
            IncompatibleArtifactError,
            f"expected format version 2, found {version}",
        )


def leaves(value, path=()):
    """Yield the path of every value inside a manifest."""
    if path:
        yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from leaves(item, (*path, i))


def test_missing_fields_and_other_types_are_refused(artifact, edited, refuses):
    paths = list(leaves(split(artifact)[1]))
    assert len(paths) > 50
    for path in paths:
        *parents, last = path

        def parent(manifest, parents=parents):
            for key in parents:
                manifest = manifest[key]
            return manifest

        def put(manifest, parent=parent, last=last):
            parent(manifest)[last] = 1.5

        def remove(manifest, parent=parent, last=last):
            del parent(manifest)[last]

        # What describes the weights is for people: only the object must be there.
        if parents == ["weights"]:
            continue
        refuses(edited(put), DamagedArtifactError, "manifest: ", str(last), "found 1.5")
        if isinstance(last, str):
            refuses(edited(remove), DamagedArtifactError, "manifest: ", f"{last} is missing")


def _item(manifest):
    return manifest["tensors"]["items"][1]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(entries=[]), "entries must not be empty"),
        (lambda m: m["entries"].append(m["entries"][0]), "different input shapes"),
        (lambda m: m["entries"][0]["input"].update(dtype="float64"), "entries[0].input.dtype"),
        (
            lambda m: m["entries"][0]["input"].update(shape=[1, -4, 16]),
            "shape[1] must be at least 1",
        ),
        (lambda m: m["library"].update(sha256="A" * 64), "library.sha256 must match"),
        (lambda m: m["target"].update(kind="metal"), "target.kind must match llvm|cuda"),
        (lambda m: m["target"].update(kind="cuda"), "target.archs is missing"),
        (lambda m: m["versions"].update(tvm_ffi="newest"), "versions.tvm_ffi must match"),
        (lambda m: m["tensors"].update(bytes=-1), "tensors.bytes must be at least 0"),
        (lambda m: m["tensors"].update(bytes=0), "tensors.bytes must be 136, found 0"),
        (lambda m: m["tensors"].update(bytes=137), "tensors.bytes must be 136, found 137"),
        (lambda m: m["tensors"].update(items=[]), "tensors.bytes must be 0, found 136"),
        (lambda m: m["tensors"].update(offset=64), "tensors.offset must be"),
        (lambda m: m["tensors"].update(sha256=""), "tensors.sha256 must match"),
        (lambda m: m["library"].update(bytes=1), "tensors.offset must be 64"),
        (lambda m: _item(m).update(offset=-64), "items[1].offset must be at least 0"),
        (lambda m: _item(m).update(offset=0), "items[1].offset must be 64, found 0"),
        (lambda m: _item(m).update(offset=68), "items[1].offset must be 64, found 68"),
        (lambda m: _item(m).update(offset=1 << 70), "items[1].offset must be 64, found 118"),
        (lambda m: _item(m).update(shape=[17]), "items[2].offset must be 192, found 128"),
        (lambda m: _item(m).update(shape=[1 << 62] * 9), "tensors.items[2].offset must be"),
        (lambda m: _item(m).update(shape=[1] * 33), "must have at most 32 items, found 33"),
        (lambda m: _item(m).update(shape=[0]), "items[1].shape[0] must be at least 1"),
        (
            lambda m: _item(m).update(dtype="float64"),
            "tensors.items[2].offset must be 192, found 128",
        ),
        (lambda m: _item(m).update(dtype="object"), "items[1].dtype must match bool|int8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_values_are_refused(edited, refuses, change, words):
    refuses(edited(lambda m: change(m)), DamagedArtifactError, words)


def test_unknown_fields_are_allowed(edited):
    # fast_products stands in files of earlier versions.
    path = edited(lambda m: m.update(note={"deep": [1, None, 2.5]}, fast_products=True))
    assert load(path).metadata["note"] == {"deep": [1, None, 2.5]}


def test_unreadable_file(artifact, tmp_path):
    path = tmp_path / "secret.so"
    shutil.copy(artifact, path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file")
    with pytest.raises(NotAnArtifactError, match="cannot be read"):
        read_manifest(path)
