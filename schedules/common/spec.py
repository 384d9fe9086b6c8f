"""The specification of a kernel: what its PrimFunc computes, as data.

A naive PrimFunc carries its specification as an attribute, so that a schedule reads sizes and
epilogues from there in place of guessing them from loops.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, ClassVar, TypeVar

from tvm import tirx

OP_ATTR = "mega.op"
SPEC_ATTR = "mega.spec"

S = TypeVar("S", bound="KernelSpec")


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """Base of all kernel specifications; fields are numbers, strings, or tuples of them."""

    op: ClassVar[str]

    def attach(self, func: tirx.PrimFunc) -> tirx.PrimFunc:
        """Return ``func`` with this specification as attributes."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return func.with_attr({OP_ATTR: self.op, SPEC_ATTR: text, "tirx.noalias": True})

    @classmethod
    def of(cls: type[S], func: tirx.PrimFunc) -> S:
        """Read the specification back from a PrimFunc made by `attach`."""
        fields: dict[str, Any] = json.loads(str(func.attrs[SPEC_ATTR]))
        for name, value in fields.items():
            if isinstance(value, list):
                fields[name] = tuple(value)
        return cls(**fields)
