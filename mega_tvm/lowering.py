"""The TIR pipeline of every CPU kernel: TVM's own, with accumulators kept on the stack."""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.tirx.compilation_pipeline import register_tir_pipeline

CPU_PIPELINE = "mega_cpu"
# Marks a kernel that is called on addresses, see `mega_tvm.aot`.
C_FUNCTION_ATTR = "mega.c_function"
NOALIAS = "tirx.noalias"


@tvm.transform.module_pass(opt_level=0, name="KeepLocalsOnStack")
def keep_locals_on_stack(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
    """Mark every ``local`` buffer so that it becomes an ``alloca``.

    By default a local buffer over a few bytes becomes a workspace allocation: a call for each tile,
    and memory that LLVM cannot always promote to registers (measured on AVX-512: attention of one
    row of 60 keys 1.2 us in place of 2.3, of 60 rows 47 in place of 49).
    """

    def mark(alloc: tirx.AllocBuffer) -> tirx.AllocBuffer:
        if alloc.buffer.scope() != "local":
            return alloc
        annotations = dict(alloc.annotations)
        annotations["disable_lower_builtin"] = tirx.IntImm("bool", 1)
        return tirx.AllocBuffer(alloc.buffer, annotations)

    functions = {
        gvar: func.with_body(tvm_ffi.structural_map(func.body, [(tirx.AllocBuffer, mark)]))
        if isinstance(func, tirx.PrimFunc)
        else func
        for gvar, func in mod.functions.items()
    }
    return tvm.IRModule(functions, attrs=mod.attrs)


@tvm.transform.module_pass(opt_level=0, name="AllocateOnCpu")
def allocate_on_cpu(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
    """Say where a C function's own buffers lie; a packed function has that from its arguments.

    It must stand around the allocations, which storage rewrite has moved to the top by now. They
    are given back where it ends: the function's return must stand behind it, or they never are.
    """
    functions = {}
    for gvar, func in mod.functions.items():
        if isinstance(func, tirx.PrimFunc) and C_FUNCTION_ATTR in func.attrs:
            *steps, end = func.body.seq
            if not isinstance(end, tirx.stmt.Return):
                raise AssertionError(f"{gvar.name_hint} must end in a return")
            body = tirx.SeqStmt(steps)
            cpu = int(tvm.cpu().dlpack_device_type())
            for key, value in (("device_id", 0), ("device_type", cpu)):
                body = tirx.AttrStmt("default", key, tirx.const(value, "int32"), body)
            func = func.with_body(tirx.SeqStmt([body, end]))
        functions[gvar] = func
    return tvm.IRModule(functions, attrs=mod.attrs)


@tvm.transform.module_pass(opt_level=0, name="ForgetNoAlias")
def forget_noalias(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
    """Let arguments of all functions overlap, where those of one may: see `c_function.serial_form`.

    In a library's module TVM 0.27 gives LLVM's ``noalias`` to functions that say otherwise, once
    others have it. Those lose nothing: bodies of parallel loops get arguments by way of memory.
    (Default model, two threads: 1.054 times as fast, turn by turn.)
    """
    functions = mod.functions.items()
    if all(func.attrs.get(NOALIAS, True) for _, func in functions if _is_tir(func)):
        return mod
    kept = {g: func.with_attr(NOALIAS, False) if _is_tir(func) else func for g, func in functions}
    return tvm.IRModule(kept, attrs=mod.attrs)


def _is_tir(func: Any) -> bool:
    return isinstance(func, tirx.PrimFunc)


@tvm.transform.module_pass(opt_level=0, name="KeepCFunctionsPrivate")
def keep_c_functions_private(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
    """Take back the symbol that Relax gives to every PrimFunc: with one, it would become packed."""
    functions = {
        gvar: func.without_attr("global_symbol")
        if isinstance(func, tirx.PrimFunc) and C_FUNCTION_ATTR in func.attrs
        else func
        for gvar, func in mod.functions.items()
    }
    return tvm.IRModule(functions, attrs=mod.attrs)


@tvm.transform.module_pass(opt_level=0, name="OrderShapeFunctions")
def order_shape_functions(mod: tvm.IRModule, _ctx: Any) -> tvm.IRModule:
    """Store the sizes that the VM computes by their places.

    ``VMShapeLower`` stores them in the order of a hash map over pointers, which differs from one
    process to another: the same model would not give the same bytes. Each is computed from
    arguments alone.
    """
    functions = {}
    for gvar, func in mod.functions.items():
        shapes = isinstance(func, tirx.PrimFunc) and gvar.name_hint.startswith("shape_func")
        if shapes and isinstance(func.body, tirx.SeqStmt):
            stores = sorted(func.body.seq, key=lambda store: int(store.indices[0]))
            func = func.with_body(tirx.SeqStmt(stores))
        functions[gvar] = func
    return tvm.IRModule(functions, attrs=mod.attrs)


def _cpu_pipeline() -> tuple[Any, Any, Any]:
    lower, finalize_host, finalize_device = s_tir.pipeline.default_s_tir_pipeline()
    return (
        tvm.transform.Sequential([lower, keep_locals_on_stack, allocate_on_cpu, forget_noalias]),
        finalize_host,
        finalize_device,
    )


register_tir_pipeline(CPU_PIPELINE, _cpu_pipeline)
