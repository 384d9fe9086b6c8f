"""How a candidate for a GPU is compiled: the kernel alone, by nvcc, for the device's arch.

It is timed by CUDA events around a number of calls in a row. All read the same weights: those of
the default model, 14 MB, stay in the L2 of an A100 or H100 (40 and 50 MB) from run to run.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import tvm

from schedules.common.kernel import ScheduledKernel

from ..cuda import device_runtime
from ..cuda.lowering import keep_accurate
from ..cuda.target import CudaTarget
from ..cuda.toolchain import compiled_by_nvcc
from .operands import Operands

# Calls between two events, whose resolution is half a microsecond.
RUNS = 20


def build(
    kernel: ScheduledKernel, operands: Operands, target: CudaTarget, name: str
) -> tuple[Any, tuple[npt.NDArray[Any], ...]]:
    """Compile a scheduled kernel as a function ``name``.

    Returns
    -------
    Executable
    tuple of array
        Its arguments but for the output, packed.

    Raises
    ------
    TargetError
        If there is no nvcc.
    CompileError
        If nvcc refuses.
    """
    device_runtime.load_for_compiling()
    keep_accurate()
    packed = (
        kernel.pack[index](array) if index in kernel.pack else array
        for index, array in enumerate(operands.inputs)
    )
    arguments = tuple(
        array.astype(np.dtype(dtype), copy=False)
        for array, dtype in zip(packed, operands.dtypes, strict=False)
    )
    mod = tvm.IRModule({name: kernel.func.with_attr("global_symbol", name)})
    with compiled_by_nvcc(target):
        return tvm.compile(mod, target.tvm_target()), arguments
