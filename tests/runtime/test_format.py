"""Every malformed file is refused with one clear error, before any of its code runs."""

from __future__ import annotations

import ctypes.util
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path

import pytest

from mega_tvm import load
from mega_tvm.artifact_format import append_trailer, read_manifest
from mega_tvm.errors import (
    ArtifactError,
    DamagedArtifactError,
    IncompatibleArtifactError,
    NotAnArtifactError,
)
from tests.runtime.builders import MANIFEST, join, split


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


def test_the_file_is_as_documented(artifact):
    library, manifest = split(artifact)
    assert manifest == read_manifest(artifact)
    assert manifest == json.loads(artifact.with_suffix(".json").read_text("utf-8"))
    assert manifest["library"]["bytes"] == len(library)
    assert manifest["library"]["sha256"] == hashlib.sha256(library).hexdigest()
    assert manifest["format_version"] == 1
    assert set(manifest["versions"]) == {"mega_tvm", "tvm", "tvm_ffi", "llvm"}
    assert manifest | MANIFEST == manifest


def test_append_trailer_writes_what_read_manifest_reads(artifact, tmp_path):
    library, manifest = split(artifact)
    manifest["weights"]["source"] = "gewählt \N{SNOWMAN}"
    path = tmp_path / "model.so"
    path.write_bytes(library)
    append_trailer(path, manifest)
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
    refuses(b"\x7fELF", NotAnArtifactError, "at the end of the file")
    refuses(b"Dear reader,\n" * 50, NotAnArtifactError, "ELF shared library", "b'Dear rea'")
    libm = next(iter(Path("/lib").rglob("libm.so.6")), None) or ctypes.util.find_library("m")
    refuses(Path(libm), NotAnArtifactError, "another kind of shared library")


def test_truncated_files_are_refused(artifact, tmp_path):
    data = artifact.read_bytes()
    library, _ = split(artifact)
    lengths = {*range(80), *range(0, len(data), 997), *range(len(library) - 3, len(data))}
    path = tmp_path / "cut.so"
    for length in lengths:
        path.write_bytes(data[:length])
        with pytest.raises(NotAnArtifactError):
            read_manifest(path)


def test_appended_or_missing_bytes_are_refused(artifact, refuses):
    library, manifest = split(artifact)
    text = json.dumps(manifest).encode()
    refuses(join(library, text) + b"\n", NotAnArtifactError)
    refuses(join(library + b"\0", text), DamagedArtifactError, "expected a library of")
    refuses(join(library[:-1], text), DamagedArtifactError, "expected a library of")
    refuses(join(library, text) + join(b"", text), DamagedArtifactError, "expected a library of")


def test_flipped_bits_of_manifest_and_footer_is_refused(artifact, tmp_path):
    data = bytearray(artifact.read_bytes())
    library, _ = split(artifact)
    path = tmp_path / "flipped.so"
    for i in [*range(len(library), len(data) - 48, 3), *range(len(data) - 48, len(data))]:
        data[i] ^= 1 << i % 8
        path.write_bytes(data)
        with pytest.raises((NotAnArtifactError, DamagedArtifactError)):
            read_manifest(path)
        data[i] ^= 1 << i % 8


def test_flipped_bytes_of_the_library_are_refused_by_load(artifact, tmp_path):
    data = bytearray(artifact.read_bytes())
    library, _ = split(artifact)
    path = tmp_path / "flipped.so"
    for i in range(20, len(library), 131):
        data[i] ^= 0x10
        path.write_bytes(data)
        with pytest.raises(DamagedArtifactError, match="expected a library with sha256"):
            load(path)
        data[i] ^= 0x10


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
    library, manifest = split(artifact)
    changed = library[:offset] + value + library[offset + len(value) :]
    text = json.dumps(manifest).encode()
    refuses(join(changed, text), IncompatibleArtifactError, "compile the model for", *words)


def test_lengths_in_the_footer_are_bounded(artifact, refuses):
    library, _ = split(artifact)
    for length in (0, 1, len(library) + 1, 1 << 40, (1 << 64) - 1):
        footer = struct.pack("<32sQ8s", hashlib.sha256(b"").digest(), length, b"MEGATVM1")
        refuses(library + footer, DamagedArtifactError, f"a manifest of {length} bytes")


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
        b'{"format_version": 1}',
    ],
    ids=lambda t: repr(t[:20]),
)
def test_other_json_is_refused(artifact, refuses, text):
    refuses(join(split(artifact)[0], text), DamagedArtifactError, "manifest")


def test_another_format_version_is_refused(artifact, refuses):
    for version in (0, 2, 10**30):
        text = json.dumps({"format_version": version}).encode()
        refuses(
            join(split(artifact)[0], text),
            IncompatibleArtifactError,
            f"expected format version 1, found {version}",
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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(entries=[]), "entries must not be empty"),
        (lambda m: m["entries"].append(m["entries"][0]), "different input shapes"),
        (lambda m: m["entries"][0]["input"].update(dtype="float64"), "entries[0].input.dtype"),
        (lambda m: m["entries"][0]["input"].update(shape=[1, -4, 16]), "shape[1] must be positive"),
        (lambda m: m["library"].update(sha256="A" * 64), "library.sha256 must match"),
        (lambda m: m["target"].update(kind="cuda"), "target.kind must match llvm"),
        (lambda m: m["versions"].update(tvm_ffi="newest"), "versions.tvm_ffi must match"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_other_values_are_refused(edited, refuses, change, words):
    refuses(edited(lambda m: change(m)), DamagedArtifactError, words)


def test_unknown_fields_are_allowed(edited):
    path = edited(lambda m: m.update(note={"deep": [1, None, 2.5]}))
    assert load(path).metadata["note"] == {"deep": [1, None, 2.5]}


def test_unreadable_file(artifact, tmp_path):
    path = tmp_path / "secret.so"
    shutil.copy(artifact, path)
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file")
    with pytest.raises(NotAnArtifactError, match="cannot be read"):
        read_manifest(path)
