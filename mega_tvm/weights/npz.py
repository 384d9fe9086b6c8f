"""Reads and writes ``.npz`` files: Axon names, no pickle.

``__input__``, ``__output__`` and ``__state__/...``, which test data hold beside the weights, are
passed over; ``__config__`` is where our own writer keeps the options, as JSON.
"""

from __future__ import annotations

import functools
import io
import json
import math
import zipfile
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import WeightsError
from reference.config import MegaConfig

from .checkpoint import Params
from .stored import StoredCheckpoint, StoredTensor, check_shape, clip, parse_json
from .zip_bounds import open_zip

CONFIG_KEY = "__config__"

_IGNORED = ("__input__", "__output__")
_IGNORED_PREFIX = "__state__/"
_MAX_CONFIG_BYTES = 1 << 16


def read_npz(data: bytes) -> StoredCheckpoint:
    """List what a ``.npz`` file holds.

    Raises
    ------
    WeightsError
        If it is malformed, or our options in it are.
    """
    archive = open_zip(data)
    stored = StoredCheckpoint("npz", {})
    for member in archive.infolist():
        name = member.filename.removesuffix(".npy")
        if name == member.filename:
            raise WeightsError(f"member {clip(name)} is not an array (.npy): not a .npz file")
        if name in _IGNORED or name.startswith(_IGNORED_PREFIX):
            continue
        shape, dtype = _header(archive, member, name)
        read = functools.partial(_read_array, archive, member, name)
        if name != CONFIG_KEY:
            stored.tensors[name] = StoredTensor(shape, dtype.name, read)
            continue
        if dtype.kind != "U" or shape != () or dtype.itemsize > _MAX_CONFIG_BYTES:
            raise WeightsError(f"{CONFIG_KEY} is {dtype} of shape {list(shape)}, not one string")
        stored.options_label = CONFIG_KEY
        stored.options = parse_json(_unicode(read()), CONFIG_KEY)
        stored.metadata[CONFIG_KEY] = stored.options
    return stored


def _header(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    what = f"array {clip(name)}"
    try:
        with archive.open(member) as file:
            version = np.lib.format.read_magic(file)
            if version == (1, 0):
                shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            elif version == (2, 0):
                shape, _, dtype = np.lib.format.read_array_header_2_0(file)
            else:
                raise WeightsError(f"{what}: version {version} of the .npy format is not known")
            start = file.tell()
    except WeightsError:
        raise
    # NumPy evaluates the header as a Python literal: what that raises has no common class.
    except Exception as error:
        raise WeightsError(f"{what} has no readable header: {error}") from error
    shape = check_shape(name, shape)
    expected = math.prod(shape) * dtype.itemsize
    if member.file_size - start != expected:
        raise WeightsError(
            f"{what} holds {member.file_size - start} bytes; "
            f"its shape {list(shape)} of {dtype} takes {expected}"
        )
    if dtype.hasobject:
        raise WeightsError(f"{what} holds Python objects, which are not read")
    return shape, dtype


def _read_array(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> npt.NDArray[Any]:
    try:
        with archive.open(member) as file:
            array: npt.NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
            return array
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError) as error:
        raise WeightsError(f"array {clip(name)} is damaged: {error}") from error


def _unicode(array: npt.NDArray[Any]) -> str:
    order = "be" if array.dtype.str.startswith(">") else "le"
    try:  # not str(array), which fails without a ValueError at code points beyond Unicode
        return array.tobytes().decode(f"utf-32-{order}").rstrip("\0")
    except UnicodeDecodeError as error:
        raise WeightsError(f"{CONFIG_KEY} is not text: {error}") from error


def encode_npz(config: MegaConfig, params: Params) -> bytes:
    """Return the bytes of our ``.npz`` file: Axon names, options under ``__config__``."""
    file = io.BytesIO()
    arrays: dict[str, Any] = {CONFIG_KEY: np.array(json.dumps(config.to_dict())), **params}
    np.savez(file, **arrays)
    return file.getvalue()
