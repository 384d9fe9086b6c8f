"""How a gated_attention kernel runs on a GPU: in tiles (`cuda_attention`), or one row.

Estimate for T = 60, H = 256, B = 1: 1.9 MFLOP of visible pairs, 246 KB in and 61 KB out: 0.16 us
at an A100's bandwidth. Blocks of 8 queries by 64 columns are 32, each with one tile of keys: 256
steps of 10 and 64 of 10 cycles of issue, and 48 barriers: 6 us. That is latency, not throughput:
half of it goes where scores are split over more threads, which a measurement may tell to be worth
it. At
T = 4096: 8.6 GFLOP, 128 blocks of 32 queries by 256 columns, 1.2 ms at half of 19.5 TFLOP/s.

For half types (`cuda_attention_mma`), estimated on an A100 at 1.41 GHz: T = 60, B = 1, 16 blocks of
16 queries by 64 columns, 12 steps: 1.7 us, all latency; B = 32, 128 blocks by 256 columns: 1.8 us;
T = 4096, 128 blocks of 32 queries by 256 columns: 0.14 ms of waiting at steps, beside 0.12 ms of
traffic from L2 and 0.09 ms of products, all pairs counted; causal blocks skip half of them.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cuda_attention import sample_tiles, tiled_attention
from ..common.cuda_attention_mma import mma_attention, sample_mma_tiles
from ..common.cuda_attention_row import row_attention
from ..common.cuda_scoring import Scoring
from ..common.cuda_threads import exp
from ..common.kernel import ScheduledKernel
from ..common.storage import half_type
from .naive import GatedAttentionSpec


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``block_q`` and ``columns`` of a block. A single row has none."""
    spec = GatedAttentionSpec.of(sch.mod["main"])
    if spec.q_len == 1:
        return
    if half_type(sch.mod["main"]):
        sample_mma_tiles(sch, spec)
    else:
        sample_tiles(sch, spec, instructions=1)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec = GatedAttentionSpec.of(func)
    if spec.q_len == 1:
        return ScheduledKernel(row_attention(spec, softmax(spec.scale)))
    if half := half_type(func):
        return ScheduledKernel(mma_attention(spec, decisions.read(func), half))
    return ScheduledKernel(tiled_attention(spec, decisions.read(func), softmax(spec.scale)))


def softmax(scale: float) -> Scoring:
    """Return causal softmax scoring."""
    return Scoring(
        accumulate=lambda score, q, k: score + q * k,
        weight=lambda score, peak: exp((score - peak) * T.float32(scale)),
        softmax=True,
        causal=True,
    )
