"""Tells Mega's operators by what they compute, however they are written.

A part of a graph is run in float64 on random input, and its result compared with the formula.
Constants that a tool has folded are float32, which is why `TOLERANCE` is not smaller.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np

from reference import numpy_mega

from .onnx_evaluate import Array

TOLERANCE = 2e-6
# The decay is the root of a response late enough to average its rounding out, and early enough to
# be far from zero.
_RESPONSE_LEFT = 0.1


@dataclasses.dataclass(frozen=True)
class EmaForm:
    """``h_t = decay * h_{t-1} + gain * p_t`` per channel.

    Parameters
    ----------
    decay, gain : array, [D], float64
    """

    decay: Array
    gain: Array


@dataclasses.dataclass(frozen=True)
class AttentionForm:
    """Which of a part's entries are ``q``, ``k`` and ``v``, and the weights' form.

    Parameters
    ----------
    roles : tuple of int
        Positions of q, k and v among the entries.
    laplace : bool
    scale : float
        Of the scores; 1 for Laplace.
    """

    roles: tuple[int, int, int]
    laplace: bool
    scale: float


def identify_ema(run: Callable[[Array], Array], shape: tuple[int, int, int]) -> EmaForm | None:
    """Return the moving average that ``run`` computes of ``p [B, T, D]``, if it is one."""
    batch, length, channels = shape
    if length < 3:  # decay and gain would not show
        return None
    impulse = np.zeros(shape)
    impulse[0, 0] = 1.0
    response = run(impulse)
    if response.shape != shape or not np.isfinite(response).all():
        return None
    gain = response[0, 0]
    if not (gain > 0).all():
        return None
    ratio = response[0] / gain  # [T, D]: decay^t
    decay = np.empty(channels)
    for d in range(channels):
        late = np.flatnonzero(ratio[1:, d] >= _RESPONSE_LEFT)
        t = int(late[-1]) + 1 if late.size else 1
        if not 0 <= ratio[t, d] < 1:
            return None
        decay[d] = ratio[t, d] ** (1 / t)
    p = np.random.default_rng(0).standard_normal(shape)
    expected = np.empty(shape)
    state = np.zeros((batch, channels))
    for i in range(length):
        state = decay * state + gain * p[:, i]
        expected[:, i] = state
    return EmaForm(decay, gain) if _close(run(p), expected) else None


def identify_attention(
    run: Callable[[Sequence[Array]], Array], shapes: Sequence[tuple[int, ...]]
) -> AttentionForm | None:
    """Return the attention that ``run`` computes of its entries, if it is one without a gate.

    Parameters
    ----------
    run : callable
        Takes one array an entry.
    shapes : sequence of tuple
        The entries': two or three of ``[B, T, width]``.
    """
    rng = np.random.default_rng(1)
    entries = [rng.standard_normal(shape) for shape in shapes]
    actual = run(entries)
    for roles in itertools.product(range(len(entries)), repeat=3):
        q, k, v = (entries[role] for role in roles)
        if set(roles) != set(range(len(entries))) or q.shape != k.shape:
            continue
        if actual.shape != v.shape:
            continue
        root = 1 / math.sqrt(q.shape[-1])
        for laplace, scale in ((False, root), (False, 1.0), (True, 1.0)):
            # The reference divides by sqrt(H); another scale is put into q.
            scaled = q if laplace else q * (scale / root)
            if _close(actual, numpy_mega.attention_weights(scaled, k, laplace) @ v):
                return AttentionForm((roles[0], roles[1], roles[2]), laplace, scale)
    return None


def same_function(run: Callable[..., Array], formula: Callable[..., Array], *inputs: Array) -> bool:
    """Whether two functions agree on given inputs."""
    return _close(run(*inputs), formula(*inputs))


def _close(actual: Array, expected: Array) -> bool:
    if actual.shape != expected.shape or not np.isfinite(actual).all():
        return False
    return bool(np.abs(actual - expected).max() <= TOLERANCE * np.abs(expected).max())
