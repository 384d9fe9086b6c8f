"""Schedules, compiles and runs one kernel. Import only in a device's process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from mega_tvm.cuda.target import resolve_cuda
from mega_tvm.tolerances import assert_parity
from schedules.common.kernel import ScheduledKernel
from schedules.common.storage import storage_of, stored_as
from tests.cuda import device
from tests.schedules.cases import Case
from tests.schedules.harness import scheduled as scheduled_for

TARGET = resolve_cuda("cuda").tvm_target()
# In order, in reverse, shuffled.
ORDERS = (0, 1, 2)


def scheduled(func: tirx.PrimFunc, **decisions: int) -> ScheduledKernel:
    """Schedule a naive kernel; ``decisions`` replace the defaults."""
    return scheduled_for(func, TARGET, **decisions)


def unchanged(source: str) -> str:
    return source


@contextmanager
def compiled_for_device(mutate: Callable[[str], str] = unchanged):
    """Let TVM compile CUDA C for this process's device, after ``mutate``."""

    def compile_it(source: str) -> bytes:
        return device.compile_kernels(mutate(source))

    name = "tvm_callback_cuda_compile"
    before = tvm_ffi.get_global_func(name)
    tvm_ffi.register_global_func(name, compile_it, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(name, before, override=True)


class Kernel:
    """A compiled PrimFunc ``(*inputs, out)``."""

    def __init__(self, kernel: ScheduledKernel, mutate: Callable[[str], str] = unchanged) -> None:
        self.pack = kernel.pack
        self.dtypes = storage_of(kernel.func) or ("float32",) * len(kernel.func.params)
        module = tvm.IRModule({"main": kernel.func.with_attr("global_symbol", "main")})
        with compiled_for_device(mutate):
            self.compiled = tvm.compile(module, TARGET)
        self.main = self.compiled["main"]

    def __call__(self, inputs: Sequence[np.ndarray], shape: Sequence[int], order: int = 0):
        """Run on unpacked inputs; return the output, which starts as NaN, and the reports."""
        packed = [self.pack[i](a) if i in self.pack else a for i, a in enumerate(inputs)]
        # An array passed twice stays one array; an allocation has exactly its array's size.
        shared = {
            id(a): tvm.runtime.tensor(a.astype(dtype), tvm.cuda(0))
            for a, dtype in zip(packed, self.dtypes, strict=False)
        }
        out = tvm.runtime.tensor(np.full(shape, np.nan, self.dtypes[-1]), tvm.cuda(0))
        device.set_order(order)
        with device.watched() as reports:
            self.main(*(shared[id(a)] for a in packed), out)
        return out.numpy().astype(np.float32), reports


def stored_in_half(case: Case, wide: Sequence[int] = (), dtype: str = "float16") -> Case:
    """Return a case on tensors of a half type; the inputs at ``wide`` stay float32."""
    count = len(case.inputs)
    dtypes = ["float32" if i in wide else dtype for i in range(count + 1)]
    return dataclasses.replace(case, func=stored_as(case.func, dtypes))


def check(case, name: str, orders: Sequence[int] = ORDERS, **decisions: int) -> None:
    """Run a case in every order: right, and nothing to report."""
    kernel = Kernel(scheduled(case.func, **decisions))
    for order in orders:
        out, reports = kernel(case.inputs, case.expected.shape, order)
        assert not reports, f"{name}, order {order}:\n" + "\n".join(reports)
        assert_parity(
            out, case.expected, kernel.dtypes[-1], name=f"{name}, order {order}",
            condition=case.condition,
        )  # fmt: skip
