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

import re
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Op

from schedules.common.kernel import ScheduledKernel
from schedules.common.spec import SPEC_ATTR
from schedules.generic.cpu import schedule as generic_schedule
from schedules.generic.cuda import schedule as generic_cuda_schedule
from schedules.registry import hand_schedule, kernel_op

from .aot import add_run_functions
from .compiled import Compiled
from .core_probe import pairs_pay
from .cuda.lowering import generated_source, launch_threads, lower_cuda
from .cuda.narrow_tensors import narrow_tensors
from .cuda.passes import CUDA_PASSES
from .cuda.target import CudaTarget
from .dtypes import FLOAT32
from .errors import CompileError, UnsupportedModelError
from .kernel_list import SCHEDULE_ATTR, calls_of, describe_kernels, kernels_in_pieces
from .lowering import CPU_PIPELINE, keep_c_functions_private, order_shape_functions
from .packing import pack_phase
from .passes import CPU_PASSES, GRAPH_PASSES, OPTIONAL_PASSES
from .passes.carry_state import states_of, without_state
from .passes.pair_products import pair_products
from .passes.piece_kernels import own_piece_kernels
from .passes.split_rows import mark_splittable, without_pieces
from .passes.split_window import split_of, without_windows
from .symbolic_entry import FIXED
from .targets import CpuTarget
from .tuning.lookup import TunedSchedules

PHASES = ("graph", "kernels", "schedule", "pack", "lower")


def passes_of(
    target: CpuTarget | CudaTarget, dtype: str, threads: int
) -> tuple[tvm.transform.Pass, ...]:
    """Return the passes of the graph phase.

    Parameters
    ----------
    target : CpuTarget or CudaTarget
    dtype : str
        Type of weights and activations.
    threads : int
        The thread count that the library will mostly run with.
    """
    if isinstance(target, CudaTarget):
        passes = (*GRAPH_PASSES, *CUDA_PASSES)
    else:
        passes = (mark_splittable(threads), *GRAPH_PASSES, *CPU_PASSES)
        if target.name != "native" or not pairs_pay(target.tvm_target()):
            passes = tuple(p for p in passes if p.info.name != pair_products.info.name)
    return passes if dtype == FLOAT32 else (*passes, narrow_tensors(dtype))


def run_pipeline(
    mod: tvm.IRModule,
    target: CpuTarget | CudaTarget,
    *,
    dtype: str = FLOAT32,
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
        threads = 1 if tuned is None else tuned.threads
        passes = passes_of(target, dtype, threads)
        mod = phase("graph", lambda: graph_phase(mod, disabled_passes, passes))
        states, windows = states_of(mod), split_of(mod)
        mod = phase("kernels", lambda: kernel_phase(mod))
        scheduled: dict[str, ScheduledKernel] = {}
        mod = phase("schedule", lambda: schedule_phase(mod, tvm_target, scheduled, tuned))
        on_scheduled()
        kernels = describe_kernels(mod)
        mod, tensors = phase("pack", lambda: pack_phase(mod, scheduled))
        if isinstance(target, CudaTarget):
            entries = _entry_names(mod)
            executable, workspace = phase("lower", lambda: lower_cuda(mod, target, tensors))
            workspaces = {entry: {FIXED: max(workspace, 1)} for entry in entries}
            for kernel in kernels:
                kernel["launches"] = _launches(kernel["name"], launch_threads(executable))
        else:
            mod, workspaces = add_run_functions(mod, tensors)
            mod = without_pieces(without_windows(without_state(mod)))
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
    """Legalize every operator to TensorIR, and fuse what is elementwise among TVM's own.

    What runs in pieces of rows is then a kernel by itself.
    """
    mod = tvm.transform.Sequential(
        [
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.RewriteDataflowReshape(),
            relax.transform.DeadCodeElimination(),
            own_piece_kernels,
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


_LOWERED_LATER = frozenset({"relax.call_tir", "relax.call_pure_packed", "relax.reshape"})


def schedule_phase(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    scheduled: dict[str, ScheduledKernel],
    tuned: TunedSchedules | None = None,
) -> tvm.IRModule:
    """Schedule every PrimFunc; ``scheduled`` is filled with Mega's kernels, by name."""
    functions = dict(mod.functions_items())
    in_pieces = kernels_in_pieces(mod)
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
                kernel = tuned.schedule(name, func, target, in_pieces=name in in_pieces)
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


def _entry_names(mod: tvm.IRModule) -> list[str]:
    return [g.name_hint for g, func in mod.functions_items() if isinstance(func, relax.Function)]


def _launches(kernel: str, threads: Mapping[str, int]) -> list[dict[str, Any]]:
    return [
        {"name": name, "threads": count}
        for name, count in sorted(threads.items())
        if re.fullmatch(rf"{re.escape(kernel)}_kernel(_\d+)?", name)
    ]


def _dump(mod: tvm.IRModule, path: Path) -> None:
    _write(path, mod.script(show_meta=False))


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CompileError(f"{path}: the debug dump cannot be written: {error}") from error
