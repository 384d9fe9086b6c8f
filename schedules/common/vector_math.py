"""Elementwise functions that stay in vector registers.

``T.exp`` in a vectorized loop becomes one library call a lane; these are polynomials in plain
arithmetic, which LLVM keeps in ymm or zmm registers.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

# exp(x) = 2^n 2^f, n = round(x log2 e), |f| <= 1/2. log2 e is one float, so that f is exact for an
# argument off by 1.3e-8 of itself, a fifth of what rounding did to it: Cody and Waite's second
# constant would cost an FMA and tell nothing. The polynomial is the fit of 2^f with the least
# largest relative error (2e-9), 1 at f = 0.
_LOG2_E = 1.44269504088896341
_EXP2_POLYNOMIAL = (
    1.5353361959569156e-4,
    1.3398875016719103e-3,
    9.61843691766262e-3,
    5.5503323674201965e-2,
    2.4022647738456726e-1,
    6.931471824645996e-1,
    1.0,
)
# Added to a float below 2^22, it leaves the nearest integer plus 127 in the lowest bits: those of
# the exponent of 2^n, once they are shifted there.
_ROUND = 1.5 * 2**23 + 127
# Beyond these the result's exponent would leave the normal range; exp saturates in place of
# overflowing to inf or going denormal.
_EXP_MIN = -87.0
_EXP_MAX = 88.0


def _exp_factors(x: tirx.PrimExpr, scale: float) -> tuple[tirx.PrimExpr, tirx.PrimExpr]:
    """Return ``(2^f, 2^n)``, whose product is ``exp(scale * x)``."""
    # The constant stands first: on a NaN, max and min return their second operand.
    least, most = sorted((_EXP_MIN / scale, _EXP_MAX / scale))
    x = T.min(T.float32(most), T.max(T.float32(least), x))
    factor = T.float32(scale * _LOG2_E)
    rounded = x * factor + T.float32(_ROUND)
    bits = T.reinterpret("int32", rounded)
    # By way of the bits, or TVM's simplifier would cancel _ROUND.
    f = x * factor - (T.reinterpret("float32", bits) - T.float32(_ROUND))
    p = T.float32(_EXP2_POLYNOMIAL[0])
    for coefficient in _EXP2_POLYNOMIAL[1:]:
        p = p * f + T.float32(coefficient)
    return p, T.reinterpret("float32", bits << 23)


def exp(x: tirx.PrimExpr, scale: float = 1.0) -> tirx.PrimExpr:
    """Return exp(scale * x) for float32; saturates where that is outside [-87, 88], NaN gives NaN.

    Relative error: 1e-7 + 1.4e-8 abs(scale * x).
    """
    fraction, power = _exp_factors(x, scale)
    return fraction * power


def _one_plus_exp(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return 1 + exp(-x)."""
    fraction, power = _exp_factors(x, -1.0)
    return fraction * power + T.float32(1)  # one FMA


def sigmoid(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return 1 / (1 + exp(-x)) for float32."""
    return T.float32(1) / _one_plus_exp(x)


def silu(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return x * sigmoid(x) for float32, -inf for -inf."""
    return x / _one_plus_exp(x)
