"""What a schedule hands to the compiler."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy.typing as npt
from tvm import tirx

Pack = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]


@dataclasses.dataclass(frozen=True)
class ScheduledKernel:
    """A scheduled PrimFunc, and how its constant arguments must be packed.

    Parameters
    ----------
    func : PrimFunc
        Takes the naive PrimFunc's arguments in the same order; those named in ``pack`` in their
        packed layout.
    pack : mapping of int to callable
        Argument index to the function that packs the constant.
    """

    func: tirx.PrimFunc
    pack: Mapping[int, Pack] = dataclasses.field(default_factory=dict)
