"""Which schedule belongs to which kernel."""

from __future__ import annotations

from typing import Protocol

import tvm
from tvm import tirx
from tvm.s_tir import Schedule
from tvm.target import Target

from .cached_attention import cpu as cached_attention_cpu
from .common.kernel import ScheduledKernel
from .common.script_parsing import quick_parser_lookup
from .common.spec import OP_ATTR
from .dense import cpu as dense_cpu
from .ema_scan import cpu as ema_scan_cpu
from .gated_attention import cpu as gated_attention_cpu
from .laplace_attention import cpu as laplace_attention_cpu
from .layer_norm import cpu as layer_norm_cpu


class KernelSchedule(Protocol):
    """What a ``<op>/cpu.py`` offers."""

    def schedule(self, sch: Schedule, target: Target) -> None:
        """Sample the decisions on the naive PrimFunc."""

    def generate(self, func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
        """Write out the TensorIR that the decisions select."""


CPU: dict[str, KernelSchedule] = {
    "cached_attention": cached_attention_cpu,
    "dense": dense_cpu,
    "ema_scan": ema_scan_cpu,
    "gated_attention": gated_attention_cpu,
    "laplace_attention": laplace_attention_cpu,
    "layer_norm": layer_norm_cpu,
}


def kernel_op(func: tirx.PrimFunc) -> str | None:
    """Return the name of the Mega kernel that a PrimFunc is, or None if it is none."""
    return str(func.attrs[OP_ATTR]) if func.attrs and OP_ATTR in func.attrs else None


def sample_decisions(func: tirx.PrimFunc, target: Target) -> Schedule:
    """Sample the decisions of a naive Mega kernel: the defaults, with what a search may choose.

    Raises
    ------
    KeyError
        If the PrimFunc is no Mega kernel: ask `kernel_op` first.
    """
    sch = Schedule(tvm.IRModule({"main": func}))
    CPU[kernel_op(func) or ""].schedule(sch, target)
    return sch


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on a naive Mega kernel select."""
    with quick_parser_lookup():
        return CPU[kernel_op(func) or ""].generate(func, target)


def hand_schedule(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Schedule a naive Mega kernel with its default decisions.

    Raises
    ------
    KeyError
        If the PrimFunc is no Mega kernel: ask `kernel_op` first.
    """
    return generate(sample_decisions(func, target).mod["main"], target)
