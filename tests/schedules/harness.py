"""Schedules, compiles and runs one kernel for the tests of this folder."""

from __future__ import annotations

from collections.abc import Sequence

import archspec.cpu
import numpy as np
import pytest
import tvm
import tvm_ffi
from tvm import tirx
from tvm.target import Target

from mega_tvm.lowering import CPU_PIPELINE
from schedules.common.decisions import PREFIX
from schedules.common.kernel import ScheduledKernel
from schedules.registry import generate, sample_decisions

# Name of a target to the microarchitecture level that a machine needs to run it.
LEVELS = {"x86-64-v4": "x86_64_v4", "x86-64-v3": "x86_64_v3"}
# Elements on each side of an argument: an access that strays by up to four cache lines is noticed.
GUARD = 64


def cpu_target(mcpu: str) -> Target:
    return Target({"kind": "llvm", "mcpu": mcpu, "num-cores": 2})


def require(mcpu: str) -> None:
    """Skip the test if this machine cannot run code for a target."""
    if not archspec.cpu.TARGETS[LEVELS[mcpu]] <= archspec.cpu.host():
        pytest.skip(f"this machine's CPU is no {mcpu}")


def scheduled(func: tirx.PrimFunc, target: Target, **decisions: int) -> ScheduledKernel:
    """Schedule a naive kernel; ``decisions`` replace the defaults."""
    sch = sample_decisions(func, target)
    root = sch.get_sblock("root")
    for name, value in decisions.items():
        sch.unannotate(root, PREFIX + name)  # annotate keeps a value that is there
        sch.annotate(root, PREFIX + name, value)
    return generate(sch.mod["main"], target)


def compiled(
    func: tirx.PrimFunc, target: Target, pipeline: str | None = CPU_PIPELINE
) -> tvm.runtime.Executable:
    module = tvm.IRModule({"main": func.with_attr("global_symbol", "main")})
    return tvm.compile(module, target, tir_pipeline=pipeline or "default")


def guarded(array: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Copy into a NaN-filled buffer at an address divisible by 64: return view and buffer."""
    elements = array.nbytes // 4
    size = elements + 2 * GUARD
    raw = np.full(size + 16, np.nan, np.float32)
    start = -raw.ctypes.data % 64 // 4
    buffer = raw[start : start + size]
    view = buffer[GUARD : GUARD + elements].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view, buffer


class Kernel:
    """A compiled PrimFunc ``(*inputs, out)``."""

    def __init__(
        self, kernel: ScheduledKernel, target: Target, pipeline: str | None = CPU_PIPELINE
    ) -> None:
        self.pack = kernel.pack
        self.main = compiled(kernel.func, target, pipeline)["main"]

    def __call__(self, inputs: Sequence[np.ndarray], shape: Sequence[int]) -> np.ndarray:
        """Run on unpacked inputs and return an output of this shape.

        Every argument lies between NaNs and the output starts as NaN, so that what is read out of
        bounds, or not written, shows in the result; NaNs around the output must survive.
        """
        return self.update(inputs, shape)[0]

    def update(
        self, inputs: Sequence[np.ndarray], shape: Sequence[int]
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """Run as a call does; return the inputs as the kernel left them, too."""
        packed = [self.pack[i](a) if i in self.pack else a for i, a in enumerate(inputs)]
        copies = {id(a): guarded(a) for a in packed}  # an array passed twice stays one array
        out, around = guarded(np.full(shape, np.nan, np.float32))
        views = [copies[id(a)][0] for a in packed]
        self.main(*map(tvm_ffi.from_dlpack, (*views, out)))
        results = [a.copy() for a in (out, *views)]
        for buffer in (around, *(buffer for _, buffer in copies.values())):
            assert np.isnan(buffer[:GUARD]).all(), "the kernel wrote ahead of an argument"
            assert np.isnan(buffer[-GUARD:]).all(), "the kernel wrote behind an argument"
        return results[0], results[1:]


def run_scheduled(
    func: tirx.PrimFunc,
    target: Target,
    inputs: Sequence[np.ndarray],
    shape: Sequence[int],
    **decisions: int,
) -> np.ndarray:
    """Schedule, compile and run a naive kernel."""
    return Kernel(scheduled(func, target, **decisions), target)(inputs, shape)


def run_naive(
    func: tirx.PrimFunc, target: Target, inputs: Sequence[np.ndarray], shape: Sequence[int]
) -> np.ndarray:
    """Compile and run the naive kernel as it stands."""
    return Kernel(ScheduledKernel(func), target, pipeline=None)(inputs, shape)


def assembly(
    func: tirx.PrimFunc, target: Target, pipeline: str | None = CPU_PIPELINE, **decisions: int
) -> str:
    """Return the assembly of a scheduled kernel."""
    return assembly_of(compiled(scheduled(func, target, **decisions).func, target, pipeline))


def assembly_of(executable: tvm.runtime.Executable) -> str:
    return str(executable.mod.inspect_source("asm"))
