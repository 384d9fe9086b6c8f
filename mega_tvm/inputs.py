"""What a model's call accepts: checks with their messages, and aligned memory."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import InputError
from mega_tvm.manifest_schema import ALIGNMENT

CPU = 1  # kDLCPU


def as_array(x: Any) -> npt.NDArray[Any]:
    """Return a NumPy view of an array on the CPU.

    Raises
    ------
    InputError
        If it is none.
    """
    if isinstance(x, np.ndarray):
        # The type first: NumPy imports np.ma at its first use, which takes 10 ms.
        if type(x) is not np.ndarray and isinstance(x, np.ma.MaskedArray):
            raise InputError("expected an array without a mask; use x.filled(value)")
        return x
    if not hasattr(x, "__dlpack__") or not hasattr(x, "__dlpack_device__"):
        raise InputError(
            f"expected a NumPy array or an object with __dlpack__, found {type(x).__name__}; "
            "use numpy.asarray(x, dtype=numpy.float32)"
        )
    try:
        device = int(x.__dlpack_device__()[0])
        if device == CPU:
            return np.from_dlpack(x)
    except Exception as error:  # each exporter raises its own
        raise InputError(
            f"expected a float32 array, found a {type(x).__name__} that NumPy cannot read "
            f"({error}); torch: x.detach().float()"
        ) from error
    raise InputError(
        f"expected an array on the CPU, found one on DLPack device type {device}; "
        "copy it to the CPU first (torch: x.cpu())"
    )


def check_values(array: npt.NDArray[Any], check_finite: bool) -> None:
    """Refuse an array that is not native float32 and, if asked for, one with NaN or infinity.

    Raises
    ------
    InputError
    """
    if array.dtype != np.float32:  # '>f4' differs too
        raise InputError(dtype_message(array.dtype))
    if check_finite and not np.isfinite(array).all():
        raise InputError(f"expected finite values, found {_non_finite(array)}")


def as_frames(
    x: Any, shape: tuple[int | None, ...], check_finite: bool, owner: str = ""
) -> npt.NDArray[np.float32]:
    """Return a NumPy view of frames, checked.

    Parameters
    ----------
    x : array
    shape : tuple of int or None
        None where any size will do.
    check_finite : bool
        Refuse NaN and infinity.
    owner : str
        What a message of a wrong shape adds.

    Raises
    ------
    InputError
    """
    array = as_array(x)
    fits = len(array.shape) == len(shape) and all(
        want in (None, found) for want, found in zip(shape, array.shape, strict=True)
    )
    if not fits:
        names = ", ".join("n" if size is None else str(size) for size in shape)
        raise InputError(f"expected an array of shape [{names}], found {list(array.shape)}{owner}")
    check_values(array, check_finite)
    return array


def positive(name: str, value: object) -> int:
    """Return a positive integer.

    Raises
    ------
    ValueError
        If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a positive integer, found {value!r}")
    return value


def as_output(out: Any, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return a NumPy view of an array that takes a result.

    Raises
    ------
    InputError
        If it cannot take a float32 array of this shape.
    """
    array = as_array(out)
    if array.shape != shape:
        raise InputError(f"expected an out of shape {list(shape)}, found {list(array.shape)}")
    if array.dtype != np.float32:
        raise InputError(f"out: {dtype_message(array.dtype)}")
    if not array.flags.writeable:
        raise InputError(
            "expected a writable out, found a read-only array (torch: out=tensor.numpy())"
        )
    return array


def dtype_message(dtype: np.dtype[Any]) -> str:
    """Say what is wrong with a dtype that is not native float32."""
    advice = "use x.astype(numpy.float32)"
    if dtype.kind == "f" and not dtype.isnative:
        return f"expected float32 in native byte order, found {dtype.str}; {advice}"
    if dtype.kind in "cOSUV":
        advice = "the model takes real numbers"
    return f"expected float32, found {dtype}; {advice} (a conversion is never made silently)"


def _non_finite(array: npt.NDArray[np.float32]) -> str:
    """Say how many elements are not finite, and where the first is."""
    index = np.argwhere(~np.isfinite(array))
    return f"{len(index)} others, the first {array[tuple(index[0])]} at {index[0].tolist()}"


def aligned_empty(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Return an array of undefined values at an address that kernels can read."""
    size = math.prod(shape) * 4
    if size > sys.maxsize // 2:
        raise MemoryError  # which NumPy says in another way
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -_address(raw) % ALIGNMENT
    return raw[start : start + size].view(np.float32).reshape(shape)


def aligned_bytes(size: int) -> npt.NDArray[np.uint8]:
    """Return at least so many bytes of undefined values, and at least one, as `aligned_empty`."""
    return aligned_empty((max(1, -(-size // 4)),)).view(np.uint8)


def _address(array: npt.NDArray[Any]) -> int:
    address: int = array.__array_interface__["data"][0]  # half the time of array.ctypes.data
    return address
