"""From an ONNX file to a Relax module.

The file is read and checked by `onnx_file`, Mega's operators in it are found by `onnx_recognize`,
which also reports every operator that is not supported, and `onnx_importer` makes them the Relax
operators that a PyTorch module's become.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import tvm
from tvm import relax

from reference import MegaConfig
from reference.config import ConfigError
from reference.onnx_mega import CONFIG_KEY

from ..errors import CompileError, ModelFileError, UnsupportedModelError, WeightsError
from ..weights import Checkpoint, load_checkpoint
from .onnx_evaluate import evaluate, to_float64
from .onnx_file import input_dims, model_input, read_model
from .onnx_importer import Importer
from .onnx_operators import opset_of
from .onnx_parts import Shape
from .onnx_recognize import recognize


@dataclasses.dataclass(frozen=True)
class OnnxModel:
    """A checked model from an ONNX file.

    Parameters
    ----------
    path : Path
    proto : ModelProto
        As read.
    dims : tuple of int or None
        The input's sizes; None where one is symbolic.
    config : MegaConfig or None
        What the metadata says; of a Mega that may be a part of the model only.
    checkpoint : Checkpoint or None
        The weights, where the file is exactly a Mega that `mega_tvm.export` wrote.
    """

    path: Path
    proto: onnx.ModelProto
    dims: tuple[int | None, ...]
    config: MegaConfig | None
    checkpoint: Checkpoint | None

    def run_float64(self, x: npt.NDArray[Any]) -> npt.NDArray[np.floating[Any]]:
        """Run the file in float64, functions by their bodies: the oracle for what it holds."""
        feeds = {model_input(self.proto).name: x.astype(np.float64)}
        result: npt.NDArray[np.floating[Any]] = evaluate(to_float64(self.proto), feeds)[0]
        return result

    def shapes(
        self,
        batch: Sequence[int] | None,
        seq_len: Sequence[int] | None,
        input_shape: Sequence[int] | None,
    ) -> list[Shape]:
        """Return the input shapes to compile for.

        Raises
        ------
        CompileError
            If the file fixes another size, or a size is told by nobody.
        """
        if input_shape is not None:
            self._check(tuple(input_shape))
            return [tuple(input_shape)]
        if len(self.dims) != 3 or self.dims[2] is None:
            if any(dim is None for dim in self.dims):
                raise CompileError(
                    f"{self.path}: the input {self._dims()} is not [batch, seq_len, width]: give "
                    "input_shape"
                )
            return [tuple(dim for dim in self.dims if dim is not None)]
        if seq_len is None:
            stated = self.dims[1] or (self.config.seq_len if self.config else None)
            if stated is None:
                raise CompileError(
                    f"{self.path}: the input {self._dims()} leaves the sequence length open, and "
                    "the metadata does not tell one: give seq_len (--seq-len)"
                )
            seq_len = [stated]
        width = self.dims[2]
        shapes: list[Shape] = [(b, t, width) for b, t in itertools.product(batch or [1], seq_len)]
        for shape in shapes:
            self._check(shape)
        return shapes

    def _check(self, shape: Shape) -> None:
        fits = len(shape) == len(self.dims) and all(
            dim is None or dim == size for dim, size in zip(self.dims, shape, strict=True)
        )
        if not fits:
            raise CompileError(
                f"{self.path}: the input is {self._dims()}, which {list(shape)} does not fit"
            )

    def _dims(self) -> str:
        return "[" + ", ".join("?" if dim is None else str(dim) for dim in self.dims) + "]"


def load_onnx(path: Path) -> OnnxModel:
    """Read and check an ONNX file.

    Raises
    ------
    ModelFileError
        If it cannot be compiled for what the file itself is.
    """
    proto = read_model(path)
    config = None
    metadata = {prop.key: prop.value for prop in proto.metadata_props}
    if CONFIG_KEY in metadata:
        # Not this model's own, or damaged: then it tells nothing.
        with contextlib.suppress(ConfigError, ValueError, RecursionError, OverflowError):
            config = MegaConfig.from_dict(json.loads(metadata[CONFIG_KEY]))
    checkpoint = None
    if config is not None:
        with contextlib.suppress(WeightsError):  # then it is not exactly a Mega
            checkpoint = load_checkpoint(path)
    return OnnxModel(path, proto, input_dims(proto), config, checkpoint)


def import_onnx(
    model: OnnxModel, shapes: Mapping[str, Shape]
) -> tuple[tvm.IRModule, tuple[str, ...]]:
    """Import a model at each of some input shapes.

    Parameters
    ----------
    model : OnnxModel
    shapes : mapping of str to tuple
        An entry's name to its input's shape.

    Returns
    -------
    IRModule
        A Relax function an entry, with the weights as constants, and what they call.
    tuple of str
        What was not recognised, in plain words.

    Raises
    ------
    ModelFileError, UnsupportedModelError
        If the model does not fit a shape, or holds operators that cannot be imported.
    """
    try:
        recognized = recognize(model.proto, list(shapes.values()))
    except (ModelFileError, UnsupportedModelError) as error:
        raise type(error)(f"{model.path}: {error}") from error
    mod = _import(recognized.model, shapes, model.path)
    return mod, recognized.notes


def _import(model: onnx.ModelProto, shapes: Mapping[str, Shape], path: Path) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    name = model_input(model).name
    try:
        for entry, shape in shapes.items():
            Importer(builder, opset_of(model)).run(model.graph, name, entry, shape)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{path}: {error}") from error
    mod = builder.get()
    dtypes = {str(mod[entry].ret_ty.dtype) for entry in shapes}
    if dtypes != {"float32"}:
        found = ", ".join(sorted(dtypes))
        raise UnsupportedModelError(f"{path}: the output must be float32; it becomes {found}")
    return mod
