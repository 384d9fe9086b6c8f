"""The decisions of one kernel: what a search may choose from, and schedules with a choice made.

A schedule samples its decisions with ``sample_categorical`` and notes each on the root block
(`schedules.common.decisions`). The trace of that is the space; the trace with other decisions is a
candidate, and what a record of MetaSchedule's database holds.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir import Schedule, Trace
from tvm.target import Target

from schedules.common.decisions import PREFIX
from schedules.common.spec import OP_ATTR, SPEC_ATTR
from schedules.common.storage import STORAGE_ATTR
from schedules.registry import sample_decisions

Decisions = Mapping[str, int]


@dataclasses.dataclass(frozen=True)
class Space:
    """The decisions of a kernel.

    Parameters
    ----------
    workload : IRModule
        The naive PrimFunc, as ``main``.
    trace : Trace
        Of the hand schedule.
    candidates : mapping of str to tuple of int
        What each decision may be, by its name.
    hand : mapping of str to int
        The hand schedule's decisions.
    """

    workload: tvm.IRModule
    trace: Trace
    candidates: Mapping[str, tuple[int, ...]]
    hand: Decisions

    @classmethod
    def of(cls, func: tirx.PrimFunc, target: Target) -> Space:
        """Return the space of a naive Mega kernel."""
        workload = workload_of(func)
        trace = sample_decisions(workload["main"], target).trace
        candidates, hand = {}, {}
        for name, inst in _sampled(trace):
            values = tuple(int(value) for value in inst.attrs[0])
            candidates[name] = values
            hand[name] = values[int(trace.get_decision(inst))]
        return cls(workload, trace, candidates, hand)

    @property
    def size(self) -> int:
        """Number of candidates."""
        return math.prod(map(len, self.candidates.values()))

    def holds(self, decisions: Decisions) -> bool:
        """Whether these are this space's decisions, each one of its candidates."""
        return decisions.keys() == self.candidates.keys() and all(
            value in self.candidates[name] for name, value in decisions.items()
        )

    def schedule(self, decisions: Decisions) -> Schedule:
        """Return the naive kernel with these decisions made."""
        trace = self.trace
        for name, inst in _sampled(self.trace):
            index = self.candidates[name].index(decisions[name])
            # An instruction is known by its identity, and `with_decision` keeps it.
            trace = trace.with_decision(inst, index, remove_postproc=False)
        return replay(self.workload, trace)


def workload_of(func: tirx.PrimFunc) -> tvm.IRModule:
    """Return a naive kernel as what it computes, without what a graph noted on it."""
    kept = {OP_ATTR, SPEC_ATTR, STORAGE_ATTR, "s_tir", "tirx.noalias"}
    for key in set(func.attrs.keys()) - kept:
        func = func.without_attr(key)
    return tvm.IRModule({"main": func})


def is_of_any_size(func: tirx.PrimFunc) -> bool:
    """Whether a kernel has sizes that only a call brings: no record can be of it."""
    return any(isinstance(dim, tirx.Var) for buffer in func.params for dim in buffer.shape)


def replay(workload: tvm.IRModule, trace: Trace) -> Schedule:
    """Apply a trace to a naive kernel."""
    sch = Schedule(workload)
    trace.apply_to_schedule(sch, remove_postproc=False)
    return sch


def read_trace(trace: Sequence[Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """Return the decisions, and all other annotations, of a trace's JSON.

    Raises
    ------
    ValueError, TypeError, LookupError
        If it is no such trace.
    """
    instructions, made = trace
    chosen = {int(index): int(value) for index, value in made}
    values: dict[str, int] = {}
    decisions: dict[str, int] = {}
    notes: dict[str, Any] = {}
    for index, (kind, inputs, attrs, outputs) in enumerate(instructions):
        if kind == "SampleCategorical":
            values[outputs[0]] = int(attrs[0][chosen[index]])
        elif kind == "Annotate" and attrs[0].startswith(PREFIX):
            decisions[attrs[0][len(PREFIX) :]] = values[inputs[1]]
        elif kind == "Annotate":
            notes[attrs[0]] = inputs[1]
    return decisions, notes


def _sampled(trace: Trace) -> Iterator[tuple[str, Any]]:
    """Yield each decision's name and the instruction that samples it."""
    by_value = {inst.outputs[0]: inst for inst in trace.insts if inst.kind.name == _SAMPLE}
    for inst in trace.insts:
        if inst.kind.name == "Annotate" and str(inst.attrs[0]).startswith(PREFIX):
            yield str(inst.attrs[0])[len(PREFIX) :], by_value[inst.inputs[1]]


_SAMPLE = "SampleCategorical"
