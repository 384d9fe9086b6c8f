"""How an entry's input must be aligned, so that it is read where it lies.

Kernels read whole vectors at whole cache lines, but for a dense kernel's input, of which they read
one number at a time. A Mega with an input projection takes any array then, and a call copies
nothing: 69 KB of 60 frames, 4.5 MB of 4096.
"""

from __future__ import annotations

import tvm
from tvm import relax

from schedules.registry import kernel_op

from .manifest_schema import ALIGNMENT
from .passes.rewrite import Graph, variables
from .passes.split_rows import CALL
from .relax_ops import is_op

ITEM = 4  # bytes of a float32


def input_alignment(mod: tvm.IRModule, name: str) -> int:
    """Return the bytes that an entry's input must be aligned to.

    Parameters
    ----------
    mod : tvm.IRModule
        As the schedule phase leaves it.
    name : str
        The entry's Relax function.
    """
    func = mod[name]
    return ITEM if _read_by_items(mod, func, func.params[0]) else ALIGNMENT


def _read_by_items(mod: tvm.IRModule, func: relax.Function, x: relax.Var) -> bool:
    for var, value in Graph(func).bindings:
        if x not in variables(value):
            continue
        if is_op(value, "call_tir"):
            arguments = list(value.args[1].fields)
            if kernel_op(mod[value.args[0]]) != "dense" or x in arguments[1:]:
                return False
        elif is_op(value, "call_pure_packed") and value.args[0].global_symbol == CALL:
            piece = mod[value.args[1].value]
            read = [p for p, arg in zip(piece.params, value.args[2:], strict=True) if arg == x]
            if not all(_read_by_items(mod, piece, param) for param in read):
                return False
        elif isinstance(value, relax.Var) or is_op(value, "reshape"):
            if not _read_by_items(mod, func, var):
                return False
        else:
            return False
    return True
