"""An entry of any batch and length, as the manifest describes it; for the runtime and the compiler.

Its shapes hold names where a call brings a number: ``["batch", "seq_len", 287]``. Each name has a
least and a greatest value. The workspace is a sum over regions: intermediates with ``batch *
seq_len`` rows lie in one, those with ``batch`` rows in another, those of a known size in
``"fixed"``; the manifest states the bytes of each for one row.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mega_tvm.manifest_schema import round_up

BATCH, SEQ_LEN = "batch", "seq_len"
FIXED = "fixed"
NAME = "main_symbolic"

Dims = tuple[int | str, ...]
_SHAPES_IN_MESSAGES = 8

# Batches and lengths of the check against the reference: together they meet every height of a
# register tile, one panel of keys in part and another whole.
_PROBES = ((1, 1), (2, 13), (3, 59))


def region_name(names: Sequence[str]) -> str:
    """Return the manifest's name of a workspace region, by the names that its rows multiply."""
    return "*".join(names) or FIXED


def workspace_bytes(workspace: Mapping[str, int], sizes: Mapping[str, int]) -> int:
    """Return the bytes of workspace that a call needs.

    Parameters
    ----------
    workspace : mapping of str to int
        Bytes a row by region.
    sizes : mapping of str to int
        The call's batch and length.
    """
    return sum(
        size * math.prod(sizes[name] for name in region.split("*") if name != FIXED)
        for region, size in workspace.items()
    )


@dataclasses.dataclass(frozen=True)
class SymbolicEntry:
    """An entry that serves every batch and length within limits.

    Parameters
    ----------
    name : str
        The function in the library.
    input_shape, output_shape : tuple of int or str
        Names stand where a call brings a number.
    limits : mapping of str to (int, int)
        The least and the greatest value of each name.
    workspace : mapping of str to int
        See `workspace_bytes`.
    """

    name: str
    input_shape: Dims
    output_shape: Dims
    limits: Mapping[str, tuple[int, int]]
    workspace: Mapping[str, int]

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> SymbolicEntry:
        """Read the manifest's description."""
        return cls(
            description["name"],
            tuple(description["input"]["shape"]),
            tuple(description["output"]["shape"]),
            {name: (least, most) for name, (least, most) in description["limits"].items()},
            description["workspace"],
        )

    def describe(self) -> dict[str, Any]:
        """Return the description that the manifest holds."""
        return {
            "name": self.name,
            "input": {"shape": list(self.input_shape), "dtype": "float32"},
            "output": {"shape": list(self.output_shape), "dtype": "float32"},
            "limits": {name: list(limits) for name, limits in self.limits.items()},
            "workspace": dict(self.workspace),
        }

    @property
    def least_shape(self) -> tuple[int, ...]:
        """The smallest input's shape."""
        return tuple(
            self.limits[dim][0] if isinstance(dim, str) else dim for dim in self.input_shape
        )

    def sizes(self, shape: Sequence[int]) -> dict[str, int] | None:
        """Return the values that an input's shape gives to the names; None if it does not fit."""
        if len(shape) != len(self.input_shape):
            return None
        sizes = {}
        for dim, size in zip(self.input_shape, shape, strict=True):
            if isinstance(dim, str):
                least, most = self.limits[dim]
                if not least <= size <= most:
                    return None
                sizes[dim] = size
            elif dim != size:
                return None
        return sizes

    def output_at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Return the output's shape."""
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in self.output_shape)

    def workspace_at(self, sizes: Mapping[str, int]) -> int:
        """Return the bytes of workspace, a multiple of what kernels align to."""
        return max(round_up(workspace_bytes(self.workspace, sizes)), round_up(1))

    def __str__(self) -> str:
        """Return its input's shape and limits: ``[batch, seq_len, 287], batch 1 to 64, ...``."""
        limits = (f"{name} {least} to {most}" for name, (least, most) in self.limits.items())
        return f"[{', '.join(map(str, self.input_shape))}], {', '.join(limits)}"


def shapes_for_people(
    shapes: Iterable[Sequence[int]], symbolic: Iterable[SymbolicEntry]
) -> list[str]:
    """Return what shapes a model runs, the first of many."""
    known = [str(list(shape)) for shape in shapes]
    if len(known) > _SHAPES_IN_MESSAGES:
        known[_SHAPES_IN_MESSAGES:] = [f"{len(known) - _SHAPES_IN_MESSAGES} more"]
    return known + [str(entry) for entry in symbolic]


def probe_shapes(entry: SymbolicEntry) -> list[tuple[int, ...]]:
    """Return the input shapes at which an entry is compared with its reference."""
    found = []
    for sizes in _PROBES:
        at = dict(zip((BATCH, SEQ_LEN), sizes, strict=True))
        for name, (least, most) in entry.limits.items():
            at[name] = min(max(at[name], least), most)
        found.append(tuple(at[dim] if isinstance(dim, str) else dim for dim in entry.input_shape))
    return list(dict.fromkeys(found))
