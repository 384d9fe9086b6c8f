"""Round the folded float64 weights to float32, once, after all folding."""

from __future__ import annotations

import numpy as np
from tvm import relax
from tvm.ir.expr import GenericConst

from .rewrite import Rule, Site, constant64, graph_pass, to_constant


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        if not str(getattr(site.call.op, "name", "")).startswith("relax.mega."):
            return None
        args = [
            to_constant(constant64(arg).astype(np.float32))
            if isinstance(arg, GenericConst) and str(arg.ty.dtype) == "float64"
            else arg
            for arg in site.call.args
        ]
        return relax.Call(site.call.op, args, site.call.attrs)

    return rule


narrow_weights = graph_pass("narrow_weights", _rule)
