"""Reads an ONNX file that nobody vouches for: each fault is one `ModelFileError`, nothing runs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, numpy_helper

from ..errors import ModelFileError

# Before 13 axes were attributes: a dozen operators would have a second form.
OLDEST_OPSET = 13
STANDARD = ("", "ai.onnx")
_MOST_BYTES = 2**31 - 1  # what protobuf parses
_MOST_ELEMENTS = 2**28  # of one value: 1 GB in float32
_TYPES = {
    TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.BOOL,
    TensorProto.INT32, TensorProto.INT64,
}  # fmt: skip
_NAME_LIMIT = 120


def read_model(path: Path) -> onnx.ModelProto:
    """Read and check an ONNX file; weights that lie beside it are read in.

    Raises
    ------
    ModelFileError
        If it is not ONNX, damaged, invalid, of an opset that is not known, or of types or
        shapes that cannot be compiled.
    """
    model = _parse(path)
    try:
        _load_external(model, path)
        _check_tensors(model)
        _check_opsets(model)
        _check_functions(model)
        _check_by_onnx(model)
        _check_signature(model)
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error}") from error
    except MemoryError as error:
        raise ModelFileError(f"{path}: not enough memory to load it") from error
    return model


def check_sizes(model: onnx.ModelProto, shape: tuple[int, ...]) -> None:
    """Check the shapes that follow from the input's, before anything of them is allocated.

    Parameters
    ----------
    model : ModelProto
        Without functions.
    shape : tuple of int
        The input's.

    Raises
    ------
    ModelFileError
        If the input's shape does not fit, or a value would be absurdly large.
    """
    static = onnx.ModelProto()
    static.CopyFrom(model)
    del static.graph.value_info[:]
    dims = model_input(static).type.tensor_type.shape.dim
    for dim, size in zip(dims, shape, strict=True):
        dim.Clear()
        dim.dim_value = size
    for output in static.graph.output:
        output.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(
            static, check_type=True, strict_mode=True, data_prop=True
        )
    except Exception as error:
        raise ModelFileError(
            f"shapes do not fit together at input shape {list(shape)}: {first_line(error)}"
        ) from error
    for value in (*inferred.graph.value_info, *inferred.graph.output):
        sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if any(size < 0 for size in sizes) or math.prod(sizes) > _MOST_ELEMENTS:
            raise ModelFileError(
                f"value {clip(value.name)} has the shape {sizes} at input shape {list(shape)}; "
                f"at most {_MOST_ELEMENTS} elements are compiled"
            )


def model_input(model: onnx.ModelProto) -> onnx.ValueInfoProto:
    """Return the one input of a checked model that is not a weight."""
    weights = {tensor.name for tensor in model.graph.initializer}
    return next(value for value in model.graph.input if value.name not in weights)


def input_dims(model: onnx.ModelProto) -> tuple[int | None, ...]:
    """Return the input's sizes; None where one is symbolic."""
    dims = model_input(model).type.tensor_type.shape.dim
    return tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)


def subgraphs(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """Yield the graphs in a node's attributes."""
    for attribute in node.attribute:
        if attribute.HasField("g"):
            yield attribute.g
        yield from attribute.graphs


def all_nodes(nodes: Any) -> Iterator[onnx.NodeProto]:
    """Yield nodes, and those of their subgraphs."""
    for node in nodes:
        yield node
        for graph in subgraphs(node):
            yield from all_nodes(graph.node)


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, cut to a length that a message can carry."""
    lines = str(error).strip().splitlines()
    return clip(lines[0] if lines else type(error).__name__, 300)


def clip(text: str | bytes, limit: int = _NAME_LIMIT) -> str:
    """Return text of an untrusted file as one printable line of limited length."""
    if isinstance(text, bytes):  # what protobuf makes of a string that is not UTF-8
        text = text.decode("latin-1")
    line = text.encode("unicode_escape").decode("ascii")
    return line if len(line) <= limit else f"{line[:limit]}..."


def _parse(path: Path) -> onnx.ModelProto:
    try:
        if path.exists() and not path.is_file():
            raise ModelFileError(f"{path}: not a regular file")
        if path.stat().st_size > _MOST_BYTES:
            raise ModelFileError(f"{path}: larger than 2 GB, which no ONNX file of one part is")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ModelFileError(f"{path}: cannot be read: {error}") from error
    try:
        model = onnx.ModelProto.FromString(data)
    except DecodeError as error:
        raise ModelFileError(
            f"{path}: not an ONNX file, or truncated: {first_line(error)}"
        ) from error
    if not model.ir_version or not model.graph.node:
        raise ModelFileError(f"{path}: not an ONNX model: it holds no IR version or no nodes")
    return model


def _tensors(model: onnx.ModelProto) -> Iterator[TensorProto]:
    def of_graph(graph: onnx.GraphProto) -> Iterator[TensorProto]:
        yield from graph.initializer
        for sparse in graph.sparse_initializer:
            yield from (sparse.values, sparse.indices)
        yield from of_nodes(graph.node)

    def of_nodes(nodes: Any) -> Iterator[TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                yield attribute.t
                yield from attribute.tensors
                yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
            for graph in subgraphs(node):
                yield from of_graph(graph)

    yield from of_graph(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)


def _load_external(model: onnx.ModelProto, path: Path) -> None:
    """Read tensors that are kept in other files of the model's folder."""
    folder = path.resolve().parent
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        name, entries = clip(tensor.name), {e.key: e.value for e in tensor.external_data}
        location = entries.get("location", "")
        if not location or "\0" in location:
            raise ModelFileError(f"tensor {name} lies in another file, which it does not name")
        file = (folder / location).resolve()  # follows links, so that none leads outside
        if not file.is_relative_to(folder):
            raise ModelFileError(
                f"tensor {name} lies in {clip(location)}, outside the model's folder: that is not "
                "read. Put its data beside the model"
            )
        if not file.is_file():
            raise ModelFileError(
                f"tensor {name} lies in {clip(location)}, which is not in the model's folder: put "
                "it there, or save the model as one file"
            )
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries.get("length", file.stat().st_size - offset))
            if offset < 0 or length < 0 or offset + length > file.stat().st_size:
                raise ModelFileError(
                    f"tensor {name} claims bytes {offset} to {offset + length} of "
                    f"{clip(location)}, which holds {file.stat().st_size}"
                )
            with file.open("rb") as stream:
                stream.seek(offset)
                tensor.raw_data = stream.read(length)
        except (OSError, ValueError, OverflowError) as error:
            raise ModelFileError(
                f"tensor {name} cannot be read from {clip(location)}: {first_line(error)}"
            ) from error
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _check_tensors(model: onnx.ModelProto) -> None:
    """Refuse tensors whose data are not what their shape and type take."""
    for tensor in _tensors(model):
        if tensor.data_type == TensorProto.UNDEFINED and not tensor.dims:
            continue  # an attribute's, which it does not have
        try:
            if min(tensor.dims, default=0) < 0 or math.prod(tensor.dims) > _MOST_BYTES:
                raise ValueError("such a shape is not allowed")
            numpy_helper.to_array(tensor)
        except MemoryError:
            raise
        except Exception as error:  # ONNX raises what NumPy does
            raise ModelFileError(
                f"tensor {clip(tensor.name)} of shape {clip(str(list(tensor.dims)))} and type "
                f"{_type_name(tensor.data_type)} cannot be read: {first_line(error)}"
            ) from error


def _check_opsets(model: onnx.ModelProto) -> None:
    newest = onnx.defs.onnx_opset_version()
    versions = {opset.domain: opset.version for opset in model.opset_import}
    found = next((versions[domain] for domain in STANDARD if domain in versions), None)
    if found is None or not OLDEST_OPSET <= found <= newest:
        what = "states no opset" if found is None else f"has opset {found}"
        raise ModelFileError(
            f"the model {what}; opsets {OLDEST_OPSET} to {newest} are read. Export it again, or "
            "convert it with onnx.version_converter"
        )


def _check_functions(model: onnx.ModelProto) -> None:
    """Refuse functions that call themselves: the checker and the inliner would not end."""
    functions = {(f.domain, f.name): f for f in model.functions}
    done: set[tuple[str, str]] = set()
    for start in functions:
        stack = [(start, iter(_called(functions, start)))]
        path = {start}
        while stack:
            key, calls = stack[-1]
            called = next((c for c in calls if c not in done), None)
            if called is None:
                stack.pop()
                path.discard(key)
                done.add(key)
            elif called in path:
                raise ModelFileError(f"function {clip(called[1])} calls itself")
            else:
                path.add(called)
                stack.append((called, iter(_called(functions, called))))


def _called(functions: dict[Any, onnx.FunctionProto], key: Any) -> list[tuple[str, str]]:
    names = {(node.domain, node.op_type) for node in all_nodes(functions[key].node)}
    return sorted(names & functions.keys())


def _check_by_onnx(model: onnx.ModelProto) -> None:
    try:
        onnx.checker.check_model(model, full_check=True)
    except MemoryError:
        raise
    except Exception as error:  # ONNX raises half a dozen types that share no base
        raise ModelFileError(f"not a valid ONNX model: {first_line(error)}") from error


def _check_signature(model: onnx.ModelProto) -> None:
    graph = model.graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in weights]
    if len(inputs) != 1 or len(graph.output) != 1:
        names = ", ".join(clip(v.name) for v in (*inputs[:8], *graph.output[:8]))
        raise ModelFileError(
            f"expected a model of one input and one output; it has {len(inputs)} and "
            f"{len(graph.output)} ({names})"
        )
    for role, value in (("input", inputs[0]), ("output", graph.output[0])):
        kind = value.type.WhichOneof("value")
        if kind != "tensor_type" or value.type.tensor_type.elem_type != TensorProto.FLOAT:
            found = _type_name(value.type.tensor_type.elem_type) if kind == "tensor_type" else kind
            raise ModelFileError(f"the {role} {clip(value.name)} must be float32; it is {found}")
    if not inputs[0].type.tensor_type.HasField("shape"):
        raise ModelFileError(f"the input {clip(inputs[0].name)} states no shape")
    sizes = [d.dim_value for d in inputs[0].type.tensor_type.shape.dim if d.HasField("dim_value")]
    if any(size < 1 for size in sizes) or math.prod(sizes) > _MOST_ELEMENTS:
        raise ModelFileError(f"the input {clip(inputs[0].name)} has the sizes {sizes}")
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in graph.value_info}
    unknown = sorted(types - _TYPES - {TensorProto.UNDEFINED})
    if unknown or graph.sparse_initializer:
        names = ", ".join([_type_name(t) for t in unknown] or ["sparse tensors"])
        known = ", ".join(_type_name(t) for t in sorted(_TYPES))
        raise ModelFileError(f"values of {names} are not compiled; supported: {known}")


def _type_name(elem_type: int) -> str:
    try:
        return str(TensorProto.DataType.Name(elem_type)).lower()
    except ValueError:
        return f"the unknown type {elem_type}"
