"""The fields of a compiled model's manifest, and a check of them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from mega_tvm.manifest_field import Field, shorten

# Tensors lie at multiples of it, in the file and in memory, since kernels read whole vectors.
ALIGNMENT = 64

# Bytes of an element, by the name of its type: NumPy's, and ml_dtypes' of bfloat16.
ITEM_SIZES = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
}
_MAX_DIMENSIONS = 32  # NumPy 1's


_NULL = type(None)
_SHA256 = Field(str, pattern="[0-9a-f]{64}")
_STRINGS = Field(list, items=Field(str))
# Inputs and outputs are float32 whatever the kernels compute in.
_ARRAY = Field(
    dict, fields={"shape": Field(list, items=Field(int)), "dtype": Field(str, pattern="float32")}
)
_KERNEL = Field(
    dict,
    fields={
        "name": Field(str),
        "op": Field(str),
        "spec": Field(dict, _NULL),
        "schedule": Field(str),
        "calls": Field(int),
    },
)
_ENTRY = Field(
    dict,
    fields={
        "name": Field(str, pattern=r".+"),
        "batch": Field(int, _NULL),
        "seq_len": Field(int, _NULL),
        "input": _ARRAY,
        "output": _ARRAY,
        "workspace": Field(int),
    },
)
_STREAM = Field(
    dict,
    fields={
        "name": Field(str, pattern=r".+"),
        "input_width": Field(int),
        "output_shape": Field(list, items=Field(int)),
        "state": Field(
            list,
            items=Field(
                dict, fields={"kind": Field(str, pattern="ema|cache"), "width": Field(int)}
            ),
        ),
        "workspace": Field(dict),
    },
)
_WINDOW = Field(
    dict,
    fields={
        "name": Field(str, pattern=r".+"),
        "input_width": Field(int),
        "widths": Field(list, items=Field(int)),
        "workspace": Field(dict),
        "entries": Field(dict),
    },
)
_WINDOW_ENTRY = Field(dict, fields={"name": Field(str, pattern=r".+"), "workspace": Field(dict)})
_SYMBOLIC_ARRAY = Field(
    dict,
    fields={
        "shape": Field(list, items=Field(int, str, pattern="[a-z_]+")),
        "dtype": Field(str, pattern="float32"),
    },
)
_SYMBOLIC_ENTRY = Field(
    dict,
    fields={
        "name": Field(str, pattern=r".+"),
        "input": _SYMBOLIC_ARRAY,
        "output": _SYMBOLIC_ARRAY,
        "limits": Field(dict),
        "workspace": Field(dict),
    },
)
_TENSOR = Field(
    dict,
    fields={
        "offset": Field(int, least=0),
        "shape": Field(list, items=Field(int)),
        "dtype": Field(str, pattern="|".join(ITEM_SIZES)),
    },
)
_GPU = Field(
    dict,
    fields={
        "archs": Field(list, items=Field(str, pattern=r"sm_\d{2,3}")),
        "ptx": Field(str, _NULL, pattern=r"compute_\d{2,3}"),
    },
)
_MANIFEST = Field(
    dict,
    fields={
        "format_version": Field(int),
        "library": Field(dict, fields={"sha256": _SHA256, "bytes": Field(int)}),
        "tensors": Field(
            dict,
            fields={
                "offset": Field(int),
                "bytes": Field(int, least=0),
                "sha256": _SHA256,
                "items": Field(list, items=_TENSOR),
            },
        ),
        "versions": Field(
            dict,
            fields={
                "mega_tvm": Field(str),
                "tvm": Field(str),
                "tvm_ffi": Field(str, pattern=r"\d+\.\d+.*"),
                "llvm": Field(str, _NULL),
            },
        ),
        "target": Field(
            dict,
            fields={
                "name": Field(str),
                "kind": Field(str, pattern="llvm|cuda"),
                "mcpu": Field(str, _NULL),
                "mattr": _STRINGS,
                "cpu_features": _STRINGS,
            },
        ),
        "dtype": Field(str),
        "entries": Field(list, items=_ENTRY),
        "config": Field(dict, _NULL),
        "weights": Field(dict, _NULL),
        "kernels": Field(list, items=_KERNEL),
        "parity": Field(dict, _NULL),
    },
)


def manifest_problem(manifest: object) -> str | None:
    """Return what is wrong with a manifest's fields, or None."""
    if wrong := _MANIFEST.problem(manifest, ""):
        return wrong.strip()
    assert isinstance(manifest, dict)
    if manifest["target"]["kind"] == "cuda" and (
        wrong := _GPU.problem(manifest["target"], "target")
    ):
        return wrong
    entries = manifest["entries"]
    if not entries:
        return "entries must not be empty"
    if wrong := _stream_problem(manifest.get("stream")):
        return wrong
    if wrong := _window_problem(manifest.get("window")):
        return wrong
    if wrong := _symbolic_problem(manifest.get("symbolic_entries", [])):
        return wrong
    shapes = [tuple(entry["input"]["shape"]) for entry in entries]
    if twice := [shape for shape in shapes if shapes.count(shape) > 1]:
        return f"entries must have different input shapes, found {twice[0]} twice"
    return _layout_problem(manifest["library"]["bytes"], manifest["tensors"])


def _stream_problem(stream: object) -> str | None:
    """Return what is wrong with the field about streams, which older files do not have."""
    if stream is None:
        return None
    if isinstance(stream, dict) and "left_out" in stream:
        return Field(str).problem(stream["left_out"], "stream.left_out")
    if wrong := _STREAM.problem(stream, "stream"):
        return wrong
    assert isinstance(stream, dict)
    return _regions_problem(stream["workspace"], "stream.workspace")


def _window_problem(window: object) -> str | None:
    """Return what is wrong with the field about windows, which older files do not have."""
    if window is None:
        return None
    if isinstance(window, dict) and "left_out" in window:
        return Field(str).problem(window["left_out"], "window.left_out")
    if wrong := _WINDOW.problem(window, "window"):
        return wrong
    assert isinstance(window, dict)
    if wrong := _regions_problem(window["workspace"], "window.workspace"):
        return wrong
    for name, entry in window["entries"].items():
        where = f"window.entries.{name}"
        if wrong := _WINDOW_ENTRY.problem(entry, where):
            return wrong
        if wrong := _regions_problem(entry["workspace"], f"{where}.workspace"):
            return wrong
    return None


def _regions_problem(workspace: Mapping[str, object], where: str) -> str | None:
    """Return what is wrong with bytes of workspace by region."""
    for region, size in workspace.items():
        if not set(region.split("*")) <= {"batch", "seq_len", "fixed"}:
            return f"{where}.{region} is no product of batch and seq_len"
        if wrong := Field(int, least=0).problem(size, f"{where}.{region}"):
            return wrong
    return None


def _symbolic_problem(entries: object) -> str | None:
    """Return what is wrong with the symbolic entries, which older files do not have."""
    if wrong := Field(list, items=_SYMBOLIC_ENTRY).problem(entries, "symbolic_entries"):
        return wrong
    assert isinstance(entries, list)
    for i, entry in enumerate(entries):
        where = f"symbolic_entries[{i}]"
        dims = [*entry["input"]["shape"], *entry["output"]["shape"]]
        for name in {dim for dim in dims if isinstance(dim, str)}:
            if name not in entry["input"]["shape"]:
                return f"{where}.output has a dimension {name}, which its input lacks"
            field = f"{where}.limits.{name}"
            limits = entry["limits"].get(name)
            if wrong := Field(list, items=Field(int)).problem(limits, field):
                return wrong
            if len(limits) != 2 or limits[0] > limits[1]:
                return f"{field} must be the least and the greatest value, found {limits}"
        for region, size in entry["workspace"].items():
            if region != "fixed" and not set(region.split("*")) <= set(entry["limits"]):
                return f"{where}.workspace names a region {region}, which is none of limits"
            if wrong := Field(int).problem(size, f"{where}.workspace.{region}"):
                return wrong
    return None


def round_up(offset: int) -> int:
    """Return the first place for a tensor at or after an offset."""
    return -(-offset // ALIGNMENT) * ALIGNMENT


def tensor_layout(sizes: Iterable[int]) -> tuple[list[int], int]:
    """Return where tensors of these bytes start, and where the last ends.

    Each starts at the first multiple of `ALIGNMENT` at or after the end of the one before.
    """
    starts, end = [], 0
    for size in sizes:
        starts.append(round_up(end))
        end = starts[-1] + size
    return starts, end


def _layout_problem(library_bytes: int, tensors: Mapping[str, Any]) -> str | None:
    """Return where tensors are elsewhere than one after the other behind the library."""
    if tensors["offset"] != (expected := round_up(library_bytes)):
        return f"tensors.offset must be {expected}, found {shorten(tensors['offset'])}"
    items = tensors["items"]
    for i, item in enumerate(items):
        if len(item["shape"]) > _MAX_DIMENSIONS:
            found = len(item["shape"])
            where = f"tensors.items[{i}].shape"
            return f"{where} must have at most {_MAX_DIMENSIONS} items, found {found}"
    sizes = [math.prod(item["shape"]) * ITEM_SIZES[item["dtype"]] for item in items]
    starts, end = tensor_layout(sizes)
    for i, (item, start) in enumerate(zip(items, starts, strict=True)):
        if item["offset"] != start:
            where = f"tensors.items[{i}].offset"
            return f"{where} must be {shorten(start)}, found {shorten(item['offset'])}"
    if end != tensors["bytes"]:
        return f"tensors.bytes must be {shorten(end)}, found {shorten(tensors['bytes'])}"
    return None
