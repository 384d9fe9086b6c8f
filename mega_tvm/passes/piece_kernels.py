"""Give piece functions kernels of their own.

A kernel in pieces runs on one thread, another of the same specification on all that a call has:
each takes the schedule that is better there, and so each must be a function by itself.
"""

from __future__ import annotations

import tvm
from tvm import relax

from ..kernel_list import kernels_by_caller
from ..relax_ops import is_op
from .rewrite import Graph, Site
from .split_rows import is_piece

SUFFIX = "_in_pieces"


def _transform(mod: tvm.IRModule, _ctx: object) -> tvm.IRModule:
    in_entries, in_pieces = kernels_by_caller(mod)
    shared = in_entries & in_pieces
    if not shared:
        return mod
    mod = mod.clone()
    own = {}
    for name in sorted(shared):
        # A builder's: a variable that has its function's type.
        own[name] = relax.BlockBuilder().add_func(mod[name], name + SUFFIX)
        mod[own[name]] = mod[name]

    def rule(site: Site) -> relax.Expr | None:
        call = site.call
        if not is_op(call, "call_tir") or call.args[0].name_hint not in own:
            return None
        kernel = own[call.args[0].name_hint]
        return relax.Call(call.op, [kernel, *call.args[1:]], call.attrs, call.ty_args)

    for gvar, func in mod.functions_items():
        if is_piece(func):
            mod.update_func(gvar, Graph(func).rebuild(gvar.name_hint, rule))
    return mod


own_piece_kernels = tvm.transform.module_pass(_transform, opt_level=0, name="own_piece_kernels")
