"""What a field of a manifest must be: types, parts, patterns, least values."""

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
    least : int
        The least value of an integer.
    """

    def __init__(
        self,
        *types: type,
        items: Field | None = None,
        fields: Mapping[str, Field] | None = None,
        pattern: str | None = None,
        least: int = 1,
    ) -> None:
        self.types = types
        self.items = items
        self.fields = fields
        self.pattern = pattern
        self.least = least

    def problem(self, value: object, where: str) -> str | None:
        """Return what is wrong with a value, or None."""
        if type(value) not in self.types:  # exact: True is not an int here
            wanted = " or ".join(_JSON_NAMES[t] for t in self.types)
            return f"{where} must be {wanted}, found {shorten(value)}"
        if type(value) is int and value < self.least:
            return f"{where} must be at least {self.least}, found {shorten(value)}"
        if isinstance(value, str) and self.pattern and not re.fullmatch(self.pattern, value):
            return f"{where} must match {self.pattern}, found {shorten(value)}"
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


def shorten(value: object) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
