"""The file format of a compiled model, read with the standard library alone.

A compiled model is one file::

    ELF shared library            what the linker wrote
    padding                       zeros, to a multiple of 64 bytes
    tensors                       what the library's functions take as their second argument
    manifest                      JSON, UTF-8
    footer, 48 bytes:
        sha256                    32 bytes, of the manifest's bytes
        length                    u64, little-endian, of the manifest in bytes
        magic                     8 bytes, b"MEGATVM1"

The dynamic loader ignores what follows the ELF image, so the file loads as it is. The footer holds
the manifest to its digest, and the manifest holds the library and the tensors to theirs
(``library.sha256``, ``tensors.sha256``), so that every byte is covered before any code of the file
runs.

Tensors are C-ordered and little-endian. Each starts at the first multiple of 64 at or after the end
of the one before it, and zeros are between; ``tensors.items`` lists their offsets from
``tensors.offset``, shapes and types.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import stat
import struct
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from mega_tvm import elf
from mega_tvm.errors import (
    ArtifactError,
    DamagedArtifactError,
    IncompatibleArtifactError,
    NotAnArtifactError,
    UntrustedArtifactError,
)
from mega_tvm.manifest_schema import manifest_problem, round_up

# 2: kernels take arrays at any address; those of 1 crash on an input that is not aligned.
FORMAT_VERSION = 2
MAGIC = b"MEGATVM1"

_FOOTER = struct.Struct("<32sQ8s")  # sha256, length, magic
_MAX_MANIFEST = 16 << 20
_RECOMPILE = "compile the model again"


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Return the bytes of a manifest as the trailer holds them.

    Raises
    ------
    ArtifactError
        If a field is missing or of the wrong type, or a value has no JSON form.
    """
    if wrong := manifest_problem(manifest):
        raise ArtifactError(f"manifest: {wrong}")
    try:
        text = json.dumps(manifest, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode()
    except (TypeError, ValueError) as error:  # ValueError: NaN, a cycle, a lone surrogate
        raise ArtifactError(f"manifest: cannot be written as JSON: {error}") from error


def append_trailer(
    path: str | os.PathLike[str], manifest: Mapping[str, Any], tensors: Iterable[memoryview] = ()
) -> None:
    """Append tensors, a manifest and its footer to a library.

    Parameters
    ----------
    path : path-like
        A library without a trailer; synchronised to disk when this returns.
    manifest : mapping
    tensors : iterable of memoryview
        The bytes that ``manifest["tensors"]`` describes, in pieces.

    Raises
    ------
    ArtifactError
        If the manifest is not valid.
    """
    text = encode_manifest(manifest)
    with open(path, "ab") as file:
        file.write(bytes(round_up(file.tell()) - file.tell()))
        for piece in tensors:
            file.write(piece)
        file.write(text + _FOOTER.pack(hashlib.sha256(text).digest(), len(text), MAGIC))
        file.flush()
        os.fsync(file.fileno())


def open_artifact(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading.

    Raises
    ------
    NotAnArtifactError
        If there is none, or it cannot be read.
    """
    name = os.fspath(path)
    try:
        # Pipes and devices would block, or have no end.
        if not stat.S_ISREG(os.stat(name).st_mode):
            raise NotAnArtifactError(f"{name}: expected a compiled model, found no regular file")
        return open(name, "rb")
    except FileNotFoundError as error:
        raise NotAnArtifactError(f"{name}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise NotAnArtifactError(f"{name!r}: cannot be read: {error}") from error


def pinned(file: BinaryIO, name: str, sha256: str) -> BinaryIO:
    """Return a file's bytes as they are now, if they have a digest that the caller names.

    All is read once, so that nobody changes it between this check and its use.

    Parameters
    ----------
    file : binary file
    name : str
    sha256 : str
        In hex, of the whole file, as ``sha256sum`` prints it.

    Raises
    ------
    UntrustedArtifactError
        If it differs.
    """
    if not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise ValueError(f"sha256 must be 64 hexadecimal digits, found {sha256!r}")
    file.seek(0)
    data = file.read()
    found = hashlib.sha256(data).hexdigest()
    if found != sha256.lower():
        raise UntrustedArtifactError(
            f"{name}: expected a file with sha256 {sha256.lower()}, found {found}; it was not "
            "opened as a library. Take the file or its digest again from where you trust them"
        )
    return io.BytesIO(data)


def read_manifest(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read and check the manifest of a compiled model; library and tensors are not read.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    dict

    Raises
    ------
    NotAnArtifactError
        If the file cannot be read or has no manifest.
    DamagedArtifactError
        If its lengths, digest or fields are not what the compiler writes.
    IncompatibleArtifactError
        If it is of another format version or for another kind of machine.
    """
    with open_artifact(path) as file:
        return read_manifest_from(file, os.fspath(path))


def read_manifest_from(file: BinaryIO, name: str) -> dict[str, Any]:
    """Read and check a manifest as `read_manifest` does, from an open file."""
    try:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(64)
        file.seek(max(0, size - _FOOTER.size))
        footer = file.read(_FOOTER.size)
        length = _check_footer(name, size, head, footer)
        end = size - _FOOTER.size - length
        file.seek(end)
        text = file.read(length)
    except OSError as error:
        raise NotAnArtifactError(f"{name}: cannot be read: {error}") from error
    if hashlib.sha256(text).digest() != footer[:32]:
        raise DamagedArtifactError(
            f"{name}: the manifest's bytes do not have the digest in the footer; "
            f"copy the file again, or {_RECOMPILE}"
        )
    manifest = _parse(name, text)
    _check_machine(name, head)
    expected = manifest["tensors"]["offset"] + manifest["tensors"]["bytes"]
    if expected != end:
        raise DamagedArtifactError(
            f"{name}: expected a library and tensors of {expected} bytes, "
            f"found {end}; copy the file again, or {_RECOMPILE}"
        )
    return manifest


def read_library(file: BinaryIO, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Read the library, and check what was read: its digest, its ELF headers, the padding behind.

    Returns
    -------
    bytes

    Raises
    ------
    DamagedArtifactError
        If they are not what the compiler wrote.
    """
    expected = manifest["library"]["sha256"]
    file.seek(0)
    image = file.read(manifest["library"]["bytes"])
    found = hashlib.sha256(image).hexdigest()
    if found != expected:
        raise DamagedArtifactError(
            f"{name}: expected a library with sha256 {expected}, found {found}; "
            f"copy the file again, or {_RECOMPILE}"
        )
    if wrong := elf.elf_problem(image):
        raise DamagedArtifactError(f"{name}: {wrong}; {_RECOMPILE}")
    padding = file.read(manifest["tensors"]["offset"] - manifest["library"]["bytes"])
    if any(padding):
        raise DamagedArtifactError(
            f"{name}: expected zeros between library and tensors, found {padding!r}; "
            f"copy the file again, or {_RECOMPILE}"
        )
    return image


def read_tensors(
    file: BinaryIO, name: str, manifest: Mapping[str, Any], memory: memoryview
) -> None:
    """Read the tensors, and check what was read against the manifest's digest.

    Parameters
    ----------
    file : binary file
    name : str
    manifest : mapping
    memory : memoryview
        Writable bytes, as many as ``manifest["tensors"]["bytes"]``.

    Raises
    ------
    DamagedArtifactError
        If they differ.
    """
    expected = manifest["tensors"]["sha256"]
    file.seek(manifest["tensors"]["offset"])
    count = file.readinto(memory)  # type: ignore[attr-defined]
    found = hashlib.sha256(memory[:count]).hexdigest()
    if found != expected:
        raise DamagedArtifactError(
            f"{name}: expected tensors with sha256 {expected}, found {found}; "
            f"copy the file again, or {_RECOMPILE}"
        )


def library_digest(file: BinaryIO, length: int) -> str:
    """Return the sha256, in hex, of the first bytes of a file."""
    digest = hashlib.sha256()
    file.seek(0)
    while length > 0 and (block := file.read(min(length, 1 << 20))):
        digest.update(block)
        length -= len(block)
    return digest.hexdigest()


def _check_footer(name: str, size: int, head: bytes, footer: bytes) -> int:
    if size == 0:
        raise NotAnArtifactError(f"{name}: expected a compiled model, found an empty file")
    if not head.startswith(elf.MAGIC):
        raise NotAnArtifactError(
            f"{name}: expected a compiled model (an ELF shared library), "
            f"found a file that starts with {head[:8]!r}"
        )
    if len(footer) < _FOOTER.size or not footer.endswith(MAGIC):
        what = f"{name}: expected {MAGIC!r} at the end of the file, found {footer[-8:]!r}"
        end = elf.image_end(head)
        if size < end:
            raise DamagedArtifactError(
                f"{what}: a library of {end} bytes was cut off after {size}; copy the file again"
            )
        if size > end:
            raise DamagedArtifactError(
                f"{what}: a compiled model that was cut off or changed behind its library, or "
                f"another kind of file; copy it again, or {_RECOMPILE}"
            )
        raise NotAnArtifactError(
            f"{what}: another kind of shared library, or a compiled model that was stripped"
        )
    length = int(_FOOTER.unpack(footer)[1])
    if not 2 <= length <= min(size - _FOOTER.size, _MAX_MANIFEST):
        raise DamagedArtifactError(
            f"{name}: the footer states a manifest of {length} bytes in a file of {size} "
            f"(at most {_MAX_MANIFEST}); copy the file again, or {_RECOMPILE}"
        )
    return length


def _parse(name: str, text: bytes) -> dict[str, Any]:
    try:
        manifest = json.loads(text.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"{name}: the manifest is not JSON: {error}") from error
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    # Before the fields: another version has other fields.
    if type(version) is int and version != FORMAT_VERSION:
        raise IncompatibleArtifactError(
            f"{name}: expected format version {FORMAT_VERSION}, found {version}; "
            f"{_RECOMPILE}, or install the mega_tvm that wrote it"
        )
    if wrong := manifest_problem(manifest):
        raise DamagedArtifactError(f"{name}: manifest: {wrong}; {_RECOMPILE}")
    assert isinstance(manifest, dict)
    return manifest


def _refuse_constant(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _check_machine(name: str, head: bytes) -> None:
    if len(head) < 20:
        raise DamagedArtifactError(f"{name}: the ELF header is cut off; {_RECOMPILE}")
    if found := elf.other_machine(head):
        raise IncompatibleArtifactError(
            f"{name}: expected a 64-bit little-endian x86-64 library, found {found}; "
            "compile the model for this machine"
        )
