"""What a core does that none of its flags tells: measured on this machine, once a process."""

from __future__ import annotations

import functools

import numpy as np
import tvm
from tvm.target import Target

from schedules.common.cpu_features import vector_unit
from schedules.common.decisions import PREFIX
from schedules.dense.cpu import PAIRED_ROWS
from schedules.dense.naive import DenseSpec, dense
from schedules.dense.pairs import LANES, scaled_columns
from schedules.registry import generate, sample_decisions

from .c_function import serial_form
from .lowering import CPU_PIPELINE

# Rows and a panel that stay in L1 and L2.
_M, _K, _N = 40, 192, 64
_SPEC = DenseSpec((_M,), _K, _N, paired=True)
# Products in pairs take 4 cycles in place of 6 where additions run beside FMAs, and 8 where they
# run in the same units: there is nothing between.
_GAIN = 1.05
_CALLS, _REPEATS = 50, 20


@functools.cache
def pairs_pay(target: Target) -> bool:
    """Whether dense kernels for this machine are faster with products in pairs."""
    if vector_unit(target).lanes != LANES:
        return False
    plain, paired = (_seconds(target, pairs) for pairs in (0, PAIRED_ROWS))
    return plain > _GAIN * paired


def _seconds(target: Target, pairs: int) -> float:
    sch = sample_decisions(dense(_SPEC), target)
    root = sch.get_sblock("root")
    sch.unannotate(root, f"{PREFIX}pairs")
    sch.annotate(root, f"{PREFIX}pairs", pairs)
    kernel = generate(sch.mod["main"], target)
    func = serial_form(kernel.func).with_attr("global_symbol", "main")
    module = tvm.compile(tvm.IRModule({"main": func}), target, tir_pipeline=CPU_PIPELINE)
    x, w, y = (np.ones(shape, np.float32) for shape in ((_M, _K), (_K, _N), (_M, _N)))
    scaled, b = scaled_columns(w, np.zeros(_N, np.float32))
    arrays = [x, kernel.pack[1](scaled), kernel.pack[2](b), y]
    timer = module.jit().time_evaluator("main", tvm.cpu(), number=_CALLS, repeat=_REPEATS)
    return float(min(timer(*map(tvm.runtime.tensor, arrays)).results))
