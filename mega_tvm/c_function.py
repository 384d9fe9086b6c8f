"""Kernels as plain C functions on addresses, as run functions call them."""

from __future__ import annotations

import dataclasses

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, GlobalVar

from schedules.common.dims import Extent
from schedules.dense.naive import DenseSpec
from schedules.registry import kernel_op

from .lowering import C_FUNCTION_ATTR, NOALIAS
from .relax_ops import extents

ITEM = 4  # bytes of a float32


@dataclasses.dataclass(frozen=True)
class CFunction:
    """A kernel on addresses, and the shapes of its arguments, which tell what its variables are.

    It takes the variables behind the addresses.
    """

    func: tirx.PrimFunc
    shapes: list[tuple[Extent, ...]]

    def values(self, shapes: list[tuple[Extent, ...]]) -> list[Extent]:
        """Return the variables' values for arguments of the given shapes."""
        found: dict[tirx.Var, Extent] = {}
        for own, given in zip(self.shapes, shapes, strict=True):
            for extent, value in zip(own, given, strict=True):
                if isinstance(extent, tirx.Var):
                    found[extent] = value
        variables = self.func.params[len(self.shapes) :]
        return [found[variable] for variable in variables]


def as_c_function(func: tirx.PrimFunc) -> CFunction:
    """Return a kernel that takes bare addresses in place of tensors; it returns 0.

    They may lie anywhere: a vector instruction that asks for no alignment is as fast on aligned
    data, and a call's input, or the rows of a piece, need not be copied for it.
    """
    shapes = [extents(buffer.shape) for buffer in func.params]
    named = [extent for shape in shapes for extent in shape if isinstance(extent, tirx.Var)]
    variables = list(dict.fromkeys(named))
    pointers = [
        tirx.Var(buffer.name, tvm.ir.PointerType(tvm.ir.PrimType(str(buffer.dtype))))
        for buffer in func.params
    ]
    declared = [
        tirx.DeclBuffer(buffer, data=pointer)
        for buffer, pointer in zip(func.params, pointers, strict=True)
    ]
    stmt = func.body
    for pointer in pointers:
        stmt = tirx.AttrStmt(pointer, "storage_alignment", tirx.const(ITEM, "int32"), stmt)
    body = tirx.SeqStmt([*declared, stmt, tirx.stmt.Return(tirx.const(0, "int32"))])
    attrs = {key: value for key, value in func.attrs.items() if key != "global_symbol"}
    attrs[C_FUNCTION_ATTR] = True
    plain = tirx.PrimFunc(
        [*pointers, *variables],
        body,
        tvm.ir.PrimType("int32"),
        tvm.ir.make_node("ir.DictAttrs", **attrs),
    )
    return CFunction(plain, shapes)


def packed_form(func: tirx.PrimFunc, function: GlobalVar, kernel: CFunction) -> tirx.PrimFunc:
    """Return a kernel for the VM, which calls the one on addresses: the code is there once."""
    variables = kernel.func.params[len(kernel.shapes) :]
    call = Call(function, [*(buffer.data for buffer in func.params), *variables], ret_ty="int32")
    error, message = map(tvm.ir.StringImm, ("RuntimeError", "a kernel failed: out of memory"))
    return tirx.PrimFunc(
        func.params,
        tirx.AssertStmt(call == 0, error, [message]),  # TVM 0.27 names the first two the other way
        None,
        tvm.ir.make_node("ir.DictAttrs", **{"tirx.is_scheduled": True}),
    )


def serial_form(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a kernel whose loops run on the calling thread, which is one of several already.

    Its arguments may overlap for all that LLVM knows, as in the body of a parallel loop, which gets
    them by way of memory. Else it reads ahead of the loop what its body needs a few times, and
    keeps it on the stack (a dense kernel in pairs: 100 vectors). `lowering.forget_noalias` sees to
    it that TVM's code has it so.
    """

    def serial(loop: tirx.For) -> tirx.For:
        if loop.kind != tirx.ForKind.PARALLEL:
            return loop
        return tirx.For(
            loop.loop_var, loop.min, loop.extent, tirx.ForKind.SERIAL, loop.body, None, {}
        )

    body = tvm_ffi.structural_map(func.body, [(tirx.For, serial)])
    return func.with_body(body).with_attr(NOALIAS, False)


def overwritable(func: tirx.PrimFunc) -> int | None:
    """Return which argument a kernel may have as its output too; None if there is none.

    A dense kernel reads each element of its residual just before it writes that of the output.
    """
    return 3 if kernel_op(func) == "dense" and DenseSpec.of(func).residual else None
