"""Reads and writes ``.safetensors`` files: Edifice's export and our own.

The file is a u64 length, a JSON header of that length, then the tensors' bytes. It is read here
and not with the ``safetensors`` package, which accepts a key that stands twice and does not name
the tensor where shape and offsets disagree; reading then needs NumPy alone. Edifice does not pad
the header, so that the data may be unaligned.
"""

from __future__ import annotations

import functools
import json
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import WeightsError
from reference.config import MegaConfig

from .checkpoint import Params
from .names import to_axon, to_dotted
from .stored import (
    StoredCheckpoint,
    StoredTensor,
    check_shape,
    check_spans,
    clip,
    parse_json,
    widen_bfloat16,
)

CONFIG_KEY = "mega_config"

_MAX_HEADER = 4 << 20  # a tensor takes about 100 bytes of it: 40 000 tensors
_DTYPES = {
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F32": ("float32", 4),
    "F64": ("float64", 8),
    "BOOL": ("bool", 1),
    **{f"I{bits}": (f"int{bits}", bits // 8) for bits in (8, 16, 32, 64)},
    **{f"U{bits}": (f"uint{bits}", bits // 8) for bits in (8, 16, 32, 64)},
}


def read_safetensors(data: bytes) -> StoredCheckpoint:
    """List what a ``.safetensors`` file holds.

    Raises
    ------
    WeightsError
        If it is malformed, or our metadata in it is.
    """
    if len(data) < 8:
        raise WeightsError(f"not a .safetensors file: {len(data)} bytes, shorter than its length")
    size = int.from_bytes(data[:8], "little")
    if size > min(_MAX_HEADER, len(data) - 8):
        raise WeightsError(
            f"not a .safetensors file, or truncated: it claims a header of {size} bytes, "
            f"{len(data) - 8} follow (at most {_MAX_HEADER} are allowed)"
        )
    try:
        text = data[8 : 8 + size].decode("utf-8")
    except UnicodeDecodeError as error:
        raise WeightsError(f"the header is not UTF-8: {error}") from error
    header = parse_json(text, "the header")
    body = memoryview(data)[8 + size :]

    stored = StoredCheckpoint("safetensors", {})
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WeightsError("the header's __metadata__ is not a map of strings")
    stored.metadata = dict(metadata)
    if CONFIG_KEY in metadata:
        stored.options_label = f"the metadata ({CONFIG_KEY})"
        stored.options = parse_json(metadata[CONFIG_KEY], stored.options_label)
        stored.metadata[CONFIG_KEY] = stored.options

    spans = {}
    for dotted, entry in header.items():
        name = to_axon(dotted)
        if name in spans:
            raise WeightsError(f"tensor {clip(name)} stands twice, joined by a dot and by a slash")
        shape, dtype, spans[name] = _entry(dotted, entry)
        start, stop = spans[name]
        read = functools.partial(_decode, body, start, stop, dtype, shape)
        stored.tensors[name] = StoredTensor(shape, dtype, read)
    check_spans(spans, len(body))
    return stored


def _entry(name: str, entry: object) -> tuple[tuple[int, ...], str, tuple[int, int]]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(
            f"the header's entry of tensor {clip(name)} is not dtype, shape and data_offsets"
        )
    shape = check_shape(name, entry["shape"])
    code, offsets = entry["dtype"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise WeightsError(f"tensor {clip(name)} has an unknown dtype, {clip(code)}")
    dtype, itemsize = _DTYPES[code]
    if not (
        isinstance(offsets, list) and len(offsets) == 2 and all(type(o) is int for o in offsets)
    ):
        raise WeightsError(f"tensor {clip(name)} has data_offsets {clip(offsets)}, not two sizes")
    start, stop = offsets
    expected = math.prod(shape) * itemsize
    if stop - start != expected:
        raise WeightsError(
            f"tensor {clip(name)} claims bytes {start} to {stop}; "
            f"its shape {list(shape)} of {dtype} takes {expected}"
        )
    return shape, dtype, (start, stop)


def _decode(
    body: memoryview, start: int, stop: int, dtype: str, shape: tuple[int, ...]
) -> npt.NDArray[Any]:
    raw = body[start:stop]
    if dtype == "bfloat16":
        return widen_bfloat16(np.frombuffer(raw, "<u2")).reshape(shape)
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape)


def encode_safetensors(config: MegaConfig, params: Params) -> bytes:
    """Return the bytes of our ``.safetensors`` file: dotted names, options in the metadata.

    Raises
    ------
    WeightsError
        If the ``safetensors`` package is missing.
    """
    try:
        from safetensors.numpy import save
    except ImportError as error:
        raise WeightsError(
            "writing .safetensors needs the safetensors package: pip install mega-tvm[compile]"
        ) from error
    metadata = {CONFIG_KEY: json.dumps(config.to_dict())}
    return save({to_dotted(name): array for name, array in params.items()}, metadata)
