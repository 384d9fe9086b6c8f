"""Opens zip archives (``.npz``, ``.pt``) that may lie about their sizes."""

from __future__ import annotations

import io
import struct
import zipfile

from mega_tvm.errors import WeightsError

from .stored import clip, expansion_limit

_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}


def open_zip(data: bytes) -> zipfile.ZipFile:
    """Open an archive of which no member can expand beyond `expansion_limit`.

    Raises
    ------
    WeightsError
        If it is malformed, encrypted, holds a name twice, or could be a bomb.
    """
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    # zipfile decodes names and offsets of the directory without checks of its own.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        ValueError,
        OverflowError,
        struct.error,
        IndexError,
    ) as error:
        raise WeightsError(f"not a zip archive, or truncated: {error}") from error
    members = archive.infolist()
    names = set()
    for member in members:
        if member.filename in names:
            raise WeightsError(f"member {clip(member.filename)} stands twice in the archive")
        names.add(member.filename)
        if member.compress_type not in _METHODS or member.flag_bits & 1:
            raise WeightsError(
                f"member {clip(member.filename)} is encrypted, or compressed by a method other "
                "than deflate"
            )
    # Summed, because members of a bomb may all share the same compressed bytes.
    compressed = sum(member.compress_size for member in members)
    expanded = sum(member.file_size for member in members)
    if compressed > len(data):
        raise WeightsError(
            f"the archive's members claim {compressed} compressed bytes, the file has {len(data)}"
        )
    if expanded > expansion_limit(compressed):
        raise WeightsError(
            f"the archive claims to decompress from {compressed} bytes to {expanded}, "
            "more than it can plausibly hold"
        )
    return archive
