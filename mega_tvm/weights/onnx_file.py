"""Reads the weights and options of an ``.onnx`` file that `mega_tvm.export` wrote.

Only of such a file: its graph is compared, node by node, with the one that its options make, with
Mega's functions as they are or inlined. Else the names of its tensors would stand for a model that
the file does not hold.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from mega_tvm.errors import WeightsError
from reference.config import ConfigError, MegaConfig

from .stored import StoredCheckpoint, StoredTensor, check_shape, clip, parse_json, widen_bfloat16

if TYPE_CHECKING:
    import onnx

# numbers of onnx.TensorProto.DataType, and bytes of an element
_DTYPES = {1: ("float32", 4), 10: ("float16", 2), 11: ("float64", 8), 16: ("bfloat16", 2)}
_EXTERNAL = 1


def read_onnx(data: bytes) -> StoredCheckpoint:
    """List what an ``.onnx`` file of a Mega holds.

    Raises
    ------
    WeightsError
        If it is malformed, not a Mega that we exported, or the ``onnx`` package is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError

        from reference.onnx_mega import CONFIG_KEY
    except ImportError as error:
        raise WeightsError(
            "reading .onnx needs the onnx package: pip install mega-tvm[compile]"
        ) from error
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise WeightsError(f"not an ONNX file, or truncated: {error}") from error
    metadata = {prop.key: prop.value for prop in model.metadata_props}
    if CONFIG_KEY not in metadata:
        raise WeightsError(
            f"an ONNX file without {CONFIG_KEY} in its metadata holds no Mega that mega_tvm "
            "exported: compile the model that it holds with --model"
        )
    label = f"the metadata ({CONFIG_KEY})"
    stored = StoredCheckpoint("onnx", {}, metadata=dict(metadata))
    stored.options_label = label
    stored.options = parse_json(metadata[CONFIG_KEY], label)
    stored.metadata[CONFIG_KEY] = stored.options
    for tensor in model.graph.initializer:
        if "/" not in tensor.name:
            continue  # a constant of an inlined function, which the graph's comparison covers
        if tensor.name in stored.tensors:
            raise WeightsError(f"tensor {clip(tensor.name)} stands twice")
        stored.tensors[tensor.name] = _stored(tensor)
    _check_graph(model, stored.options)
    return stored


def is_exported_mega(model: onnx.ModelProto, config: MegaConfig) -> bool:
    """Whether a model's graph is the one that `mega_tvm.export` writes for a config."""
    from reference.onnx_mega import build_model, inline

    def parts(candidate: onnx.ModelProto) -> list[Any]:
        graph = candidate.graph
        return [
            [node.SerializeToString(deterministic=True) for node in graph.node],
            [f.SerializeToString(deterministic=True) for f in candidate.functions],
            [value.name for value in (*graph.input, *graph.output)],
        ]

    expected = build_model(config, {})
    found = parts(model)
    return found in (parts(expected), parts(inline(expected)))


def _check_graph(model: onnx.ModelProto, options: dict[str, object]) -> None:
    try:
        config = MegaConfig.from_dict(options)
    except (ConfigError, OverflowError) as error:
        raise WeightsError(f"the metadata: {str(error)[:500]}") from error
    # Before a graph is made for the comparison: an absurd count would take all memory.
    if config.num_layers > len(model.graph.node) or not is_exported_mega(model, config):
        raise WeightsError(
            "the graph is not the one that mega_tvm.export writes for the options in its "
            "metadata, so that its tensors cannot be taken by their names: compile the model "
            "that the file holds with --model"
        )


def _stored(tensor: onnx.TensorProto) -> StoredTensor:
    if tensor.data_location == _EXTERNAL:
        raise WeightsError(
            f"tensor {clip(tensor.name)} lies in an external data file: compile the whole file "
            "with --model, or save it as one file"
        )
    shape = check_shape(tensor.name, list(tensor.dims))
    dtype, itemsize = _DTYPES.get(tensor.data_type, ("", 0))
    if not dtype:
        raise WeightsError(
            f"tensor {clip(tensor.name)} is of ONNX type {tensor.data_type}; expected a float type"
        )
    expected = math.prod(shape) * itemsize
    if len(tensor.raw_data) != expected:
        raise WeightsError(
            f"tensor {clip(tensor.name)} holds {len(tensor.raw_data)} bytes of raw data; "
            f"its shape {list(shape)} of {dtype} takes {expected}"
        )
    read = functools.partial(_decode, tensor.raw_data, dtype, shape)
    return StoredTensor(shape, dtype, read)


def _decode(raw: bytes, dtype: str, shape: tuple[int, ...]) -> npt.NDArray[Any]:
    if dtype == "bfloat16":
        return widen_bfloat16(np.frombuffer(raw, "<u2")).reshape(shape)
    return np.frombuffer(raw, np.dtype(dtype).newbyteorder("<")).reshape(shape)
