"""What a laplace_attention kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from tvm import te, tirx

from ..common.attention import AttentionSpec, naive_attention


@dataclasses.dataclass(frozen=True)
class LaplaceAttentionSpec(AttentionSpec):
    """Sizes of an L1-Laplace attention, which is neither causal nor scaled."""

    op: ClassVar[str] = "laplace_attention"


def laplace_attention(spec: LaplaceAttentionSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(q, k, v[, gate], out)``.

    ``w_ij = 1 / (1 + sum_d |q_id - k_jd|)`` over all positions;
    ``out = gate * (w @ v) / (sum(w) + 1e-8)``.
    """

    def weights(q: te.Tensor, k: te.Tensor) -> te.Tensor:
        shape = (q.shape[0], q.shape[1], k.shape[1])
        d = te.reduce_axis((0, spec.width), "d")
        distance = te.compute(
            shape,
            lambda b, i, j: te.sum(
                tirx.abs(q[b, i, d + spec.q_offset] - k[b, j, d + spec.k_offset]), axis=d
            ),
            "distance",
        )
        one = tirx.const(1, "float32")
        return te.compute(shape, lambda b, i, j: one / (one + distance[b, i, j]), "w")

    return naive_attention(spec, weights)
