"""How far a result may lie from its float64 reference: one table for `verify` and every test.

Two bounds must both hold. ``max_abs`` limits the worst element: it catches a wrong row or column.
``relative_rms``, the norm of the error over the norm of the expected values, limits all elements
together: it catches a small error everywhere (a coarse exponential, a lost digit), which the first
bound would let pass.

Both stand for well-conditioned values of magnitude up to `MAGNITUDE`. Beyond it ``max_abs`` grows
in proportion to the largest expected value, since rounding is relative; it never shrinks, and
outputs of usual size get no extra room. A test whose inputs amplify rounding (a layer norm of rows
with a large mean) says so by a ``condition`` that it computes from those inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

# Up to this magnitude ``max_abs`` holds as it stands: a model's outputs, being layer-normalized,
# reach 2 to 4.
MAGNITUDE = 4.0


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """Bounds on the difference to a float64 reference.

    Parameters
    ----------
    max_abs : float
        On the largest absolute difference.
    relative_rms : float
        On the norm of the difference over the norm of the reference.
    """

    max_abs: float
    relative_rms: float


TOLERANCES: Mapping[str, Tolerance] = {
    "float32": Tolerance(
        # The contract's number, for outputs of magnitude 2 to 4. Measured, worst of the golden
        # models: Edifice 4.9e-7, NumPy in float32 9.8e-7.
        max_abs=1e-5,
        # A chain of K rounded additions errs by 0.4 sqrt(K) u relative to its result, u = 6.0e-8:
        # 6e-7 for the longest, K = 688 (measured: 5.7e-7). Six such in series, independent, 1.5e-6.
        # Measured, worst of the golden models: Edifice 1.3e-7, NumPy in float32 3.0e-7.
        relative_rms=2e-6,
    ),
    # Weights, and what kernels hand on, rounded to float16; all arithmetic in float32.
    "float16": Tolerance(
        # Five times the other bound, for outputs that a layer norm brings to an RMS of 1. Measured,
        # worst of the golden models: 4.0e-3.
        max_abs=1e-2,
        # A rounding errs by 2e-4 of its value (RMS; u = 4.9e-4). Of a layer 7 tensors are rounded,
        # and 7 matrices of weights: 56 independent errors in 4 layers make 1.5e-3, were all of them
        # to reach the output undiminished. Measured, worst of the golden models: 1.2e-3.
        relative_rms=2e-3,
    ),
    # The same in bfloat16, of 8 bits: u = 2^-8 = 3.9e-3, 8 times float16's.
    "bfloat16": Tolerance(
        # Five times the other bound, as for float16. Measured, worst of the golden models: 2.7e-2.
        max_abs=6e-2,
        # A rounding errs by 1.66e-3 of its value (RMS): 0.42 u, for values whose logarithms are
        # spread evenly. The 56 of 4 layers make 1.24e-2, were all of them to reach the output
        # undiminished. Measured, worst of the golden models: 6.6e-3.
        relative_rms=1.25e-2,
    ),
    "float64": Tolerance(
        # Between two float64 references. The float32 numbers times 2^-29, the ratio of the unit
        # roundoffs, are 1.9e-14 and 3.7e-15; rounded up to powers of ten.
        max_abs=1e-13,
        relative_rms=1e-14,
    ),
}


@dataclasses.dataclass(frozen=True)
class Parity:
    """What a comparison found.

    Parameters
    ----------
    max_abs, relative_rms : float
        The differences; infinite where values are not finite.
    finite : bool
        Whether all values, actual and expected, are finite.
    ok : bool
        Whether all are finite and both differences lie within ``bounds``.
    bounds : Tolerance
        What was allowed, scaled as the module describes.
    shape : tuple of int
    worst : tuple of int
        Index of the first value that is not finite, or else of the largest difference.
    actual, expected : float
        The two values there.
    """

    max_abs: float
    relative_rms: float
    finite: bool
    ok: bool
    bounds: Tolerance
    shape: tuple[int, ...]
    worst: tuple[int, ...]
    actual: float
    expected: float

    def __str__(self) -> str:
        what = "largest difference" if self.finite else "not finite, first"
        return (
            f"{'within' if self.ok else 'outside'} tolerance, shape {list(self.shape)}: "
            f"max abs {self.max_abs:.3g} (allowed {self.bounds.max_abs:.3g}), "
            f"relative RMS {self.relative_rms:.3g} (allowed {self.bounds.relative_rms:.3g}); "
            f"{what} at {list(self.worst)}: actual {self.actual!r}, expected {self.expected!r}"
        )


def compare(
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    dtype: str = "float32",
    *,
    condition: float = 1.0,
) -> Parity:
    """Compare a result with its reference.

    Parameters
    ----------
    actual, expected : array_like
        The result, and the reference in float64, of one shape.
    dtype : str
        The type that ``actual`` was computed in: a key of `TOLERANCES`.
    condition : float, default 1
        How much the computation amplifies a relative error of its inputs; both bounds are
        multiplied by it.

    Raises
    ------
    KeyError
        If no tolerance is known for ``dtype``.
    ValueError
        If the shapes differ, there is nothing to compare, or ``condition`` is below 1.
    """
    a, e = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != e.shape or a.size == 0:
        raise ValueError(
            f"expected two arrays of one shape with at least one element; got {list(a.shape)} "
            f"and {list(e.shape)}"
        )
    if not condition >= 1:
        raise ValueError(f"expected a condition of at least 1; got {condition}")
    table = TOLERANCES[dtype]
    not_finite = ~(np.isfinite(a) & np.isfinite(e))
    if not_finite.any():
        return _parity(a, e, int(np.argmax(not_finite)), np.inf, np.inf, table, finite=False)
    difference = np.abs(a - e)
    largest = float(np.abs(e).max())
    bounds = Tolerance(
        table.max_abs * condition * max(1.0, largest / MAGNITUDE), table.relative_rms * condition
    )
    # Scaled first: squares of large values would overflow, of small ones vanish.
    scale = largest or 1.0
    error, norm = np.linalg.norm(difference / scale), np.linalg.norm(e / scale)
    relative = float(error / norm) if norm else (np.inf if error else 0.0)
    worst = int(np.argmax(difference))
    return _parity(a, e, worst, float(difference.max()), relative, bounds, finite=True)


def _parity(
    a: npt.NDArray[Any],
    e: npt.NDArray[Any],
    flat: int,
    max_abs: float,
    relative_rms: float,
    bounds: Tolerance,
    *,
    finite: bool,
) -> Parity:
    worst = tuple(int(i) for i in np.unravel_index(flat, a.shape))
    ok = finite and max_abs <= bounds.max_abs and relative_rms <= bounds.relative_rms
    value, reference = float(a.flat[flat]), float(e.flat[flat])
    return Parity(max_abs, relative_rms, finite, ok, bounds, a.shape, worst, value, reference)


def assert_parity(
    actual: npt.ArrayLike,
    expected: npt.ArrayLike,
    dtype: str = "float32",
    *,
    name: str = "result",
    condition: float = 1.0,
) -> Parity:
    """Raise AssertionError, naming the worst element, unless `compare` finds the arrays equal.

    Returns
    -------
    Parity
        What `compare` found.
    """
    parity = compare(actual, expected, dtype, condition=condition)
    if not parity.ok:
        raise AssertionError(f"{name}: {parity}")
    return parity
