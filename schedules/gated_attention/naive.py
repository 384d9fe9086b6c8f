"""What a gated_attention kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import te, tirx

from ..common.attention import AttentionSpec, naive_attention


@dataclasses.dataclass(frozen=True)
class GatedAttentionSpec(AttentionSpec):
    """Sizes of a causal softmax attention."""

    op: ClassVar[str] = "gated_attention"


def gated_attention(spec: GatedAttentionSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(q, k, v[, gate], out)``.

    ``s = scale * q k^T``, ``w = exp(s - max)`` on the positions up to the query's own, 0 elsewhere;
    ``out = gate * (w @ v) / (sum(w) + 1e-8)``.
    """

    def weights(q: te.Tensor, k: te.Tensor) -> te.Tensor:
        B, Q, K = q.shape[0], q.shape[1], k.shape[1]
        d = te.reduce_axis((0, spec.width), "d")
        scores = te.compute(
            (B, Q, K),
            lambda b, i, j: te.sum(q[b, i, d + spec.q_offset] * k[b, j, d + spec.k_offset], axis=d),
            "scores",
        )

        def visible(i: tirx.Var, j: tirx.Var) -> tirx.PrimExpr:
            return j <= i + (K - Q)

        scaled = te.compute(
            (B, Q, K),
            lambda b, i, j: tirx.if_then_else(
                visible(i, j),
                scores[b, i, j] * tirx.const(spec.scale, "float32"),
                tirx.min_value("float32"),
            ),
            "scaled",
        )
        m = te.reduce_axis((0, K), "m")
        largest = te.compute((B, Q), lambda b, i: te.max(scaled[b, i, m], axis=m), "largest")
        return te.compute(
            (B, Q, K),
            lambda b, i, j: tirx.if_then_else(
                visible(i, j), tirx.exp(scaled[b, i, j] - largest[b, i]), tirx.const(0, "float32")
            ),
            "w",
        )

    return naive_attention(spec, weights)
