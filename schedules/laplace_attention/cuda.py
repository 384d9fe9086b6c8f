"""How a laplace_attention kernel runs on a GPU: in tiles (`cuda_attention`), or one row.

A weight is at most 1, so a running sum needs no running maximum. A score's element costs two
instructions, subtract and add (absolute values are free operands), where a product's costs one
FFMA.

Estimate for T = 60, H = 256, B = 1, all pairs visible: 32 blocks, one tile of keys each, 256 steps
of 18 and 64 of 10 cycles of issue, and 48 barriers: 7 us. At T = 4096: 4.3 G elements of distances
at two instructions and as many FFMA of values, 1.3 ms at an A100's 9.7 T instructions/s, if nothing
waits.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script import tirx as T
from tvm.target import Target

from ..common import decisions
from ..common.cuda_attention import sample_tiles, tiled_attention
from ..common.cuda_attention_row import row_attention
from ..common.cuda_scoring import Scoring
from ..common.kernel import ScheduledKernel
from .naive import LaplaceAttentionSpec


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions: ``block_q`` and ``columns`` of a block. A single row has none."""
    spec = LaplaceAttentionSpec.of(sch.mod["main"])
    if spec.q_len != 1:
        sample_tiles(sch, spec, instructions=2)


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select."""
    spec = LaplaceAttentionSpec.of(func)
    if spec.q_len == 1:
        return ScheduledKernel(row_attention(spec, LAPLACE))
    return ScheduledKernel(tiled_attention(spec, decisions.read(func), LAPLACE))


LAPLACE = Scoring(
    accumulate=lambda score, q, k: score + T.abs(q - k),
    weight=lambda score, peak: T.float32(1) / (T.float32(1) + score),
    softmax=False,
    causal=False,
)
