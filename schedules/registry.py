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
from .common.storage import storage_of, stored_as
from .dense import cpu as dense_cpu
from .dense import cuda as dense_cuda
from .ema_scan import cpu as ema_scan_cpu
from .ema_scan import cuda as ema_scan_cuda
from .ema_scan_dense import cuda as ema_scan_dense_cuda
from .gated_attention import cpu as gated_attention_cpu
from .gated_attention import cuda as gated_attention_cuda
from .laplace_attention import cpu as laplace_attention_cpu
from .laplace_attention import cuda as laplace_attention_cuda
from .layer_norm import cpu as layer_norm_cpu
from .layer_norm import cuda as layer_norm_cuda
from .normed_dense import cuda as normed_dense_cuda


class KernelSchedule(Protocol):
    """What a ``<op>/cpu.py`` or ``<op>/cuda.py`` offers."""

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

CUDA: dict[str, KernelSchedule] = {
    "dense": dense_cuda,
    "ema_scan": ema_scan_cuda,
    "ema_scan_dense": ema_scan_dense_cuda,
    "gated_attention": gated_attention_cuda,
    "laplace_attention": laplace_attention_cuda,
    "layer_norm": layer_norm_cuda,
    "normed_dense": normed_dense_cuda,
}

# By TVM's name of the target's kind.
SCHEDULES: dict[str, dict[str, KernelSchedule]] = {"llvm": CPU, "cuda": CUDA}


def kernel_op(func: tirx.PrimFunc) -> str | None:
    """Return the name of the Mega kernel that a PrimFunc is, or None if it is none."""
    return str(func.attrs[OP_ATTR]) if func.attrs and OP_ATTR in func.attrs else None


def sample_decisions(func: tirx.PrimFunc, target: Target) -> Schedule:
    """Sample the decisions of a naive Mega kernel: the defaults, with what a search may choose.

    Raises
    ------
    KeyError
        If the PrimFunc is no Mega kernel (ask `kernel_op` first), or none for such targets.
    """
    sch = Schedule(tvm.IRModule({"main": func}))
    _kernel_schedule(func, target).schedule(sch, target)
    return sch


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on a naive Mega kernel select."""
    with quick_parser_lookup():
        kernel = _kernel_schedule(func, target).generate(func, target)
    if dtypes := storage_of(func):
        return ScheduledKernel(stored_as(kernel.func, dtypes), kernel.pack)
    return kernel


def hand_schedule(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Schedule a naive Mega kernel with its default decisions.

    Raises
    ------
    KeyError
        If the PrimFunc is no Mega kernel (ask `kernel_op` first), or none for such targets.
    """
    return generate(sample_decisions(func, target).mod["main"], target)


def _kernel_schedule(func: tirx.PrimFunc, target: Target) -> KernelSchedule:
    return SCHEDULES[str(target.kind.name)][kernel_op(func) or ""]
