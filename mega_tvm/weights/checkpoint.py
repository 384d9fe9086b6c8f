"""What the weights of a model look like in memory, whatever file they came from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from reference.config import MegaConfig

Params = dict[str, npt.NDArray[np.float32]]


def params_digest(params: Mapping[str, npt.NDArray[Any]]) -> str:
    """Return the SHA-256 over sorted names, shapes and little-endian float32 bytes.

    Parameters
    ----------
    params : mapping of str to array

    Returns
    -------
    str
        64 hexadecimal digits; equal for equal weights, whatever file format held them.
    """
    digest = hashlib.sha256()
    for name in sorted(params):
        array = np.ascontiguousarray(params[name], dtype="<f4")
        digest.update(f"{name}{list(params[name].shape)}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A model's options and weights.

    Parameters
    ----------
    config : MegaConfig
    params : dict of str to array
        Every tensor under its Axon name (``layer/param``), float32, C-contiguous.
    source : Path, optional
        The file they came from.
    format : str, default "memory"
        That file's format: ``"nx"``, ``"safetensors"``, ``"npz"``, ``"torch"`` or
        ``"onnx"``.
    metadata : dict
        What the file says beyond its tensors.
    warnings : tuple of str
        What could not be read, or was left out, without harm to the weights.
    option_sources : dict of str to str
        For each option of the config, where its value was read; options not in it have
        their default.
    stored_dtypes : dict of str to str
        Each tensor's dtype in the file.
    """

    config: MegaConfig
    params: Params
    source: Path | None = None
    format: str = "memory"
    metadata: dict[str, object] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    option_sources: dict[str, str] = dataclasses.field(default_factory=dict)
    stored_dtypes: dict[str, str] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def digest(self) -> str:
        """The weights' `params_digest`."""
        return params_digest(self.params)
