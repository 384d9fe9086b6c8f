"""Merge the projections that feed one attention into one dense layer.

Dense layers on the same rows become one with their weights side by side: ``[x Wa | x Wb] =
x [Wa | Wb]``. The attention reads its operands as column ranges of the result, without a copy. A
gate behind a sigmoid joins as the last columns, with the sigmoid in the epilogue.
"""

from __future__ import annotations

import numpy as np
from tvm import relax

from .. import relax_ops
from ..relax_ops import OPERANDS, is_op, shape_of
from .fold_scale import is_plain_dense
from .rewrite import Rule, Site, constant64, graph_pass, to_constant


def _rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        call = site.call
        if not is_op(call, "mega.attention"):
            return None
        if any(int(call.attrs[f"{name}_offset"]) != 0 for name in OPERANDS):
            return None
        operands = ((index, _dense(site, index)) for index in range(len(call.args)))
        sources = {index: dense for index, dense in operands if dense is not None}
        if not sources:
            return None
        x = next(iter(sources.values())).args[0]
        merged = {index: dense for index, dense in sources.items() if dense.args[0] == x}
        if len(merged) < 2:
            return None
        offsets, columns = [0] * len(OPERANDS), 0
        for index, dense in merged.items():
            offsets[index] = columns
            columns += shape_of(dense.args[1])[1]
        gated = OPERANDS.index("gate") in merged
        weights = np.concatenate([constant64(dense.args[1]) for dense in merged.values()], axis=1)
        biases = np.concatenate([constant64(dense.args[2]) for dense in merged.values()])
        y = site.emit(
            relax_ops.dense(
                x,
                to_constant(weights),
                to_constant(biases),
                sigmoid_from=offsets[-1] if gated else -1,
            )
        )
        return relax_ops.attention(
            [y if index in merged else arg for index, arg in enumerate(call.args)],
            laplace=bool(call.attrs["laplace"]),
            scale=float(call.attrs["scale"]),
            width=int(call.attrs["width"]),
            value_width=int(call.attrs["value_width"]),
            offsets=offsets,
        )

    return rule


def _dense(site: Site, index: int) -> relax.Expr | None:
    """Return the plain dense layer behind an operand; behind its sigmoid, for the gate."""
    source = site.producer(index)
    if source is None or not site.is_only_use(index):
        return None
    if OPERANDS[index] == "gate":
        if not is_op(source, "sigmoid"):
            return None
        source = site.graph.producer(source.args[0])
    return source if source is not None and is_plain_dense(source) else None


merge_projections = graph_pass("merge_projections", _rule)
