"""How a strassen_dense kernel runs on x86: one level of Strassen's method, in Winograd's form.

With x and w cut in halves both ways, x11 and x12 being the halves of its even rows::

    S1 = x21 + x22    T1 = w12 - w11    P1 = x11 w11    P5 = S1 T1    y11 = P1 + P2
    S2 = S1 - x11     T2 = w22 - T1     P2 = x12 w21    P6 = S2 T2    U2  = P1 + P6
    S3 = x11 - x21    T3 = w22 - w12    P3 = S4 w22     P7 = S3 T3    U3  = U2 + P7
    S4 = x12 - S2     T4 = w21 - T2     P4 = x22 T4                   y21 = U3 + P4
                                                                      y22 = U3 + P5
                                                                      y12 = U2 + P5 + P3

1. The right factors are packed at compile time (`StrassenLayout`): 1.75 times the bytes of w. The
   sums of x are formed first, in a workspace: of all rows, or where there are many blocks, of a
   block by the thread that has it.
2. The grid is (block of pairs, panel), as in the dense kernel, or blocks alone where they are many.
   A block walks over its register tiles, ``tile_pairs`` pairs by one panel, three times: P1 P2,
   then P6 P7 P4, then P5 P3. Products that are added run on in the same registers; P1, U2 and U3
   alone are stored and fetched again, once a tile, on the stack. In three passes, since a panel's
   weights and the next one's do not fit in L2 together (k = 688, 64 columns: 616 KB each; of one
   pass 264 KB at most).
3. Meanwhile the next pass's weights are prefetched into L2.
4. Bias, residual, sigmoid or SwiGLU are applied to each quarter of the output on the way out.
   SwiGLU leaves its gate in y, where the up column meets it in a later pass.

A last row without a partner gets a row of zeros, whose output is not stored, and an odd k a column
of zeros, which no product reads; columns are padded to an even number of vectors. Neighbours are
pairs, so that a block's rows lie together, and so that a pair is of one sequence where its length
is even.

Rounding. For one level, n x n matrices and max abs as the norm, Winograd's form is off by at most
``(18 ((n/2)^2 + 6 n/2) - 6 n) u |x| |w|``, about 4.5 times the n^2 u |x| |w| of the plain product
(Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., ch. 23). The bound is by the
largest elements of whole matrices: of two neighbours of very different size the smaller one loses
digits, and a NaN reaches its neighbour. Measured on normal random data at the default model's
sizes, 60 to 1920 rows: relative RMS 1.2 to 1.3 times the dense kernel's, the largest error 1.1 to
1.6 times; the default model's output, twice as far from float64 as without (relative RMS 8.8e-7).
Sums of weights are formed in float64 and rounded once.

It does not pay for a few rows, nor for narrow matrices: see `pays`.
"""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.target import Target

from ..common import decisions
from ..common.cpu_features import VectorUnit, vector_unit
from ..common.dims import ceil_div, known_rows
from ..common.kernel import ScheduledKernel
from .kernel import Blocking, strassen_kernel
from .naive import StrassenDenseSpec
from .packing import StrassenLayout

LEAST_ROWS = 24
LEAST_SIZE = 128
LEAST_SIZES = 384
# Pairs of rows that share one pass over the weights, as many rows as in the dense kernel.
BLOCK_PAIRS = 60


def pays(spec: StrassenDenseSpec) -> bool:
    """Whether the kernel is faster than the dense kernel, by what was measured.

    On Zen 4, one thread, weights not in L2, time of the dense kernel over this one's:

    | rows (k = 256, n = 768; k = 688, n = 256) | 8 | 12 | 16 | 24 | 36 |
    |---|---|---|---|---|---|
    | | 0.66, 0.63 | 0.94, 0.74 | 0.89, 1.02 | 1.04, 1.08 | 1.03, 1.07 |

    | 60 rows, k x n | 64 x 256 | 256 x 64 | 128 x 128 | 128 x 256 | 256 x 128 |
    |---|---|---|---|---|---|
    | | 0.96 | 0.92 | 0.98 | 1.00 | 1.03 |

    Rows that only a call brings may be few: their kernels stay dense.
    """
    if any(isinstance(dim, str) for dim in spec.lead):
        return False
    large = min(spec.k, spec.n) >= LEAST_SIZE and spec.k + spec.n >= LEAST_SIZES
    return large and known_rows(spec.lead) >= LEAST_ROWS


def schedule(sch: Schedule, target: Target) -> None:
    """Sample the decisions of a strassen_dense kernel.

    ``tile_pairs`` rows of either half by ``panel_vectors`` vectors of either half is the register
    tile. ``block_pairs`` is the number of pairs that share a pass over the weights. ``prefetch``
    says whether the next weights are fetched ahead.
    """
    spec = StrassenDenseSpec.of(sch.mod["main"])
    tile_pairs, panel_vectors = default_tile(spec, vector_unit(target))
    pairs = ceil_div(known_rows(spec.lead), 2)
    block_pairs = _block_pairs(pairs, tile_pairs)
    tiles = {m for m in (1, 2, 3, 4, 5, 6, 8, 10, 12) if m <= tile_pairs}
    # The least of those that hold all pairs stands for all of them.
    blocks = [6, 12, 15, 24, 30, 60, 120]
    blocks = [m for m, before in zip(blocks, [0, *blocks], strict=False) if before < pairs]
    decisions.sample(sch, "tile_pairs", sorted(tiles | {tile_pairs}), tile_pairs)
    decisions.sample(sch, "panel_vectors", [panel_vectors], panel_vectors)
    decisions.sample(sch, "block_pairs", sorted({*blocks, block_pairs}), block_pairs)
    decisions.sample(sch, "prefetch", [0, 1], 1)


def default_tile(spec: StrassenDenseSpec, unit: VectorUnit) -> tuple[int, int]:
    """Return the register tile (pairs of rows, vectors of a panel), as in the dense kernel.

    AVX-512 holds 6x4 accumulators, AVX2 6x2; few columns get taller tiles. It is no higher than
    tiles of one height, so many as the pairs of a half of the rows need.
    """
    accumulators = 24 if unit.registers == 32 else 12
    widest = min(StrassenLayout(spec, unit.lanes, 1).vectors, accumulators // 6)
    highest = min(accumulators // widest, 12)
    half = ceil_div(ceil_div(known_rows(spec.lead), 2), 2)
    return ceil_div(half, ceil_div(half, highest)), widest


def _block_pairs(pairs: int, tile_pairs: int) -> int:
    """Return ``block_pairs``: rows in two equal blocks where they would be in one.

    Two threads then have rows of their own, and what one wrote is in its own L2 when it is read
    (T = 60, two threads: k = 688 103 us in place of 141, the whole model 1761 in place of 2133; one
    thread: no difference).
    """
    if pairs > 2 * BLOCK_PAIRS:
        return BLOCK_PAIRS
    tiles = ceil_div(pairs, tile_pairs)
    return ceil_div(tiles, 2) * tile_pairs


def generate(func: tirx.PrimFunc, target: Target) -> ScheduledKernel:
    """Write out the TensorIR that the decisions noted on ``func`` select.

    Returns
    -------
    ScheduledKernel
        Arguments 1 (weights) and 2 (bias) are packed.
    """
    spec = StrassenDenseSpec.of(func)
    chosen = decisions.read(func)
    layout = StrassenLayout(spec, vector_unit(target).lanes, chosen["panel_vectors"])
    blocking = Blocking(chosen["tile_pairs"], chosen["block_pairs"], bool(chosen["prefetch"]))
    kernel = strassen_kernel(layout, blocking)
    return ScheduledKernel(kernel, {1: layout.pack_weight, 2: layout.pack_bias})
