"""How any other operator runs on a GPU: by TVM's own rules (``dlight``).

In this order: matrix products in tiles through shared memory, matrix-vector products, reductions,
and for the rest a loop of threads over all elements. Heads and embeddings around a Mega are small
beside it, and a dense layer with constant weights is a Mega kernel.
"""

from __future__ import annotations

import tvm
from tvm import tirx
from tvm.s_tir import dlight
from tvm.target import Target

_RULES = (
    dlight.gpu.Matmul,
    dlight.gpu.GEMV,
    dlight.gpu.Reduction,
    dlight.gpu.GeneralReduction,
    dlight.gpu.Fallback,
)


def schedule(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """Return ``func`` scheduled."""
    with target:
        mod = tvm.IRModule({"main": func})
        return dlight.ApplyDefaultSchedule(*(rule() for rule in _RULES))(mod)["main"]
