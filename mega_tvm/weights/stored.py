"""What every reader hands over, and the limits that every reader keeps.

A reader lists a file's tensors without decoding them, so that names and shapes are checked
before anything large is allocated.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import WeightsError

# dtype names that become float32; a reader hands bfloat16 over as float32 already.
FLOAT_DTYPES = ("float32", "float16", "bfloat16", "float64")

_MAX_RANK = 8
_MAX_SIZE = 1 << 62
_MAX_DEFLATE_RATIO = 1032  # deflate cannot do better: 258 bytes from 2 bits
# Trained float32 weights shrink by a tenth; zeros and ones reach the ratio above. A large file
# that does is a bomb, a small one does no harm.
_MAX_PLAUSIBLE_RATIO = 100
_HARMLESS_SIZE = 64 << 20

Options: TypeAlias = dict[str, object]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor as a file lists it.

    Parameters
    ----------
    shape : tuple of int
    dtype : str
        NumPy's name of the dtype in the file, or ``"bfloat16"``.
    read : callable
        Decodes the tensor: a float array of ``shape``.
    """

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], npt.NDArray[Any]]


@dataclasses.dataclass
class StoredCheckpoint:
    """A file's tensors under Axon names, and what it says of its options.

    Parameters
    ----------
    format : str
    tensors : dict of str to StoredTensor
    options : dict
        Options that the file states.
    options_label : str
        What states them, for error messages.
    metadata : dict
        Plain JSON-like values.
    warnings : list of str
    """

    format: str
    tensors: dict[str, StoredTensor]
    options: Options = dataclasses.field(default_factory=dict)
    options_label: str = ""
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)


def expansion_limit(compressed: int) -> int:
    """Return how many bytes that many deflated bytes may become before it is called a bomb."""
    possible = _MAX_DEFLATE_RATIO * compressed + 1024
    return min(possible, max(_HARMLESS_SIZE, _MAX_PLAUSIBLE_RATIO * compressed))


def widen_bfloat16(bits: npt.NDArray[np.uint16]) -> npt.NDArray[np.float32]:
    """Return the float32 values whose upper 16 bits these are."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def check_shape(name: str, shape: object) -> tuple[int, ...]:
    """Return a shape that a file claims as a tuple.

    Raises
    ------
    WeightsError
        If it is not a short sequence of sizes.
    """
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) > _MAX_RANK
        or not all(type(dim) is int and 0 <= dim < _MAX_SIZE for dim in shape)
    ):
        raise WeightsError(
            f"tensor {clip(name)} has the shape {clip(shape)}; "
            f"expected at most {_MAX_RANK} sizes, none negative"
        )
    return tuple(shape)


def check_spans(spans: dict[str, tuple[int, int]], size: int) -> None:
    """Check that the tensors' ``(start, end)`` byte ranges tile ``size`` bytes of data exactly.

    Raises
    ------
    WeightsError
        At a range out of the data, two that overlap, or bytes that belong to no tensor.
    """
    for name, (start, stop) in spans.items():
        if not 0 <= start <= stop:
            raise WeightsError(f"tensor {clip(name)} claims bytes {start} to {stop} of the data")
        if stop > size:
            raise WeightsError(
                f"tensor {clip(name)} claims bytes {start} to {stop}, but the file holds only "
                f"{size} bytes of tensor data: it is truncated or damaged"
            )
    end, previous = 0, ""
    for name, (start, stop) in sorted(spans.items(), key=lambda item: item[1]):
        if start < end:
            raise WeightsError(
                f"tensors {clip(previous)} and {clip(name)} overlap: "
                f"one ends at byte {end}, the other starts at {start}"
            )
        if start > end:
            raise WeightsError(f"bytes {end} to {start} of the data belong to no tensor")
        end, previous = stop, name
    if end != size:
        raise WeightsError(f"{size - end} bytes follow the last tensor's data")


def parse_json(text: str | bytes, what: str) -> dict[str, Any]:
    """Parse a JSON object of an untrusted file; a key that stands twice is refused.

    Raises
    ------
    WeightsError
        If it is not a JSON object.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys: dict[str, Any] = {}
        for key, value in pairs:
            if key in keys:
                raise WeightsError(f"{what} holds the key {clip(key)} more than once")
            keys[key] = value
        return keys

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{what} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise WeightsError(f"{what} is a JSON {type(parsed).__name__}, not an object")
    return parsed


def clip(value: object, limit: int = 120) -> str:
    """Return ``repr(value)`` cut to a length that an error message can carry."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def listing(items: list[str], limit: int = 50) -> str:
    """Join items of an untrusted file for an error message, at most ``limit`` of them."""
    shown = ", ".join(items[:limit])
    return shown if len(items) <= limit else f"{shown} and {len(items) - limit} more"
