"""What a user may hand to the compiler, resolved to a PyTorch module and what is known about it."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from reference import MegaConfig, numpy_mega
from reference.torch_mega import Mega, build

from .errors import CompileError
from .frontend.onnx import OnnxModel, load_onnx
from .weights import Checkpoint, load_checkpoint

DEFAULT_SEED = 0

Oracle = Callable[[npt.NDArray[np.float32]], npt.NDArray[np.floating[Any]]]


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """A model to compile.

    Parameters
    ----------
    module : torch.nn.Module or OnnxModel
    config : MegaConfig or None
        The Mega's options; for a user's module, those of the first Mega inside, if there is one.
        None for an ONNX file that is not exactly a Mega.
    checkpoint : Checkpoint or None
        The weights, where the module is exactly a Mega.
    origin : dict
        Where the weights are from, for the manifest: ``kind`` (``file``, ``seed``, ``memory``,
        ``module`` or ``onnx``) and what finds them again.
    warnings : tuple of str
        What the user should know about how the source was read.
    """

    module: torch.nn.Module | OnnxModel
    config: MegaConfig | None
    checkpoint: Checkpoint | None
    origin: dict[str, Any]
    warnings: tuple[str, ...] = ()

    def torch_module(self) -> torch.nn.Module | None:
        """Return the model as a PyTorch module; None for an ONNX file with other layers."""
        if not isinstance(self.module, OnnxModel):
            return self.module
        if self.checkpoint is None:
            return None
        return Mega.from_params(self.checkpoint.config, self.checkpoint.params)

    def oracle(self) -> Oracle:
        """Return the float64 reference: NumPy's for a Mega, else the model itself in float64."""
        if self.checkpoint is not None:
            config, params = self.checkpoint.config, self.checkpoint.params
            return lambda x: numpy_mega.forward(config, params, x)
        if isinstance(self.module, OnnxModel):
            return self.module.run_float64
        module = copy.deepcopy(self.module).double().eval()

        def run(x: npt.NDArray[np.float32]) -> npt.NDArray[np.floating[Any]]:
            with torch.no_grad():
                y: npt.NDArray[np.floating[Any]] = module(torch.from_numpy(x).double()).numpy()
            return y

        return run


def resolve_model(
    model: torch.nn.Module | Checkpoint | MegaConfig | str | os.PathLike[str],
    options: Mapping[str, object] | None = None,
    seed: int = DEFAULT_SEED,
) -> ModelSource:
    """Resolve what a user hands to the compiler.

    Parameters
    ----------
    model : Module, Checkpoint, MegaConfig or path
        A path is a checkpoint in any format that `load_checkpoint` reads, or an ``.onnx`` file,
        whose graph is compiled. A config alone gets freshly initialized weights.
    options : mapping, optional
        Options of `MegaConfig` that a checkpoint file does not state.
    seed : int
        Seed of fresh weights.

    Raises
    ------
    CompileError
        If ``model`` is none of these.
    WeightsError, ModelFileError
        If a file cannot be read.
    """
    if isinstance(model, str | os.PathLike):
        path = Path(model)
        if path.suffix == ".onnx":
            return _from_onnx(path, options)
        checkpoint = load_checkpoint(path, options=options)
        origin = {"kind": "file", "path": str(path.resolve()), "format": checkpoint.format}
        return _from_checkpoint(checkpoint, origin)
    if isinstance(model, Checkpoint):
        return _from_checkpoint(model, {"kind": "memory"})
    if isinstance(model, MegaConfig):
        module = build(model, seed=seed)
        checkpoint = Checkpoint(model, module.to_params())
        return _from_checkpoint(checkpoint, {"kind": "seed", "seed": seed, "init": "torch"})
    if isinstance(model, Mega):
        checkpoint = Checkpoint(model.config, model.to_params())
        return _from_checkpoint(checkpoint, {"kind": "memory"})
    if isinstance(model, torch.nn.Module):
        inner = next((m for m in model.modules() if isinstance(m, Mega)), None)
        config = None if inner is None else inner.config
        return ModelSource(model, config, None, {"kind": "module", "class": type(model).__name__})
    raise CompileError(
        "expected a torch.nn.Module, a Checkpoint, a MegaConfig or the path of a checkpoint; got "
        f"{type(model).__name__}"
    )


def _from_checkpoint(checkpoint: Checkpoint, origin: dict[str, Any]) -> ModelSource:
    module = Mega.from_params(checkpoint.config, checkpoint.params)
    origin = {**origin, "digest": checkpoint.digest}
    return ModelSource(module, checkpoint.config, checkpoint, origin, checkpoint.warnings)


def _from_onnx(path: Path, options: Mapping[str, object] | None) -> ModelSource:
    if options:
        raise CompileError(
            f"{path}: an ONNX file states the whole model; {', '.join(sorted(options))} cannot be "
            "given beside it"
        )
    model = load_onnx(path)
    found = {"path": str(path.resolve()), "format": "onnx"}
    if model.checkpoint is None:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return ModelSource(model, None, None, {"kind": "onnx", **found, "digest": digest})
    origin = {"kind": "file", **found, "digest": model.checkpoint.digest}
    return ModelSource(model, model.checkpoint.config, model.checkpoint, origin)


def positive_option(name: str, value: object) -> int:
    """Return an option that must be a positive integer.

    Raises
    ------
    CompileError
        If it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise CompileError(f"{name} must be a positive integer; got {value!r}")
    return value
