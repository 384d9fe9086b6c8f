"""The fields of a compiled model's manifest, and a check of them."""

from __future__ import annotations

import re
from collections.abc import Mapping


class Field:
    """What a manifest's field must be.

    Parameters
    ----------
    types : tuple of type
        JSON types that are accepted; ``type(None)`` where it may be null.
    items : Field, optional
        What each element of a list must be.
    fields : mapping, optional
        Fields that an object must have; others are allowed.
    pattern : str, optional
        A regular expression that a string must match as a whole.
    """

    def __init__(
        self,
        *types: type,
        items: Field | None = None,
        fields: Mapping[str, Field] | None = None,
        pattern: str | None = None,
    ) -> None:
        self.types = types
        self.items = items
        self.fields = fields
        self.pattern = pattern

    def problem(self, value: object, where: str) -> str | None:
        """Return what is wrong with a value, or None."""
        if type(value) not in self.types:  # exact: True is not an int here
            wanted = " or ".join(_JSON_NAMES[t] for t in self.types)
            return f"{where} must be {wanted}, found {_shorten(value)}"
        if isinstance(value, int) and value < 1:
            return f"{where} must be positive, found {value}"
        if isinstance(value, str) and self.pattern and not re.fullmatch(self.pattern, value):
            return f"{where} must match {self.pattern}, found {_shorten(value)}"
        if isinstance(value, list) and self.items:
            for i, item in enumerate(value):
                if wrong := self.items.problem(item, f"{where}[{i}]"):
                    return wrong
        if isinstance(value, dict) and self.fields:
            for name, field in self.fields.items():
                path = f"{where}.{name}" if where else name
                if name not in value:
                    return f"{path} is missing"
                if wrong := field.problem(value[name], path):
                    return wrong
        return None


_JSON_NAMES = {
    str: "a string",
    int: "an integer",
    list: "a list",
    dict: "an object",
    type(None): "null",
}
_NULL = type(None)
_STRINGS = Field(list, items=Field(str))
# Inputs and outputs are float32 whatever the kernels compute in.
_TENSOR = Field(
    dict, fields={"shape": Field(list, items=Field(int)), "dtype": Field(str, pattern="float32")}
)
_ENTRY = Field(
    dict,
    fields={
        "name": Field(str, pattern=r".+"),
        "batch": Field(int, _NULL),
        "seq_len": Field(int, _NULL),
        "input": _TENSOR,
        "output": _TENSOR,
    },
)
_MANIFEST = Field(
    dict,
    fields={
        "format_version": Field(int),
        "library": Field(
            dict, fields={"sha256": Field(str, pattern="[0-9a-f]{64}"), "bytes": Field(int)}
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
                "kind": Field(str, pattern="llvm"),
                "mcpu": Field(str, _NULL),
                "mattr": _STRINGS,
                "cpu_features": _STRINGS,
            },
        ),
        "dtype": Field(str),
        "entries": Field(list, items=_ENTRY),
        "config": Field(dict, _NULL),
        "weights": Field(dict, _NULL),
        "kernels": Field(list),
        "parity": Field(dict, _NULL),
    },
)


def manifest_problem(manifest: object) -> str | None:
    """Return what is wrong with a manifest's fields, or None."""
    if wrong := _MANIFEST.problem(manifest, ""):
        return wrong.strip()
    assert isinstance(manifest, dict)
    entries = manifest["entries"]
    if not entries:
        return "entries must not be empty"
    shapes = [tuple(entry["input"]["shape"]) for entry in entries]
    if twice := [shape for shape in shapes if shapes.count(shape) > 1]:
        return f"entries must have different input shapes, found {twice[0]} twice"
    return None


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
