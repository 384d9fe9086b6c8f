"""Reads PyTorch files (``.pt``, ``.pth``): a ``state_dict``, alone or beside its options.

A bare mapping of dotted names to tensors, or ``{"state_dict": ..., "config": {...}}``. Files are
unpickled with ``weights_only``, which runs no code of theirs. The format from before PyTorch 1.6,
not a zip archive, is refused: it allocates what a file claims.
"""

from __future__ import annotations

import functools
import io
import zipfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from mega_tvm.errors import WeightsError

from .names import to_axon
from .stored import StoredCheckpoint, StoredTensor, check_shape, clip
from .zip_bounds import open_zip

if TYPE_CHECKING:
    import torch

_STATE_KEY, _CONFIG_KEY = "state_dict", "config"


def read_torch(data: bytes) -> StoredCheckpoint:
    """List what a ``.pt`` or ``.pth`` file holds.

    Raises
    ------
    WeightsError
        If it is malformed, would run code, or PyTorch is missing.
    """
    if not data.startswith(b"PK\x03\x04"):
        raise WeightsError(
            "not a PyTorch file in the zip format: save it again with torch.save of "
            "PyTorch 1.6 or newer"
        )
    archive = open_zip(data)
    if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
        raise WeightsError("a PyTorch file with compressed members: torch.save writes none")
    try:
        damaged = archive.testzip()  # PyTorch does not compare checksums
    except (zipfile.BadZipFile, ValueError, EOFError, OSError) as error:
        raise WeightsError(f"a damaged PyTorch file: {error}") from error
    if damaged:
        raise WeightsError(f"member {clip(damaged)} of a PyTorch file does not match its checksum")
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            "reading .pt and .pth needs PyTorch: pip install mega-tvm[compile]"
        ) from error
    try:
        content = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
    # A damaged pickle makes the unpickler raise nearly anything.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"PyTorch cannot load it, or refuses to run what it holds: {reason}"
        ) from error
    return _list(content, len(data))


def _list(content: object, size: int) -> StoredCheckpoint:
    import torch

    stored = StoredCheckpoint("torch", {})
    if isinstance(content, Mapping) and isinstance(content.get(_STATE_KEY), Mapping):
        config = content.get(_CONFIG_KEY, {})
        if not isinstance(config, dict) or not all(
            isinstance(key, str) and isinstance(value, (bool, int, float, str, type(None)))
            for key, value in config.items()
        ):
            raise WeightsError(f"{_CONFIG_KEY!r} beside the state_dict is not a dict of options")
        stored.options_label, stored.options = repr(_CONFIG_KEY), config
        stored.metadata[_CONFIG_KEY] = config
        content = content[_STATE_KEY]
    if not isinstance(content, Mapping):
        raise WeightsError(f"holds {type(content).__name__}, not a state_dict")
    total = 0
    for dotted, tensor in content.items():
        # Subclasses may have no memory behind their shape, or run code of their own.
        if not isinstance(dotted, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise WeightsError(
                f"entry {clip(dotted)} is {type(tensor).__name__}; "
                "a state_dict maps names to tensors"
            )
        name = to_axon(dotted)
        if name in stored.tensors:
            raise WeightsError(f"tensor {clip(name)} stands twice, joined by a dot and by a slash")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.is_nested:
            raise WeightsError(
                f"tensor {clip(dotted)} is sparse, quantized, nested or empty of data"
            )
        shape = check_shape(dotted, tuple(tensor.shape))
        # Tensors may share and repeat bytes: what they take apart must have been in the file.
        total += tensor.numel() * tensor.element_size()
        if total > size:
            raise WeightsError(
                f"the tensors up to {clip(dotted)} take {total} bytes, more than the file's "
                f"{size}: save each with memory of its own (tensor.contiguous().clone())"
            )
        dtype = str(tensor.dtype).removeprefix("torch.")
        stored.tensors[name] = StoredTensor(shape, dtype, functools.partial(_decode, name, tensor))
    return stored


def _decode(name: str, tensor: torch.Tensor) -> npt.NDArray[Any]:
    import torch

    detached = tensor.detach().resolve_neg()
    if detached.dtype == torch.bfloat16:  # which NumPy does not know
        detached = detached.float()
    try:
        array: npt.NDArray[Any] = detached.numpy()
    except (RuntimeError, TypeError) as error:
        raise WeightsError(f"tensor {clip(name)} cannot be read: {error}") from error
    return array
