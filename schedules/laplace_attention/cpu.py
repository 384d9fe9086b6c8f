"""How a laplace_attention kernel runs on x86: blocked in one pass, or one row at a time.

A weight is at most 1, so a running sum needs no running maximum. A distance has one of two forms
(``l1_form``):

``DIFFERENCE``
    accumulates |q - k| itself, the hand schedule. A score is half the distance:
    ``acc + 0.5 |q - k|`` is one FMA, and exact, since 0.5 is a power of two. A plain
    ``acc + |q - k|`` would queue behind the subtraction where additions have ports of their own
    (Zen 4, T = 1024: 13.5 ms in place of 14.8); elsewhere both cost the same. Subtraction, mask and
    FMA then keep both halves of the units busy, 3 instructions in 1.5 cycles, and a broadcast of
    the query's component would take half a cycle more: with AVX-512 the subtraction reads it from
    memory itself (T = 1024: 12.6 ms in place of 13.5; T = 60: 45.3 us in place of 49.2).
``MAXIMUM``
    ``|q - k| = 2 max(q, k) - q - k`` needs a maximum and an FMA, one cycle (T = 1024: 10.2 ms,
    T = 60: 39.0 us). It cancels where vectors are nearer to each other than to 0. With
    ``m = sum_d |q_d| + |k_d|`` and unit roundoff u, its sums of n terms err by at most 3 n u m to
    first order, those of differences by n u times the distance. So a score is kept where
    ``m <= 4 (1 + distance)``, which keeps 1 + distance to 12 n u; independent normal vectors of one
    variance have m = 1.4 distances. The others, NaN and infinity among them, are made again from
    differences: of vectors near each other a search, which measures on normal ones, would
    recommend what costs 1.4 times as much. That is why it is not the hand schedule.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.attention_blocked import blocked_attention
from ..common.attention_row import row_attention
from ..common.attention_scoring import Scoring, Shortcut, sees
from ..common.attention_tiles import read_blocking, sample_blocking
from ..common.cpu_features import vector_unit
from ..common.kernel import ScheduledKernel
from ..common.reduce import clear, fold_sum
from .naive import LaplaceAttentionSpec

DIFFERENCE, MAXIMUM = 0, 1
# One component of half a distance. An operand in memory must be the second one: the query's.
L1_FORMS: Sequence[Callable[[tirx.PrimExpr, tirx.PrimExpr, tirx.PrimExpr], tirx.PrimExpr]] = (
    lambda acc, q, k: acc + T.abs(k - q) * T.float32(0.5),
    lambda acc, q, k: acc + T.max(k, q) * T.float32(0.5),
)
# A score of maxima is kept where the vectors' magnitudes are at most so many times 1 + distance.
MOST_CANCELLED = 4


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: the blocking, see `sample_blocking`, and ``l1_form``.

    A single row has none.
    """
    spec = LaplaceAttentionSpec.of(sch.mod["main"])
    if spec.q_len != 1:
        unit = vector_unit(target)
        # |q - k| needs a register for the difference and one for the sign mask: with AVX2's 16,
        # tiles of 6 spill an accumulator at each step (T = 1024: 16.0 ms, tiles of 5: 15.0).
        # Wider spans save nothing, for nothing is rescaled, and cost a register that is not there.
        tile_q = 6 if unit.registers == 32 else 5
        sample_blocking(sch, unit, spec, tile_q=tile_q, span_panels=1)
        decisions.sample(sch, "l1_form", [DIFFERENCE, MAXIMUM], DIFFERENCE)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec = LaplaceAttentionSpec.of(func)
    unit = vector_unit(target)
    if spec.q_len == 1:
        return ScheduledKernel(row_attention(spec, unit.lanes, laplace(unit.lanes)))
    chosen = decisions.read(func)
    blocking = read_blocking(chosen, unit.lanes)
    scoring = dataclasses.replace(
        laplace(blocking.lanes),
        embeds=unit.registers == 32,
        shortcut=_maximum() if chosen["l1_form"] == MAXIMUM else None,
    )
    return ScheduledKernel(blocked_attention(spec, blocking, scoring))


def laplace(L: int) -> Scoring:
    """Return L1-Laplace scoring for vectors of ``L`` lanes."""

    def weight(score: tirx.PrimExpr, _peak: tirx.PrimExpr | None) -> tirx.PrimExpr:
        return T.float32(1) / (T.float32(1) + T.float32(2) * score)

    @T.inline
    def start(peak, total, r):
        total[r] = T.float32(0)

    @T.inline
    def weigh(s, peak, total, rescale, r, i, first, limit, vectors, n_rows):
        part = T.alloc_buffer((n_rows, L), "float32", scope="local")
        clear(part, n_rows, 1, L)
        for j in T.serial(vectors):
            for t in T.unroll(n_rows):
                for lane in T.vectorized(L):
                    s[i + t, j * L + lane] = T.Select(
                        sees(first + j * L, lane, limit),
                        weight(s[i + t, j * L + lane], None),
                        T.float32(0),
                    )
                for lane in T.vectorized(L):
                    part[t, lane] = part[t, lane] + s[i + t, j * L + lane]
        for t in T.unroll(n_rows):
            fold_sum(part, t, L)
            total[r + t] = total[r + t] + part[t, 0]

    return Scoring(
        accumulate=L1_FORMS[DIFFERENCE],
        weight=weight,
        start=start,
        weigh=weigh,
        rescales=False,
        causal=False,
    )


def _maximum() -> Shortcut:
    """Return half the distance as ``sum_d max(q_d, k_d) - sum_d (q_d + k_d) / 2``."""
    return Shortcut(
        accumulate=L1_FORMS[MAXIMUM],
        score=lambda acc, half: T.float32(2) * acc - half,
        holds=lambda score, magnitude: (
            magnitude <= T.float32(2 * MOST_CANCELLED) * score + T.float32(MOST_CANCELLED)
        ),
    )
