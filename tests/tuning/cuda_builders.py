"""Small kernels for GPUs, and workers on the emulated one. Import only in its process."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tvm import tirx
from tvm.s_tir.meta_schedule.database import Workload

from mega_tvm.cuda.target import resolve_cuda
from mega_tvm.tuning import cuda_trial, trial, worker_main
from mega_tvm.tuning.record import kernel_key
from mega_tvm.tuning.space import Space
from mega_tvm.tuning.tasks import Kernel
from mega_tvm.tuning.trial import Task
from schedules.common.kernel import ScheduledKernel
from tests.cuda.emulator.environment import emulated

SM80 = resolve_cuda("cuda-sm_80")


def kernel_of(func: tirx.PrimFunc, name: str = "kernel") -> Kernel:
    space = Space.of(func, SM80.tvm_target())
    task = Task(name, Workload(space.workload).as_json(), SM80)
    return Kernel(name, kernel_key(func), calls=1, in_a_row=1, space=space, task=task)


@contextlib.contextmanager
def emulated_environment() -> Iterator[None]:
    """Let processes that start within the context find the emulator."""
    with tempfile.TemporaryDirectory() as folder:
        variables = emulated(Path(folder))
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value


def few_runs() -> None:
    """Time candidates in few runs: each takes its time in emulation."""
    cuda_trial.RUNS = 2
    trial.LEAST_REPEATS = trial.MOST_REPEATS = 1
    worker_main.PAIRED_ROUNDS = 3


def install_faults() -> None:
    """Make some candidates of a layer norm faulty, by the warps of a block."""
    few_runs()
    real = trial.generate

    def generate(func, target) -> ScheduledKernel:
        warps = int(func.body.block.annotations["mega.warps"])
        kernel = real(func, target)
        if warps == 2:  # wrong: it normalizes nothing
            return real_copy(func)
        if warps == 4:
            raise ValueError("no such tile")
        if warps == 8:
            os.abort()
        return kernel

    trial.generate = generate


def real_copy(func: tirx.PrimFunc) -> ScheduledKernel:
    """Return a kernel that copies its first row alone."""
    from tvm.script import tirx as T

    shape = tuple(int(size) for size in func.params[0].shape)
    size = shape[-1]

    @T.prim_func(s_tir=True, private=True)
    def copy(x: T.Buffer(shape, "float32"), y: T.Buffer(shape, "float32")):
        for _ in T.thread_binding(1, thread="blockIdx.x"):
            for t in T.thread_binding(32, thread="threadIdx.x"):
                for i in T.serial((size + 31) // 32):
                    if i * 32 + t < size:
                        y[0, 0, i * 32 + t] = x[0, 0, i * 32 + t]

    return ScheduledKernel(copy)
