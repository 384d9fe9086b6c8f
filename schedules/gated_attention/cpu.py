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
    def weigh(s, peak, total, rescale, r, i, first, limit, vectors, n_rows):
        part = T.alloc_buffer((n_rows, L), "float32", scope="local")
        highest = T.alloc_buffer((n_rows,), "float32", scope="local")
        for t in T.unroll(n_rows):
            for lane in T.vectorized(L):
                part[t, lane] = T.min_value("float32")
        for j in T.serial(vectors):
            for t in T.unroll(n_rows):
                for lane in T.vectorized(L):
                    part[t, lane] = T.max(
                        part[t, lane],
                        T.Select(
                            sees(first + j * L, lane, limit + t),
                            s[i + t, j * L + lane],
                            T.min_value("float32"),
                        ),
                    )
        for t in T.unroll(n_rows):
            fold_max(part, t, L)
            highest[t] = T.max(peak[r + t], part[t, 0])
            rescale[i + t] = weight(peak[r + t], highest[t])
            peak[r + t] = highest[t]
            for lane in T.vectorized(L):
                part[t, lane] = T.float32(0)
        for j in T.serial(vectors):
            for t in T.unroll(n_rows):
                for lane in T.vectorized(L):
                    s[i + t, j * L + lane] = T.Select(
                        sees(first + j * L, lane, limit + t),
                        weight(s[i + t, j * L + lane], highest[t]),
                        T.float32(0),
                    )
                for lane in T.vectorized(L):
                    part[t, lane] = part[t, lane] + s[i + t, j * L + lane]
        for t in T.unroll(n_rows):
            fold_sum(part, t, L)
            total[r + t] = total[r + t] * rescale[i + t] + part[t, 0]

    return Scoring(
        accumulate=lambda acc, q, k: acc + q * k,
        weight=weight,
        start=start,
        weigh=weigh,
        rescales=True,
        causal=True,
    )
