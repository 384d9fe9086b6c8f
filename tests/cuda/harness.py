"""Schedules, compiles and runs one kernel in the emulator. Import only in its process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx

from mega_tvm.cuda.target import resolve_cuda
from mega_tvm.tolerances import assert_parity
from schedules.common.kernel import ScheduledKernel
from schedules.ema_scan.naive import EmaScanSpec
from schedules.ema_scan_dense.naive import EmaScanDenseSpec, ema_scan_dense
from tests.cuda.emulator import activate
from tests.schedules.cases import Case, ema_case
from tests.schedules.harness import scheduled as scheduled_for

TARGET = resolve_cuda("cuda").tvm_target()
# In order, in reverse, shuffled.
ORDERS = (0, 1, 2)


def scheduled(func: tirx.PrimFunc, **decisions: int) -> ScheduledKernel:
    """Schedule a naive kernel; ``decisions`` replace the defaults."""
    return scheduled_for(func, TARGET, **decisions)


def scan_dense_case(
    rng: np.random.Generator, batch: int, length: int, channels: int, n: int, residual: bool
) -> Case:
    """Return a case of `ema_scan_dense`."""
    scan = ema_case(rng, EmaScanSpec(batch, length, channels))
    w, b = (rng.standard_normal(s, dtype=np.float32) for s in ((channels, n), n))
    expected, more = scan.expected @ w + b, ()
    if residual:
        more = (rng.standard_normal(expected.shape, dtype=np.float32),)
        expected = expected + more[0]
    func = ema_scan_dense(EmaScanDenseSpec(batch, length, channels, n, residual))
    return Case(func, (*scan.inputs, w, b, *more), expected)


def unchanged(source: str) -> str:
    return source


@contextmanager
def compiled_for_emulator(mutate: Callable[[str], str] = unchanged):
    """Let TVM compile CUDA C for the emulator, after ``mutate``."""

    def compile_it(source: str) -> bytes:
        return activate.compile_kernels(mutate(source))

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
        module = tvm.IRModule({"main": kernel.func.with_attr("global_symbol", "main")})
        with compiled_for_emulator(mutate):
            self.compiled = tvm.compile(module, TARGET)
        self.main = self.compiled["main"]

    def __call__(self, inputs: Sequence[np.ndarray], shape: Sequence[int], order: int = 0):
        """Run on unpacked inputs; return the output, which starts as NaN, and the reports."""
        packed = [self.pack[i](a) if i in self.pack else a for i, a in enumerate(inputs)]
        # An array passed twice stays one array; an allocation has exactly its array's size.
        shared = {id(a): tvm.runtime.tensor(a, tvm.cuda(0)) for a in packed}
        out = tvm.runtime.tensor(np.full(shape, np.nan, np.float32), tvm.cuda(0))
        activate.set_order(order)
        with activate.watched() as reports:
            self.main(*(shared[id(a)] for a in packed), out)
        return out.numpy(), reports


def check(case, name: str, orders: Sequence[int] = ORDERS, **decisions: int) -> None:
    """Run a case in every order: right, and nothing to report."""
    kernel = Kernel(scheduled(case.func, **decisions))
    for order in orders:
        out, reports = kernel(case.inputs, case.expected.shape, order)
        assert not reports, f"{name}, order {order}:\n" + "\n".join(reports)
        assert_parity(out, case.expected, name=f"{name}, order {order}", condition=case.condition)
