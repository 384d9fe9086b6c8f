"""Lowers a packed module to VM bytecode and machine code for GPUs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx

from . import device_runtime
from .graph import graph_entries
from .target import CudaTarget
from .toolchain import compiled_by_nvcc

# TVM lowers these to CUDA's fast intrinsics, whatever nvcc's flags. Ours keep to CUDA's float
# functions of full accuracy.
_ACCURATE = ("exp", "log", "log2", "log10", "sin", "cos", "pow")


def _accurate(name: str) -> Any:
    def lower(call: tirx.Call) -> tirx.PrimExpr:
        if str(call.ty.dtype) != "float32":
            return call
        return tirx.call_pure_extern("float32", f"{name}f", *call.args)

    return lower


@functools.cache
def keep_accurate() -> None:
    """Let the functions of `_ACCURATE` be CUDA's of full accuracy, in all that TVM lowers."""
    for name in _ACCURATE:
        tirx.register_intrin_lowering(f"tirx.{name}", target="cuda", f=_accurate(name), level=99)


def lower_cuda(
    mod: tvm.IRModule, target: CudaTarget, tensors: Sequence[npt.NDArray[Any]]
) -> tuple[Any, int]:
    """Lower to VM bytecode and a fatbin.

    Parameters
    ----------
    mod : tvm.IRModule
        As the pack phase leaves it: scheduled PrimFuncs, and Relax functions ``(x, tensors)``.
    target : CudaTarget
    tensors : sequence of array
        What the functions take as ``tensors``.

    Returns
    -------
    tvm.relax.VMExecutable
        Each entry, and each again as `mega_tvm.cuda.graph` says.
    int
        Bytes on the device that intermediates of all entries take.

    Raises
    ------
    TargetError
        If there is no nvcc.
    CompileError
        If nvcc refuses, or TVM's CUDA runtime cannot be loaded.
    """
    device_runtime.load_for_compiling()
    keep_accurate()
    tvm_target = target.tvm_target()
    with tvm_target:
        planned = tvm.transform.Sequential(
            [
                relax.transform.ToNonDataflow(),
                relax.transform.RemovePurityChecking(),
                relax.transform.CallTIRRewrite(),
                relax.transform.StaticPlanBlockMemory(),
            ]
        )(mod)
        workspace = _storage_bytes(planned)
        captured = graph_entries(mod, [(array.shape, str(array.dtype)) for array in tensors])
        planned = tvm.IRModule({**planned.functions, **captured.functions})
        to_vm = tvm.transform.Sequential(
            [
                relax.transform.LowerAllocTensor(),
                relax.transform.KillAfterLastUse(),
                relax.transform.LowerRuntimeBuiltin(),
                relax.transform.ComputePrimValue(),
                relax.transform.VMShapeLower(),
                relax.transform.AttachGlobalSymbol(),
            ]
        )
        with compiled_by_nvcc(target):
            executable = relax.build(planned, tvm_target, relax_pipeline=to_vm)
    return executable, workspace


def _storage_bytes(mod: tvm.IRModule) -> int:
    total = 0
    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            for block in func.body.blocks:
                for binding in block.bindings:
                    total += _allocated(binding.value)
    return total


def _allocated(value: relax.Expr) -> int:
    if not isinstance(value, relax.Call):
        return 0
    name = str(getattr(value.op, "name", ""))
    if name == "relax.memory.alloc_storage":
        return math.prod(int(size) for size in value.args[0].values)
    if name == "relax.builtin.alloc_tensor":
        shape = (int(size) for size in value.args[0].values)
        return math.prod(shape) * np.dtype(str(value.args[1].value)).itemsize
    return 0


def generated_source(executable: Any) -> str:
    """Return the CUDA C of an executable's kernels."""
    return "\n".join(
        str(inner.inspect_source())
        for module in executable.mod.imports
        for inner in (module, *module.imports)
        if inner.kind == "cuda"
    )


def launch_threads(executable: Any) -> dict[str, int]:
    """Return the threads of a block of each kernel, by its name in the machine code."""
    found = re.findall(
        r"__global__ void __launch_bounds__\((\d+)\) (\w+)\(", generated_source(executable)
    )
    return {name: int(threads) for threads, name in found}


def device_present() -> bool:
    """Whether this process can run what it compiles for a GPU."""
    return bool(tvm.cuda(0).exist)


def device_arch() -> int:
    """Return the compute capability of the GPU: 80 is ``sm_80``."""
    return int(str(tvm.cuda(0).compute_version).replace(".", ""))
