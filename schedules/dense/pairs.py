"""Products in pairs: two of three multiplications of a dense layer become one and two additions.

Winograd (A New Algorithm for Inner Product, IEEE Transactions on Computers, 1968) multiplies two
pairs at once::

    (x0 + w1) (x1 + w0) = x0 w0 + x1 w1 + x0 x1 + w0 w1

The last two terms belong to a row and to a column alone. Multiplications are halved, additions
doubled, which gains where a core's additions run in other units than its FMAs: Zen 4 starts a
vector of each in a cycle. Of every three elements of k one pair is multiplied so and one element
plainly: four FMAs and four additions a 6 elements, so that both units are busy all the time, and 6
multiply-adds take 4 cycles. Nothing else is done twice: the rows' terms cost K / 3 products a row
(`prepare`), the columns' are computed with the weights.

``k`` is cut into ``G = k // 3`` groups; the g-th is the pair ``g, G + g`` and the single element
``2 G + g``; up to two elements are left, and multiplied plainly. Groups alternate in their sign,

    -(w1 - x0) (w0 - x1) = x0 w0 + x1 w1 - x0 x1 - w0 w1

so that the terms of rows and columns cancel where neighbours are alike (activations with a mean).

**Rounding.** x and w are added, so that they must be of one size: columns of w are scaled to an RMS
between 0.7 and 1.4 (`scaled_columns`), and so are rows of x (`preparing`), by powers of two, which
round nothing. With norms that are equal the products of an inner product add up to at most ``|x|^2
+ |w|^2 = 2 |x| |w|`` (Euclidean norms), in half as many roundings: the bound of the error is the
plain one's by norms, ``k u |x| |w|``. Measured on normal random data, 60 rows: relative RMS 1.06 to
1.1 times a plain kernel's. But it is no bound by elements: where one element outweighs all others
of its row, and its weights are zero, a plain product is exact where this one is not. So a layer
that reads the model's input, in units of the user's, is never multiplied in pairs.

**Code.** The elements of x are operands in memory (`memory_operands.apart`): a broadcast into a
register would take a slot of the units that are full. And FMAs are masked by a mask of ones that
LLVM does not know, since it comes with the bias: a masked FMA is written in place, where LLVM would
write over a factor, and move each accumulator to another register (12 x 2 accumulators: 110 GFLOP/s
with spills; 10 x 2 with masks: 172, at an FMA peak of 118).

AVX2 has neither, and half the registers. On a Zen 3, whose additions have units of their own too,
what LLVM makes of tiles of 3 to 5 rows by 2 vectors takes 1.1 to 1.3 times as long as plain
products; a loop in C, four weight vectors held in registers, takes 0.89 times as long.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm.script import tirx as T

from ..common.dims import ceil_div
from ..common.memory_operands import apart
from ..common.reduce import clear, fold_sum

Array = npt.NDArray[Any]
LANES = 16  # AVX-512: AVX2 has neither operands that are broadcast nor masks
GROUP = 3  # elements of k: a pair and a single one
LEAST_K = GROUP * LANES  # a vector of groups
CHAINS = 4  # of additions that do not wait for each other, in the sums over a row
FACTORS, SCALE, TERMS = 2, 0, 1  # behind a prepared row
TILE_VECTORS = 2  # of a register tile; more would need more offsets
_MANTISSA_BITS, _EXPONENT_BIAS = 23, 127


def scaled_columns(w: Array, b: Array) -> tuple[Array, Array]:
    """Return weights and bias as paired products take them.

    Parameters
    ----------
    w : array [k, n]
        float32.
    b : array [n]

    Returns
    -------
    w : array [k, n]
        Columns times powers of two, their RMS between 0.7 and 1.4; columns of zeros stay.
    b : array [3, n]
        The bias; what undoes the scale; the columns' terms, to be added.
    """
    rms = np.sqrt(np.square(w.astype(np.float64)).mean(axis=0))
    exponent = np.round(np.log2(rms, out=np.zeros_like(rms), where=rms > 0))
    scaled = w * np.exp2(-exponent).astype(np.float32)
    pairs = len(w) // GROUP
    products = scaled[:pairs].astype(np.float64) * scaled[pairs : 2 * pairs]
    terms = products[1::2].sum(axis=0) - products[::2].sum(axis=0)
    return scaled, np.stack([b, np.exp2(exponent), terms]).astype(np.float32)


def preparing(k: int, lanes: int) -> Callable[..., None]:
    """Return the inline ``(x, rows, m, r)``: row ``m`` of x to row ``r``, scaled.

    Behind it stand what undoes the scale (`SCALE`) and the row's terms, to be added (`TERMS`).
    """
    pairs = k // GROUP
    # Where no vector divides, the last one overlaps with that before: a short one would keep the
    # sums in memory.

    @T.inline
    def add(x, total, at, chain, m, first, second, sign, seen):
        # total[at] += x[first..] x[second..], but of the first `seen`; signs alternate from `sign`
        for lane in T.vectorized(lanes):
            term = T.meta_var(x[m, first + lane] * x[m, second + lane])
            signed = T.meta_var(
                T.Select(lane % 2 == sign, -term, term) if sign is not None else term
            )
            total[at, chain * lanes + lane] = total[at, chain * lanes + lane] + T.Select(
                lane >= seen, signed, T.float32(0)
            )

    @T.inline
    def sum_up(x, total, at, m, size, other, signs):
        # total[at] = the sum of x[i] x[other + i], i < size
        vectors = T.meta_var(size // lanes)
        rounds = T.meta_var(vectors // CHAINS)
        for c in T.serial(rounds):
            for u in T.unroll(CHAINS):
                first = T.meta_var((c * CHAINS + u) * lanes)
                add(x, total, at, u, m, first, other + first, 0 if signs else None, 0)
        for u in T.unroll(vectors % CHAINS):
            first = T.meta_var((rounds * CHAINS + u) * lanes)
            add(x, total, at, u, m, first, other + first, 0 if signs else None, 0)
        if size % lanes > 0:
            last = T.meta_var(size - lanes)
            sign = T.meta_var(size % 2 if signs else None)
            add(x, total, at, CHAINS - 1, m, last, other + last, sign, lanes - size % lanes)
        fold_sum(total, at, CHAINS * lanes)

    @T.inline
    def prepare(x, rows, m, r):
        total = T.alloc_buffer((2, CHAINS * lanes), "float32", scope="local")  # squares, and terms
        scale = T.alloc_buffer((1,), "float32", scope="local")
        clear(total, 2, CHAINS, lanes)
        sum_up(x, total, 0, m, k, 0, False)
        sum_up(x, total, 1, m, pairs, pairs, True)
        # The mean square is 2^e times less than 2: half of e, rounded up, is the root's exponent.
        mean = T.meta_var(T.reinterpret("int32", total[0, 0] * T.float32(1 / k)))
        root = T.meta_var(((mean >> _MANTISSA_BITS) - _EXPONENT_BIAS + 1) >> 1)
        scale[0] = T.reinterpret("float32", (_EXPONENT_BIAS - root) << _MANTISSA_BITS)
        rows[r, k + SCALE] = T.reinterpret("float32", (_EXPONENT_BIAS + root) << _MANTISSA_BITS)
        rows[r, k + TERMS] = total[1, 0] * scale[0] * scale[0]
        for c in T.serial(ceil_div(k, lanes)):
            at = T.meta_var(T.min(c * lanes, k - lanes))
            for lane in T.vectorized(lanes):
                rows[r, at + lane] = x[m, at + lane] * scale[0]

    return prepare


def multiplying(k: int, lanes: int) -> Callable[..., None]:
    """Return the inline ``(acc, rows, w, zeros, r, base, width, fetch, height, vectors)``.

    It adds the products of ``height`` rows from ``r`` and of ``vectors`` vectors of a panel of
    ``width`` columns, whose first element stands at ``base``, to ``acc``. ``zeros`` is a vector of
    zeros that LLVM does not know; ``fetch(step)`` is called once for two groups.
    """
    pairs = k // GROUP

    @T.inline
    def plain(acc, rows, w, offsets, r, base, width, at, height, vectors):
        for i in T.unroll(height):
            for j in T.unroll(vectors):
                for lane in T.vectorized(lanes):
                    acc[i, j * lanes + lane] = (
                        acc[i, j * lanes + lane]
                        + rows[r + i, at + offsets[j]] * w[base + at * width + j * lanes + lane]
                    )

    @T.inline
    def group(acc, rows, w, zeros, offsets, r, base, width, g, positive, height, vectors):
        plain(acc, rows, w, offsets, r, base, width, 2 * pairs + g, height, vectors)
        for i in T.unroll(height):
            for j in T.unroll(vectors):
                for lane in T.vectorized(lanes):
                    col = T.meta_var(base + j * lanes + lane)
                    x0 = T.meta_var(rows[r + i, g + offsets[j]])
                    x1 = T.meta_var(rows[r + i, pairs + g + offsets[j]])
                    w0 = T.meta_var(w[col + g * width])
                    w1 = T.meta_var(w[col + (pairs + g) * width])
                    a = T.meta_var(w1 + x0 if positive else T.float32(-1) * (w1 - x0))
                    b = T.meta_var(w0 + x1 if positive else w0 - x1)
                    acc[i, j * lanes + lane] = T.Select(
                        zeros[lane] == T.float32(0),
                        T.fma(a, b, acc[i, j * lanes + lane]),
                        acc[i, j * lanes + lane],
                    )

    @T.inline
    def multiply(acc, rows, w, zeros, r, base, width, fetch, height, vectors):
        offsets = T.meta_var(apart(vectors))
        for step in T.serial(pairs // 2):
            fetch(step)
            group(acc, rows, w, zeros, offsets, r, base, width, 2 * step, True, height, vectors)
            group(
                acc, rows, w, zeros, offsets, r, base, width, 2 * step + 1, False, height, vectors
            )
        if pairs % 2 > 0:
            group(acc, rows, w, zeros, offsets, r, base, width, pairs - 1, True, height, vectors)
        for at in T.unroll(k - GROUP * pairs):
            plain(acc, rows, w, offsets, r, base, width, GROUP * pairs + at, height, vectors)

    return multiply
