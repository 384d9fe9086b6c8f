"""The input shapes that a model is compiled for, and its import at each of them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import tvm

from .errors import CompileError
from .frontend.onnx import OnnxModel, import_onnx
from .frontend.torch import import_module
from .model_source import ModelSource, positive_option


def input_shapes(
    source: ModelSource,
    batch: int | Sequence[int],
    seq_len: int | Sequence[int] | None,
    input_shape: Sequence[int] | None,
) -> dict[str, tuple[int, ...]]:
    """Return the input shapes to compile for, by entry name.

    Raises
    ------
    CompileError
        If they are no positive integers, or not distinct.
    """
    if isinstance(source.module, OnnxModel):
        given = {"batch": batch, "seq_len": seq_len, "input_shape": input_shape}
        sizes = {
            name: None
            if value is None
            else [positive_option(name, size) for size in _as_list(value)]
            for name, value in given.items()
        }
        return _named(source.module.shapes(**sizes))
    if input_shape is not None:
        return {"main": tuple(positive_option("input_shape", size) for size in input_shape)}
    config = source.config
    if config is None:
        raise CompileError(
            f"{type(source.module).__name__} holds no Mega that would tell the shape of its input: "
            "give input_shape"
        )
    lengths = config.seq_len if seq_len is None else seq_len
    batches = [positive_option("batch", b) for b in _as_list(batch)]
    pairs = list(
        itertools.product(batches, [positive_option("seq_len", t) for t in _as_list(lengths)])
    )
    return _named([(b, t, config.embed_dim) for b, t in pairs])


def _named(shapes: Sequence[tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    if len(set(shapes)) < len(shapes) or not shapes:
        listed = ", ".join(str(list(shape)) for shape in shapes) or "none"
        raise CompileError(f"batch and seq_len must give distinct shapes; they give {listed}")
    if len(shapes) == 1:
        return {"main": shapes[0]}
    return {f"main_b{shape[0]}_t{shape[1]}": shape for shape in shapes}


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, Sequence) else [value]


def import_entries(
    module: torch.nn.Module | OnnxModel, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[tvm.IRModule, Sequence[str]]:
    """Import a module once for each input shape.

    Returns
    -------
    IRModule
    sequence of str
        What a user should know of how an ONNX file is compiled.
    """
    if isinstance(module, OnnxModel):
        return import_onnx(module, shapes)
    functions = {}
    for name, shape in shapes.items():
        main = import_module(module, shape)["main"]
        functions[name] = main.with_attr("global_symbol", name)
    return tvm.IRModule(functions), ()
