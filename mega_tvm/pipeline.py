"""The compiler's five phases.

1. graph     prune to the last timestep, fold, merge (`mega_tvm.passes`, `mega_tvm.cuda.passes`)
2. kernels   legalize to TensorIR: Mega's operators to their naive PrimFuncs, all others by TVM
3. schedule  a schedule for every PrimFunc; nothing stays as it was written
4. pack      weights into the layouts that the schedules want, and out of the module
5. lower     one run function an entry (`mega_tvm.aot`), the same for the Relax VM, and LLVM code;
             for GPUs the VM's alone, and CUDA code (`mega_tvm.cuda.lowering`)

Packing stands behind scheduling, since a schedule's decisions choose the layout.
"""

from __future__ import annotations

import dataclasses
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tvm
from tvm import relax, tirx
from tvm.ir import Op

from schedules.common.kernel import ScheduledKernel
from schedules.common.spec import SPEC_ATTR
from schedules.generic.cpu import schedule as generic_schedule
from schedules.generic.cuda import schedule as generic_cuda_schedule
from schedules.registry import hand_schedule, kernel_op

from .aot import RUN_SUFFIX, add_run_functions, tensor_block
from .cuda.lowering import generated_source, launch_threads, lower_cuda
from .cuda.narrow_tensors import narrow_tensors
from .cuda.passes import CUDA_PASSES
from .cuda.target import CudaTarget
from .dtypes import FLOAT32
from .errors import CompileError, UnsupportedModelError
from .lowering import CPU_PIPELINE, keep_c_functions_private, order_shape_functions
from .packing import pack_phase
from .passes import GRAPH_PASSES, OPTIONAL_PASSES
from .passes.carry_state import states_of, without_state
from .passes.fast_products import fast_products as fast_products_pass
from .passes.split_window import WindowSplit, split_of, without_windows
from .symbolic_entry import BATCH, FIXED, SEQ_LEN, workspace_bytes
from .targets import CpuTarget
from .tuning.lookup import TunedSchedules

PHASES = ("graph", "kernels", "schedule", "pack", "lower")
SCHEDULE_ATTR = "mega.schedule"


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the pipeline hands on.

    Parameters
    ----------
    executable : relax.VMExecutable
        Each entry twice: ``<entry>__run``, see `mega_tvm.aot`, and ``(x, tensors)`` for the VM.
        For a GPU, only the VM's.
    tensors : list of array
        The packed constants.
    workspaces : dict of str to dict
        Bytes of workspace that ``<entry>__run`` takes, by region: see `mega_tvm.symbolic_entry`; on
        a GPU, bytes that all entries take.
    states : dict of str to list
        Of an entry that carries state, ``kind`` and ``width`` of each array, in order.
    windows : WindowSplit or None
        The functions of windows.
    kernels : list of dict
        Per kernel: ``name``, ``op``, ``spec`` (None for operators that are not Mega's),
        ``schedule`` (its source) and ``calls`` (over all entries); for a GPU also ``launches``, the
        device functions that a call launches, with the threads of a block.
    seconds : dict
        Wall time of each phase.
    """

    executable: Any
    tensors: list[npt.NDArray[Any]]
    workspaces: dict[str, dict[str, int]]
    states: dict[str, list[dict[str, Any]]]
    windows: WindowSplit | None
    kernels: list[dict[str, Any]]
    seconds: dict[str, float]

    def run(
        self, entry: str, x: npt.NDArray[np.float32], out_shape: tuple[int, ...]
    ) -> npt.NDArray[np.float32]:
        """Run an entry in this process, before anything is written."""
        if not self.executable.mod.implements_function(entry + RUN_SUFFIX, query_imports=True):
            return self._run_on_gpu(entry, x)
        function = self.executable.mod.get_function(entry + RUN_SUFFIX, query_imports=True)
        block = tensor_block(self.tensors)
        sizes = dict(zip((BATCH, SEQ_LEN), x.shape, strict=False))
        workspace = np.zeros(workspace_bytes(self.workspaces[entry], sizes), np.uint8)
        output = np.full(out_shape, np.nan, np.float32)
        arguments = [tvm.runtime.tensor(array) for array in (x, block, workspace, output)]
        function(*arguments)
        result: npt.NDArray[np.float32] = arguments[-1].numpy()
        return result

    def _run_on_gpu(self, entry: str, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        device = tvm.cuda(0)
        machine = relax.VirtualMachine(self.executable, device)
        tensors = [tvm.runtime.tensor(array, device) for array in self.tensors]
        arguments = [tvm.runtime.tensor(x, device), *([tensors] if tensors else [])]
        result: npt.NDArray[np.float32] = machine[entry](*arguments).numpy()
        return result


def passes_of(target: CpuTarget | CudaTarget, dtype: str) -> tuple[tvm.transform.Pass, ...]:
    """Return the passes of the graph phase for a target and a type of weights and activations."""
    passes = (*GRAPH_PASSES, *(CUDA_PASSES if isinstance(target, CudaTarget) else ()))
    return passes if dtype == FLOAT32 else (*passes, narrow_tensors(dtype))


def run_pipeline(
    mod: tvm.IRModule,
    target: CpuTarget | CudaTarget,
    *,
    dtype: str = FLOAT32,
    fast_products: bool = False,
    tuned: TunedSchedules | None = None,
    disabled_passes: Collection[str] = (),
    debug_dump: Path | None = None,
    on_phase: Callable[[str], None] = lambda phase: None,
    on_scheduled: Callable[[], None] = lambda: None,
) -> Compiled:
    """Compile a Relax module.

    Parameters
    ----------
    mod : tvm.IRModule
        As a frontend gives it: one Relax function an entry.
    target : CpuTarget or CudaTarget
        A CudaTarget takes entries of known shapes alone, without state.
    dtype : str
        Type of weights and activations: `mega_tvm.dtypes`.
    fast_products : bool
        Multiply by Strassen's method where that pays: `mega_tvm.passes.fast_products`. For CPUs.
    tuned : TunedSchedules, optional
        Records of tuning logs; without, every kernel gets its hand schedule.
    disabled_passes : collection of str
        Names from `mega_tvm.passes.OPTIONAL_PASSES`.
    debug_dump : Path, optional
        A folder for the module after each phase, and the generated assembly.
    on_phase : callable
        Called with each phase's name as it starts.
    on_scheduled : callable
        Called after the schedule phase; what it raises ends the compile before its slow phases.

    Raises
    ------
    CompileError
        If a pass to switch off is not known.
    UnsupportedModelError
        If operators are left that nothing can lower; all are named.
    """
    check_pass_names(disabled_passes)
    seconds: dict[str, float] = {}
    tvm_target = target.tvm_target()

    def phase(name: str, run: Callable[[], Any]) -> Any:
        on_phase(name)
        start = time.perf_counter()
        result = run()
        seconds[name] = time.perf_counter() - start
        module = result[0] if isinstance(result, tuple) else result
        if debug_dump is not None and isinstance(module, tvm.IRModule):
            _dump(module, debug_dump / f"{PHASES.index(name) + 1}_{name}.py")
        return result

    if debug_dump is not None:
        _dump(mod, debug_dump / "0_import.py")
    with tvm_target:
        passes = (*GRAPH_PASSES, *(CUDA_PASSES if isinstance(target, CudaTarget) else ()))
        if dtype != FLOAT32:
            passes = (*passes, narrow_tensors(dtype))
        if fast_products:
            passes = (*passes, fast_products_pass)
        passes = passes_of(target, dtype)
        mod = phase("graph", lambda: graph_phase(mod, disabled_passes, passes))
        states, windows = states_of(mod), split_of(mod)
        mod = phase("kernels", lambda: kernel_phase(mod))
        scheduled: dict[str, ScheduledKernel] = {}
        mod = phase("schedule", lambda: schedule_phase(mod, tvm_target, scheduled, tuned))
        on_scheduled()
        kernels = _describe_kernels(mod)
        mod, tensors = phase("pack", lambda: pack_phase(mod, scheduled))
        if isinstance(target, CudaTarget):
            entries = _entry_names(mod)
            executable, workspace = phase("lower", lambda: lower_cuda(mod, target, tensors))
            workspaces = {entry: {FIXED: max(workspace, 1)} for entry in entries}
            for kernel in kernels:
                kernel["launches"] = _launches(kernel["name"], launch_threads(executable))
        else:
            mod, workspaces = add_run_functions(mod, tensors)
            mod = without_windows(without_state(mod))
            executable = phase("lower", lambda: lower_phase(mod, tvm_target))
    if debug_dump is not None and isinstance(target, CudaTarget):
        _write(debug_dump / "5_lower.cu", generated_source(executable))
    elif debug_dump is not None:
        assembly = executable.mod.imports[0].inspect_source("asm")
        _write(debug_dump / "5_lower.s", assembly)
    return Compiled(executable, tensors, workspaces, states, windows, kernels, seconds)


def check_pass_names(names: Collection[str]) -> None:
    """Refuse names that are no optional pass."""
    optional = (*OPTIONAL_PASSES, *(p.info.name for p in CUDA_PASSES))
    unknown = sorted(set(names) - set(optional))
    if unknown:
        raise CompileError(
            f"cannot switch off {', '.join(unknown)}: the passes that can be switched off are "
            + ", ".join(optional)
        )


def graph_phase(
    mod: tvm.IRModule,
    disabled_passes: Collection[str] = (),
    passes: Sequence[tvm.transform.Pass] = GRAPH_PASSES,
) -> tvm.IRModule:
    """Run the graph passes that are not switched off."""
    wanted = [p for p in passes if p.info.name not in disabled_passes]
    return tvm.transform.Sequential(wanted)(mod)


def kernel_phase(mod: tvm.IRModule) -> tvm.IRModule:
    """Legalize every operator to TensorIR, and fuse what is elementwise among TVM's own."""
    mod = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.RewriteDataflowReshape(),
            relax.transform.DeadCodeElimination(),
        ]
    )(mod)
    left = sorted(
        {
            str(call.op.name)
            for _, call in calls_of(mod)
            if isinstance(call.op, Op) and str(call.op.name) not in _LOWERED_LATER
        }
    )
    if left:
        raise UnsupportedModelError(
            f"{len(left)} operator(s) cannot be lowered: {', '.join(left)}. Rewrite them in terms "
            "of supported ones, or keep them outside the compiled module."
        )
    return mod


_LOWERED_LATER = frozenset({"relax.call_tir", "relax.reshape"})


def schedule_phase(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    scheduled: dict[str, ScheduledKernel],
    tuned: TunedSchedules | None = None,
) -> tvm.IRModule:
    """Schedule every PrimFunc; ``scheduled`` is filled with Mega's kernels, by name."""
    functions = dict(mod.functions_items())
    for gvar, func in functions.items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        op = kernel_op(func)
        if op is None:
            generic = generic_cuda_schedule if target.kind.name == "cuda" else generic_schedule
            new = generic(func, target).with_attr(SCHEDULE_ATTR, "generic")
        else:
            name, source = str(gvar.name_hint), "hand"
            if tuned is None:
                kernel = hand_schedule(func, target)
            else:
                kernel = tuned.schedule(name, func, target)
                source = tuned.outcomes[name].source
            scheduled[name] = kernel
            marks = {key: func.attrs[key] for key in ("mega.op", SPEC_ATTR)}
            new = kernel.func.with_attr({**marks, SCHEDULE_ATTR: source})
        mod.update_func(gvar, new)
    return mod


def lower_phase(mod: tvm.IRModule, target: tvm.target.Target) -> Any:
    """Lower to VM bytecode and LLVM code; returns the executable."""
    to_vm = tvm.transform.Sequential(
        [
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            order_shape_functions,
            relax.transform.AttachGlobalSymbol(),
            keep_c_functions_private,
        ]
    )
    return relax.build(mod, target, relax_pipeline=to_vm, tir_pipeline=CPU_PIPELINE)


def calls_of(mod: tvm.IRModule) -> Iterator[tuple[str, relax.Call]]:
    """Yield every bound call of every Relax function, with the function's name."""
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            for block in func.body.blocks:
                for binding in block.bindings:
                    if isinstance(binding.value, relax.Call):
                        yield gvar.name_hint, binding.value


def _entry_names(mod: tvm.IRModule) -> list[str]:
    return [g.name_hint for g, func in mod.functions_items() if isinstance(func, relax.Function)]


def _launches(kernel: str, threads: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {"name": name, "threads": count}
        for name, count in sorted(threads.items())
        if re.fullmatch(rf"{re.escape(kernel)}_kernel(_\d+)?", name)
    ]


def _describe_kernels(mod: tvm.IRModule) -> list[dict[str, Any]]:
    calls = Counter(
        call.args[0].name_hint for _, call in calls_of(mod) if call.op == Op.get("relax.call_tir")
    )
    kernels = []
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            spec = json.loads(str(func.attrs[SPEC_ATTR])) if SPEC_ATTR in func.attrs else None
            kernels.append(
                {
                    "name": str(gvar.name_hint),
                    "op": kernel_op(func) or "generic",
                    "spec": spec,
                    "schedule": str(func.attrs[SCHEDULE_ATTR]),
                    "calls": calls[gvar.name_hint],
                }
            )
    return sorted(kernels, key=lambda kernel: str(kernel["name"]))


def _dump(mod: tvm.IRModule, path: Path) -> None:
    _write(path, mod.script(show_meta=False))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CompileError(f"{path}: the debug dump cannot be written: {error}") from error
