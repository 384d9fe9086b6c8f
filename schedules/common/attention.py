"""The sizes of an attention kernel, and its unscheduled form.

``gated_attention`` (softmax) and ``laplace_attention`` differ in how a score becomes a weight; all
else is shared: ``out = gate * (w @ v) / (sum(w) + 1e-8)``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tvm import te, tirx

from .dims import Dim, DimVars
from .spec import KernelSpec

ATTENTION_EPS = 1e-8


@dataclasses.dataclass(frozen=True)
class AttentionSpec(KernelSpec):
    """Sizes of an attention kernel.

    Parameters
    ----------
    batch, q_len, k_len : int or str
        Query rows are the last ``q_len`` of ``k_len`` positions.
    width, value_width : int
        Columns of queries and keys, and of values, gate and output.
    q_stride, k_stride, v_stride, gate_stride : int
        Columns of the tensors that hold the operands; ``gate_stride`` 0 means no gate.
    q_offset, k_offset, v_offset, gate_offset : int
        First column of each operand in its tensor.
    scale : float
        Factor of the scores; 1 where it was folded into weights. Softmax only.
    """

    batch: Dim
    q_len: Dim
    k_len: Dim
    width: int
    value_width: int
    q_stride: int
    k_stride: int
    v_stride: int
    gate_stride: int = 0
    q_offset: int = 0
    k_offset: int = 0
    v_offset: int = 0
    gate_offset: int = 0
    scale: float = 1.0

    @property
    def has_gate(self) -> bool:
        """Whether a gate multiplies the output."""
        return self.gate_stride > 0

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        gate = "" if self.has_gate else "_ungated"
        sizes = f"{self.batch}x{self.q_len}x{self.k_len}x{self.width}"
        return f"{self.op}_{sizes}{gate}"


def naive_attention(
    spec: AttentionSpec,
    weights: Callable[[te.Tensor, te.Tensor], te.Tensor],
) -> tirx.PrimFunc:
    """Return the PrimFunc ``(q, k, v[, gate], out)``.

    Parameters
    ----------
    spec : AttentionSpec
    weights : callable
        Takes the tensors that hold queries and keys, returns the unnormalized ``[B, q_len, k_len]``
        weights.
    """
    B, Q, K = DimVars().shape((spec.batch, spec.q_len, spec.k_len))
    q = te.placeholder((B, Q, spec.q_stride), "float32", "q")
    k = te.placeholder((B, K, spec.k_stride), "float32", "k")
    v = te.placeholder((B, K, spec.v_stride), "float32", "v")
    gate = te.placeholder((B, Q, max(1, spec.gate_stride)), "float32", "gate")
    w = weights(q, k)
    j = te.reduce_axis((0, K), "j")
    total = te.compute((B, Q), lambda b, i: te.sum(w[b, i, j], axis=j), "total")
    key = te.reduce_axis((0, K), "key")
    mixed = te.compute(
        (B, Q, spec.value_width),
        lambda b, i, d: te.sum(w[b, i, key] * v[b, key, d + spec.v_offset], axis=key),
        "mixed",
    )

    def output(b: tirx.Var, i: tirx.Var, d: tirx.Var) -> tirx.PrimExpr:
        y = mixed[b, i, d] / (total[b, i] + tirx.const(ATTENTION_EPS, "float32"))
        return gate[b, i, d + spec.gate_offset] * y if spec.has_gate else y

    out = te.compute((B, Q, spec.value_width), output, "out")
    args = [q, k, v, gate, out] if spec.has_gate else [q, k, v, out]
    return spec.attach(te.create_prim_func(args))
