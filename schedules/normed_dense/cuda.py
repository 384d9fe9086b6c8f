"""How a normed_dense kernel runs on a GPU: as a dense one, whose blocks normalize their rows first.

Each block reads its rows of ``x`` twice more, for mean and variance: 16 rows of k = 256 are 16 KB,
from L2, where a layer norm of its own costs a launch (about 2.5 us) and a pass through memory.
Elements are normalized on their way from registers into shared memory.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.target import Target

from ..common.kernel import ScheduledKernel
from ..dense import cuda as dense
from .naive import NormedDenseSpec


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions of `dense`."""
    func = sch.mod["main"]
    dense.sample(sch, NormedDenseSpec.of(func), half=dense.in_half(func))


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    return dense.write(func, NormedDenseSpec.of(func))
