"""Decisions: how a schedule's choices are sampled, kept and read.

A schedule does not transform loops step by step. It samples its decisions with MetaSchedule's
instructions and notes them on the root block of the naive PrimFunc; the TensorIR that they select
is then written out at once. Defaults, a search and the replay of a record thus run the same code,
and a trace is a few lines that hold for any size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm import tirx
from tvm.s_tir import Schedule

PREFIX = "mega."


def sample(sch: Schedule, name: str, candidates: Sequence[int], default: int) -> None:
    """Sample one decision and note it on the root block as ``mega.<name>``.

    Parameters
    ----------
    sch : Schedule
        A schedule of the naive PrimFunc.
    name : str
        The decision's name.
    candidates : sequence of int
        What a search may choose from. Must hold ``default``.
    default : int
        What the hand schedule uses.
    """
    values = list(candidates)
    uniform = [1.0 / len(values)] * len(values)
    chosen = sch.sample_categorical(values, uniform, decision=values.index(default))
    sch.annotate(sch.get_sblock("root"), PREFIX + name, chosen)


def read(func: tirx.PrimFunc) -> Mapping[str, int]:
    """Return the decisions that `sample` noted on a PrimFunc."""
    annotations = func.body.block.annotations
    return {
        key[len(PREFIX) :]: int(value)
        for key, value in annotations.items()
        if key.startswith(PREFIX)
    }
