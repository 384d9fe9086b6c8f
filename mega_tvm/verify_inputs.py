"""The inputs that a compiled model is checked on, and how much each of them amplifies rounding."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import MegaError
from mega_tvm.tolerances import compare
from reference import MegaConfig, numpy_mega

Array = npt.NDArray[np.floating[Any]]
Input = npt.NDArray[np.float32]
Shape = tuple[int, ...]

# The case whose rounding the tolerance table stands for; other inputs are measured against it.
ORDINARY = "random 0"

# Axon 0.8.0's layer norm jumps by sqrt(2) where a row's variance passes eps. Float32 moves a
# variance of 1e-5 in rows of magnitude 1 by 2e-4 of itself at most: 2 * 3e-7 / sqrt(1e-5).
_JUMP_MARGIN = 1e-3


class VerificationError(MegaError):
    """A verification cannot be carried out: no weights, other weights, an unusable golden file."""


@dataclasses.dataclass(frozen=True)
class Golden:
    """An input, and the output that was stored with it.

    Parameters
    ----------
    path : Path
    x : array, [B, T, embed_dim]
    y : array, [B, hidden_size]
    """

    path: Path
    x: Input
    y: Array


def _random(seed: int, scale: float = 1.0) -> Callable[[Shape], Input]:
    def make(shape: Shape) -> Input:
        values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
        return values * np.float32(scale)

    return make


def _constant_in_time(shape: Shape) -> Input:
    frame = _random(3)((shape[0], 1, *shape[2:]))
    return np.ascontiguousarray(np.broadcast_to(frame, shape))


# Each catches what the others can miss: several seeds, a wrong element among many; large values, an
# exponential or a sum that overflows; a constant input, a scan that forgets its state; zeros, a
# bias that is lost or a division by zero; variances of 1e-6, a layer norm with another eps.
INPUTS: Mapping[str, Callable[[Shape], Input]] = {
    ORDINARY: _random(0),
    "random 1": _random(1),
    "random 2": _random(2),
    "random x100": _random(4, scale=100.0),
    "constant in time": _constant_in_time,
    "zeros": lambda shape: np.zeros(shape, np.float32),
    "low variance": _random(5, scale=1e-3),
}


def has_golden(path: Path) -> bool:
    """Whether a ``.npz`` file holds an input and an output beside its weights."""
    return len(_read_npz(path)) == len(_ARRAYS)


def load_golden(path: Path) -> Golden:
    """Read ``__input__`` and ``__output__`` from a ``.npz`` file.

    Raises
    ------
    VerificationError
        If it cannot be read, or holds no such arrays of numbers.
    """
    found = _read_npz(path)
    for name in _ARRAYS:
        if name not in found:
            raise VerificationError(f"{path}: holds no array {name}")
        if found[name].dtype.kind != "f":
            raise VerificationError(f"{path}: {name} is {found[name].dtype}; expected float32")
    x, y = (found[name] for name in _ARRAYS)
    return Golden(path, np.ascontiguousarray(x, np.float32), y.astype(np.float64))


_ARRAYS = ("__input__", "__output__")


def _read_npz(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return those of `_ARRAYS` that a file holds."""
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it is a single array")
        with archive:
            return {name: archive[name] for name in _ARRAYS if name in archive.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise VerificationError(f"{path}: cannot be read as a .npz file: {error}") from error


def float32_error(
    config: MegaConfig, params: numpy_mega.Params, x: npt.ArrayLike, expected: Array
) -> float:
    """Return the relative RMS error of the oracle's own formulas in float32.

    It tells how much an input amplifies rounding, apart from any kernel: a layer norm of rows with
    a large mean cancels; sums of equal terms, as of an input constant in time, round all one way.

    Parameters
    ----------
    config : MegaConfig
    params : mapping of str to array
    x : array_like, [B, T, embed_dim]
    expected : array, [B, hidden_size]
        The oracle's output for ``x``, in float64.

    Returns
    -------
    float
        Infinite where a result is not finite.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        actual = numpy_mega.forward(config, params, x, dtype=np.float32)
    return compare(actual, expected).relative_rms


def meets_jump(config: MegaConfig, x: Array, intermediates: Mapping[str, Array]) -> bool:
    """Whether a row's variance lies where Axon 0.8.0's layer norm jumps.

    There the last bit of float32 decides between two outputs, and no tolerance separates a right
    result from a wrong one. The plain layer norm has no such place.

    Parameters
    ----------
    config : MegaConfig
    x : array, [B, T, embed_dim]
    intermediates : mapping of str to array
        As `numpy_mega.forward` fills them.
    """
    if config.layer_norm != "axon-0.8.0":
        return False
    first = intermediates["input_projection"] if config.has_input_projection else x
    normalized = [first] + [v for name, v in intermediates.items() if name.endswith("_residual")]
    eps = numpy_mega.LAYER_NORM_EPS
    return any(
        bool((np.abs(rows.astype(np.float64).var(axis=-1) - eps) < _JUMP_MARGIN * eps).any())
        for rows in normalized
    )
