"""Small kernels, records and workers with faults, for the tests of tuning."""

from __future__ import annotations

import ctypes
import dataclasses
from pathlib import Path

from tvm import tirx
from tvm.s_tir.meta_schedule.database import Workload
from tvm.target import Target

import mega_tvm
from mega_tvm.targets import CpuTarget, resolve_target
from mega_tvm.tuning import trial, worker_main
from mega_tvm.tuning.record import Record, TargetKey, kernel_key
from mega_tvm.tuning.space import Space
from mega_tvm.tuning.tasks import Kernel
from mega_tvm.tuning.trial import Task
from schedules.common.decisions import read
from schedules.common.kernel import ScheduledKernel
from schedules.dense.naive import DenseSpec, dense
from schedules.layer_norm.naive import LayerNormSpec, layer_norm

ROOT = Path(mega_tvm.__file__).parents[1]


def native(threads: int = 1) -> CpuTarget:
    return dataclasses.replace(resolve_target("native"), num_cores=threads)


def target_key() -> TargetKey:
    return TargetKey.of(native())


def kernel_of(func: tirx.PrimFunc, name: str = "kernel", threads: int = 1) -> Kernel:
    target = native(threads)
    space = Space.of(func, target.tvm_target())
    task = Task(name, Workload(space.workload).as_json(), target)
    return Kernel(name, kernel_key(func), calls=1, in_a_row=1, space=space, task=task)


def dense_kernel(rows: int = 257, name: str = "dense", threads: int = 1) -> Kernel:
    return kernel_of(dense(DenseSpec((1, rows), 13, 40)), name, threads)


def norm_kernel() -> Kernel:
    """A kernel of four candidates."""
    return kernel_of(layer_norm(LayerNormSpec((1,), 40, 1e-5, affine=False)), "layer_norm")


def record(
    kernel: Kernel,
    seconds: float | None = 1e-5,
    hand_seconds: float | None = None,
    **decisions: int,
) -> Record:
    """Return a record of a kernel; ``decisions`` replace the hand schedule's."""
    return Record.make(
        kernel.space,
        {**kernel.space.hand, **decisions},
        kernel.task.target.tvm_target(),
        seconds,
        hand_seconds=hand_seconds,
        error=None if seconds is not None else "crashed",
    )


# Faults, by the value of tile_m of a dense kernel that has them; and of a layer norm by its unroll.
FAULTS = {"crash": 1, "hang": 2, "wrong": 3, "build crash": 4, "build hang": 5, "build error": 6}
_NORM_FAULTS = {1: "crash", 8: "build error"}


def install_faults() -> None:
    """Make some candidates faulty, in the process that calls it."""
    real = trial.generate

    def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
        kernel = real(func, target)
        chosen = read(func)
        by_tile = {value: name for name, value in FAULTS.items()}
        fault = by_tile.get(chosen.get("tile_m", 0)) or _NORM_FAULTS.get(chosen.get("unroll", 0))
        return _faulty(kernel, fault) if fault else kernel

    trial.generate = generate
    short_budget()


def _faulty(kernel: ScheduledKernel, fault: str) -> ScheduledKernel:
    if fault == "build crash":
        ctypes.string_at(0)
    if fault == "build hang":
        ctypes.PyDLL(None).sleep(600)  # holds the interpreter's lock, as a loop in C would
    if fault == "build error":
        raise ValueError("no such tile")
    if fault == "wrong":
        pack = dict(kernel.pack)
        return ScheduledKernel(kernel.func, {**pack, 2: lambda bias: pack[2](bias + 1)})
    function = {"crash": "abort", "hang": "pause"}[fault]
    call = tirx.Evaluate(tirx.call_extern("int32", function))
    return dataclasses.replace(
        kernel, func=kernel.func.with_body(tirx.SeqStmt([call, kernel.func.body]))
    )


def short_budget() -> None:
    """Time candidates for no longer than a test needs."""
    trial.COLD_BYTES = 1 << 16
    worker_main.BUDGET_S = 0.005
    worker_main.PAIRED_BUDGET_S, worker_main.PAIRED_ROUNDS = 0.02, 5
