"""Loads, saves and recognises checkpoint files; every failure is a `WeightsError`."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.atomic_write import write_atomically
from mega_tvm.errors import WeightsError
from reference.config import MegaConfig

from .assemble import as_float32, assemble, check_shapes
from .checkpoint import Checkpoint, Params
from .npz import encode_npz, read_npz
from .nx import read_nx
from .onnx_file import read_onnx
from .safetensors_file import encode_safetensors, read_safetensors
from .stored import StoredCheckpoint
from .torch_file import read_torch

_READERS: dict[str, Callable[[bytes], StoredCheckpoint]] = {
    "nx": read_nx,
    "safetensors": read_safetensors,
    "npz": read_npz,
    "torch": read_torch,
    "onnx": read_onnx,
}
_WRITERS: dict[str, Callable[[MegaConfig, Params], bytes]] = {
    ".safetensors": encode_safetensors,
    ".npz": encode_npz,
}
SUFFIXES = {
    ".nx": "nx",
    ".safetensors": "safetensors",
    ".npz": "npz",
    ".pt": "torch",
    ".pth": "torch",
    ".onnx": "onnx",
}


def load_checkpoint(
    path: str | os.PathLike[str],
    *,
    options: Mapping[str, object] | None = None,
    config: MegaConfig | None = None,
) -> Checkpoint:
    """Read a model's weights and options from a file of any known format.

    Sizes are read from the tensors' shapes, other options from what the file states. What the
    file does not state can be given; what it does state can only be confirmed.

    Parameters
    ----------
    path : path-like
        A ``.nx``, ``.safetensors``, ``.npz``, ``.pt``, ``.pth`` or ``.onnx`` file.
    options : mapping, optional
        Options of `MegaConfig` by name.
    config : MegaConfig, optional
        All options at once.

    Returns
    -------
    Checkpoint

    Raises
    ------
    WeightsError
        If the file cannot be read, is malformed, does not hold exactly one Mega model's
        tensors, or contradicts an option.
    """
    path = Path(path)
    data = _read(path)
    try:
        stored = _READERS[_format_of(path, data)](data)
        return assemble(path, stored, options, config)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except MemoryError as error:
        raise WeightsError(f"{path}: not enough memory to load it") from error


def detect_format(path: str | os.PathLike[str]) -> str:
    """Return a file's format: by its content, or by its suffix where that says nothing.

    Returns
    -------
    str
        ``"nx"``, ``"safetensors"``, ``"npz"``, ``"torch"`` or ``"onnx"``.

    Raises
    ------
    WeightsError
        If the file cannot be read, or neither tells.
    """
    path = Path(path)
    data = _read(path)
    try:
        return _format_of(path, data)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error


def save_checkpoint(
    path: str | os.PathLike[str],
    config: MegaConfig,
    params: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write options and weights to a ``.safetensors`` or ``.npz`` file.

    The file appears whole or not at all: it is written aside and renamed.

    Parameters
    ----------
    path : path-like
    config : MegaConfig
    params : mapping of str to array
        Every tensor under its Axon name; written as float32.

    Raises
    ------
    WeightsError
        If the suffix is another, the tensors are not the config's, or the file cannot be
        written.
    """
    path = Path(path)
    if path.suffix not in _WRITERS:
        raise WeightsError(f"{path}: expected a suffix of {' or '.join(_WRITERS)}")
    arrays = {name: np.asarray(array) for name, array in params.items()}
    try:
        check_shapes(config, {name: array.shape for name, array in arrays.items()})
        content = _WRITERS[path.suffix](
            config, {name: as_float32(name, array) for name, array in arrays.items()}
        )
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    try:
        write_atomically(path, content)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be written: {error}") from error


def _read(path: Path) -> bytes:
    try:
        # Devices and pipes have no size that would bound the read.
        if path.exists() and not path.is_file():
            raise WeightsError(f"{path}: not a regular file")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise WeightsError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise WeightsError(f"{path}: cannot be read: {error}") from error
    if not data:
        raise WeightsError(f"{path}: the file is empty")
    return data


def _format_of(path: Path, data: bytes) -> str:
    by_suffix = SUFFIXES.get(path.suffix)
    if data.startswith(b"PK\x03\x04"):
        # torch.save's archives hold FOLDER/data.pkl; the name also stands in the directory.
        return "torch" if b"/data.pkl" in data else "npz"
    if data[8:9] == b"{" and int.from_bytes(data[:8], "little") <= len(data) - 8:
        return "safetensors"
    if data[0] <= 1 and len(data) > 5:
        start = 5 + int.from_bytes(data[1:5], "big")
        if data[start : start + 2] == b"nx" or (data[0] == 1 and data[start : start + 1] == b"x"):
            return "nx"
    if by_suffix:
        return by_suffix  # its reader says what is wrong
    raise WeightsError(f"not a checkpoint of a known format ({', '.join(SUFFIXES)})")
