"""How a gated_attention kernel runs on x86: blocked with an online softmax, or one row at a time.

Online softmax (Milakov and Gimelshein, arXiv 1805.02867): a row keeps its running maximum and sum;
when a panel raises the maximum, sum and output shrink by ``exp(old - new)``. Exponentials are
vectorized polynomials.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.attention_blocked import blocked_attention
from ..common.attention_row import row_attention
from ..common.attention_scoring import Scoring, sees
from ..common.attention_tiles import read_blocking, sample_blocking
from ..common.cpu_features import vector_unit
from ..common.kernel import ScheduledKernel
from ..common.reduce import fold_max, fold_sum
from ..common.vector_math import exp
from .naive import GatedAttentionSpec


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: the blocking, see `sample_blocking`. A single row has none."""
    spec = GatedAttentionSpec.of(sch.mod["main"])
    if spec.q_len != 1:
        sample_blocking(sch, vector_unit(target), spec)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec = GatedAttentionSpec.of(func)
    lanes = vector_unit(target).lanes
    if spec.q_len == 1:
        return ScheduledKernel(row_attention(spec, lanes, softmax(spec.scale, lanes)))
    blocking = read_blocking(decisions.read(func), lanes)
    return ScheduledKernel(blocked_attention(spec, blocking, softmax(spec.scale, blocking.lanes)))


def softmax(scale: float, L: int) -> Scoring:
    """Return softmax scoring for vectors of ``L`` lanes, of scores times ``scale``."""

    def weight(score: tirx.PrimExpr, peak: tirx.PrimExpr) -> tirx.PrimExpr:
        return exp(score - peak, scale)

    @T.inline
    def start(peak, total, r):
        peak[r] = T.min_value("float32")
        total[r] = T.float32(0)

    @T.inline
    def weigh(s, peak, total, rescale, r, i, first, limit, vectors):
        part = T.alloc_buffer((1, L), "float32", scope="local")
        highest = T.alloc_buffer((1,), "float32", scope="local")
        for lane in T.vectorized(L):
            part[0, lane] = T.min_value("float32")
        for j in T.serial(vectors):
            for lane in T.vectorized(L):
                part[0, lane] = T.max(
                    part[0, lane],
                    T.Select(
                        sees(first + j * L, lane, limit), s[i, j * L + lane], T.min_value("float32")
                    ),
                )
        fold_max(part, 0, L)
        highest[0] = T.max(peak[r], part[0, 0])
        rescale[i] = weight(peak[r], highest[0])
        peak[r] = highest[0]
        for lane in T.vectorized(L):
            part[0, lane] = T.float32(0)
        for j in T.serial(vectors):
            for lane in T.vectorized(L):
                s[i, j * L + lane] = T.Select(
                    sees(first + j * L, lane, limit),
                    weight(s[i, j * L + lane], highest[0]),
                    T.float32(0),
                )
            for lane in T.vectorized(L):
                part[0, lane] = part[0, lane] + s[i, j * L + lane]
        fold_sum(part, 0, L)
        total[r] = total[r] * rescale[i] + part[0, 0]

    return Scoring(
        accumulate=lambda acc, q, k: acc + q * k,
        weight=weight,
        start=start,
        weigh=weigh,
        rescales=True,
        causal=True,
    )
