"""One candidate: generated, compiled, checked and timed.

It is timed as a model runs it. A function ``run(inputs.., tensors, y)`` calls the kernel a number
of times as a plain C function on addresses, as the run function of an entry does (`mega_tvm.aot`),
so that a trial pays for no packed call. Each call gets another copy of the packed weights: those of
a model do not stay in L2 from one run to the next, nor do these; its activations, just written, do.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import Call, GlobalVar
from tvm.s_tir.meta_schedule.database import Workload
from tvm.script import tirx as T
from tvm.target import Target

from schedules.common.kernel import ScheduledKernel
from schedules.registry import generate

from ..c_function import as_c_function
from ..cuda.target import CudaTarget
from ..errors import MegaError
from ..lowering import CPU_PIPELINE
from ..manifest_schema import round_up
from ..targets import CpuTarget
from ..tensor_memory import reserve
from ..tolerances import compare
from . import cuda_trial
from .operands import Operands, make_operands
from .space import Decisions, Space

RUN = "run"
# Twice what the default model's weights take, and more than any core's L2.
COLD_BYTES = 24 << 20
# A kernel of so many calls in a row takes long enough for the clock.
LEAST_CALLS = 8
LEAST_REPEATS, MOST_REPEATS = 5, 400


# Says that memory was read: else LLVM drops calls of a small kernel, whose output the next one
# writes again.
_KEEP = """
define weak i32 @mega_keep(ptr %p) noinline {
  call void asm sideeffect "", "r,~{memory}"(ptr %p)
  ret i32 0
}
"""


class WrongResultError(MegaError):
    """A candidate computes something else than the naive kernel."""


@dataclasses.dataclass(frozen=True)
class Task:
    """A kernel to tune, as a worker gets it: all of it can be pickled.

    Parameters
    ----------
    name : str
    workload : str or list
        The naive kernel as MetaSchedule's JSON.
    target : CpuTarget or CudaTarget
        A CPU's ``num_cores`` is the thread count.
    """

    name: str
    workload: Any
    target: CpuTarget | CudaTarget

    @property
    def threads(self) -> int:
        """Threads that the kernel runs with; 1 on a GPU."""
        return self.target.num_cores if isinstance(self.target, CpuTarget) else 1

    def space(self) -> Space:
        """Return the kernel's space."""
        func = Workload.from_json(self.workload).mod["main"]
        return Space.of(func, self.target.tvm_target())


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A compiled candidate with its arguments.

    Parameters
    ----------
    executable : Executable
        Holds `RUN`.
    arguments : tuple of array
        Those of `RUN`, but for the output.
    calls : int
        Calls of the kernel in one `RUN`.
    runs : int
        `RUN`s that are timed together.
    on_gpu : bool
        Whether it runs on the first GPU.
    """

    executable: Any
    arguments: tuple[npt.NDArray[Any], ...]
    calls: int
    runs: int = 1
    on_gpu: bool = False


def build(
    kernel: ScheduledKernel, operands: Operands, target: Target, calls: int | None = None
) -> Candidate:
    """Compile a scheduled kernel for timing; ``calls`` are chosen by its weights if not given."""
    packed = {index: pack(operands.inputs[index]) for index, pack in kernel.pack.items()}
    offsets, slot = {}, 0
    for index, array in packed.items():
        offsets[index] = slot
        slot = round_up(slot + array.nbytes)
    calls = calls or max(LEAST_CALLS, -(-COLD_BYTES // slot) if slot else 0)
    block = np.zeros(max(slot, 1), np.uint8)
    for index, array in packed.items():
        block[offsets[index] : offsets[index] + array.nbytes] = array.reshape(-1).view(np.uint8)
    tensors = np.tile(block, calls)
    plain = [a for index, a in enumerate(operands.inputs) if index not in packed]
    mod = _timing_module(kernel.func, offsets, slot)
    executable = tvm.compile(mod, target, tir_pipeline=CPU_PIPELINE)
    return Candidate(executable, (*plain, tensors), calls)


def build_candidate(task: Task, decisions: Decisions, operands: Operands) -> Candidate:
    """Generate and compile what decisions select."""
    target, space = task.target.tvm_target(), task.space()
    kernel = generate(space.schedule(decisions).mod["main"], target)
    if isinstance(task.target, CudaTarget):
        executable, arguments = cuda_trial.build(kernel, operands, task.target, RUN)
        return Candidate(executable, arguments, 1, runs=cuda_trial.RUNS, on_gpu=True)
    return build(kernel, operands, target)


def task_operands(task: Task) -> Operands:
    """Return a task's inputs and what must come out."""
    return make_operands(Workload.from_json(task.workload).mod["main"])


def _timing_module(func: tirx.PrimFunc, offsets: Mapping[int, int], slot: int) -> tvm.IRModule:
    builder = relax.BlockBuilder()
    kernel: GlobalVar = builder.add_func(as_c_function(func).func, "kernel")
    names = [f"a{index}" for index in range(len(func.params))]
    plain = {
        index: tirx.decl_buffer(param.shape, str(param.dtype), name)
        for index, (param, name) in enumerate(zip(func.params, names, strict=True))
        if index not in offsets
    }
    # A constant number of calls would let LLVM work at the loop for minutes.
    tensor_bytes, call = tirx.Var("tensor_bytes", "int64"), tirx.Var("call", "int64")
    tensors = tirx.decl_buffer((tensor_bytes,), "uint8", "tensors")

    def address(index: int) -> tirx.PrimExpr:
        if index in offsets:
            return T.address_of(tensors[call * slot + offsets[index]])
        return plain[index].data

    value = Call(kernel, [address(index) for index in range(len(func.params))], ret_ty="int32")
    failed = tirx.stmt.Return(tirx.const(1, "int32"))
    kept = tirx.Evaluate(tirx.call_extern("int32", "mega_keep", plain[max(plain)].data))
    body = tirx.For(
        call,
        tirx.const(0, "int64"),
        tirx.floordiv(tensor_bytes, tirx.const(max(slot, 1), "int64")),
        tirx.ForKind.SERIAL,
        tirx.SeqStmt([tirx.IfThenElse(value != 0, failed, None), kept]),
    )
    body = tirx.AttrStmt("default", "pragma_import_llvm", _KEEP, body)
    *inputs, output = plain.values()
    run = tirx.PrimFunc(
        [*inputs, tensors, output],
        tirx.SeqStmt([body, tirx.stmt.Return(tirx.const(0, "int32"))]),
        tvm.ir.PrimType("int32"),
        tvm.ir.make_node("ir.DictAttrs", **{"tirx.is_scheduled": True}),
    )
    builder.add_func(run.with_attr("global_symbol", RUN), RUN)
    return builder.get()


class Loaded:
    """A candidate on the device that runs it, local or remote."""

    def __init__(self, candidate: Candidate, operands: Operands, module: Any, device: Any) -> None:
        self._module, self._device, self._operands = module, device, operands
        self._calls, self._runs = candidate.calls, candidate.runs
        output = np.full(operands.expected.shape, np.nan, np.dtype(operands.dtypes[-1]))
        *plain, weights = candidate.arguments
        self._arguments = [
            *(tvm.runtime.tensor(a, device) for a in plain),
            _on_huge_pages(weights) if device == tvm.cpu() else tvm.runtime.tensor(weights, device),
            tvm.runtime.tensor(output, device),
        ]

    @classmethod
    def here(cls, candidate: Candidate, operands: Operands) -> Loaded:
        """Load a candidate into this process."""
        device = tvm.cuda() if candidate.on_gpu else tvm.cpu()
        return cls(candidate, operands, candidate.executable.jit(), device)

    @classmethod
    def there(cls, candidate: Candidate, operands: Operands, session: Any, library: Path) -> Loaded:
        """Load a candidate into an RPC session, by way of a file."""
        candidate.executable.export_library(str(library))
        session.upload(str(library))
        device = session.cuda() if candidate.on_gpu else session.cpu()
        return cls(candidate, operands, session.load_module(library.name), device)

    def check(self) -> float:
        """Run once and compare with the naive kernel; return how long a repeat of `time` takes.

        Raises
        ------
        WrongResultError
        """
        start = time.perf_counter()
        self._module[RUN](*self._arguments)
        seconds = time.perf_counter() - start
        known = self._operands
        parity = compare(
            self._arguments[-1].numpy(), known.expected, known.dtypes[-1], condition=known.condition
        )
        if not parity.ok:
            raise WrongResultError(f"wrong result: {parity}")
        if self._runs > 1:  # a GPU gets its code at the first run, and runs it when it likes
            return self.time(1) * self._calls * self._runs
        return seconds

    def time(self, repeats: int) -> float:
        """Return the shortest time of a call in seconds."""
        timer = self._module.time_evaluator(RUN, self._device, number=self._runs, repeat=repeats)
        return min(timer(*self._arguments).results) / self._calls

    def measure(self, budget_s: float) -> float:
        """Check, then time for about ``budget_s``; return seconds a call."""
        once = self.check()
        return self.time(int(min(MOST_REPEATS, max(LEAST_REPEATS, budget_s / once))))


def _on_huge_pages(weights: npt.NDArray[Any]) -> Any:
    """Return the bytes of all weights where a loaded model has them."""
    memory = np.frombuffer(reserve(weights.nbytes), np.uint8)
    memory[:] = weights
    return tvm_ffi.from_dlpack(memory)


def paired_times(
    first: Loaded, second: Loaded, rounds: int, budget_s: float
) -> tuple[float, float, float, float]:
    """Time two candidates turn by turn, so that a change of the machine's pace meets both.

    Returns
    -------
    float, float
        Shortest time of a call of each, in seconds.
    float, float
        Median and lower quartile over rounds of the ratio first / second: above 1 where the second
        is faster.
    """
    once = max(first.check(), second.check())
    repeats = int(min(MOST_REPEATS, max(2, budget_s / (2 * rounds * once))))
    times: list[tuple[float, float]] = []
    order: list[Callable[[int], float]] = [first.time, second.time]
    for index in range(rounds):
        if index % 2:
            b, a = order[1](repeats), order[0](repeats)
        else:
            a, b = order[0](repeats), order[1](repeats)
        times.append((a, b))
    quartile, median = np.quantile([a / b for a, b in times], [0.25, 0.5])
    return min(a for a, _ in times), min(b for _, b in times), float(median), float(quartile)
