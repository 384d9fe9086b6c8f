"""Elementwise functions that stay in vector registers.

``T.exp`` in a vectorized loop becomes one library call a lane; these are polynomials in plain
arithmetic, which LLVM keeps in ymm or zmm registers.
"""

from __future__ import annotations

from tvm import tirx
from tvm.script import tirx as T

# exp(x) = 2^n * exp(r), n = round(x / ln 2), r = x - n ln 2 in two parts (Cody and Waite, "Software
# Manual for the Elementary Functions", 1980), |r| <= 0.347. The polynomial is the minimax fit of
# Cephes' expf (S. Moshier): relative error 5e-8 over the whole range.
_LOG2_E = 1.44269504088896341
_LN2_HIGH = 0.693359375
_LN2_LOW = -2.12194440e-4
_EXP_POLYNOMIAL = (
    1.9875691500e-4,
    1.3981999507e-3,
    8.3334519073e-3,
    4.1665795894e-2,
    1.6666665459e-1,
    5.0000001201e-1,
)
# Beyond these the result's exponent would leave the normal range; exp saturates in place of
# overflowing to inf or going denormal.
_EXP_MIN = -87.0
_EXP_MAX = 88.0


def exp(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return exp(x) for float32; saturates outside [-87, 88], NaN gives NaN.

    Relative error: 5e-8.
    """
    # The constant stands first: on a NaN, max and min return their second operand.
    x = T.min(T.float32(_EXP_MAX), T.max(T.float32(_EXP_MIN), x))
    n = T.floor(x * T.float32(_LOG2_E) + T.float32(0.5))
    r = x - n * T.float32(_LN2_HIGH) - n * T.float32(_LN2_LOW)
    p = T.float32(_EXP_POLYNOMIAL[0])
    for coefficient in _EXP_POLYNOMIAL[1:]:
        p = p * r + T.float32(coefficient)
    p = p * r * r + r + T.float32(1)
    power_of_two = T.reinterpret("float32", (T.Cast("int32", n) + 127) << 23)
    return p * power_of_two


def sigmoid(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return 1 / (1 + exp(-x)) for float32."""
    return T.float32(1) / (T.float32(1) + exp(T.float32(0) - x))


def silu(x: tirx.PrimExpr) -> tirx.PrimExpr:
    """Return x * sigmoid(x) for float32."""
    return x * sigmoid(x)
