"""Inputs for a kernel, and what must come out: the naive kernel evaluated by NumPy in float64.

The naive PrimFunc itself would run for seconds at some sizes, and round like float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from tvm import tirx

from reference import numpy_mega
from schedules.common.attention import AttentionSpec
from schedules.common.dims import known
from schedules.dense.naive import DenseSpec
from schedules.ema_scan.naive import EmaScanSpec
from schedules.ema_scan_dense.naive import EmaScanDenseSpec
from schedules.gated_attention.naive import GatedAttentionSpec
from schedules.laplace_attention.naive import LaplaceAttentionSpec
from schedules.layer_norm.naive import LayerNormSpec
from schedules.normed_dense.naive import NormedDenseSpec
from schedules.registry import kernel_op
from schedules.strassen_dense.naive import StrassenDenseSpec

Array = npt.NDArray[Any]
# What a softmax amplifies: a score is rounded to u |score|, and the tolerance has room up to 8.
_SCORES = 8.0


@dataclasses.dataclass(frozen=True)
class Operands:
    """Inputs of one call, in the PrimFunc's order, and the output in float64.

    ``condition`` is that of `mega_tvm.tolerances.compare`.
    """

    inputs: tuple[Array, ...]
    expected: Array
    condition: float = 1.0


def make_operands(func: tirx.PrimFunc, seed: int = 0) -> Operands:
    """Return random operands of a naive Mega kernel."""
    rng = np.random.default_rng(seed)
    op = kernel_op(func)
    if op == DenseSpec.op:
        return _dense(rng, DenseSpec.of(func))
    if op == StrassenDenseSpec.op:
        return _dense(rng, StrassenDenseSpec.of(func))
    if op == NormedDenseSpec.op:
        return _normed_dense(rng, NormedDenseSpec.of(func))
    if op == EmaScanDenseSpec.op:
        return _ema_scan_dense(rng, EmaScanDenseSpec.of(func))
    if op == LayerNormSpec.op:
        return _layer_norm(rng, LayerNormSpec.of(func))
    if op == EmaScanSpec.op:
        return _ema_scan(rng, EmaScanSpec.of(func))
    if op == GatedAttentionSpec.op:
        return _attention(rng, GatedAttentionSpec.of(func))
    if op == LaplaceAttentionSpec.op:
        return _attention(rng, LaplaceAttentionSpec.of(func))
    raise KeyError(f"no operands are known for kernel {op!r}")


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def _dense(
    rng: np.random.Generator, spec: DenseSpec, normed: Callable[[Array], Array] = np.array
) -> Operands:
    x, b = _normal(rng, *known(spec.lead), spec.k), _normal(rng, spec.n)
    w = _normal(rng, spec.k, spec.n) / np.float32(math.sqrt(spec.k))
    y = normed(x.astype(np.float64)) @ w + b
    if spec.swiglu:
        gate, up = np.split(y, 2, axis=-1)
        y = gate * numpy_mega.sigmoid(gate) * up
    elif spec.sigmoid_from >= 0:
        y[..., spec.sigmoid_from :] = numpy_mega.sigmoid(y[..., spec.sigmoid_from :])
    if not spec.residual:
        return Operands((x, w, b), y)
    residual = _normal(rng, *known(spec.lead), spec.out_n)
    return Operands((x, w, b, residual), y + residual)


def _normed_dense(rng: np.random.Generator, spec: NormedDenseSpec) -> Operands:
    form = "axon-0.8.0" if spec.clamp_variance else "plain"

    def normed(x: Array) -> Array:
        return numpy_mega.layer_norm(x, np.ones(spec.k), np.zeros(spec.k), form)

    found = _dense(rng, spec, normed)
    return dataclasses.replace(found, condition=_condition(found.inputs[0], spec.eps))


def _ema_scan_dense(rng: np.random.Generator, spec: EmaScanDenseSpec) -> Operands:
    scan = _ema_scan(rng, EmaScanSpec(spec.batch, spec.seq_len, spec.channels))
    w, b = _normal(rng, spec.channels, spec.n), _normal(rng, spec.n)
    w /= np.float32(math.sqrt(spec.channels))
    y = scan.expected @ w + b
    if not spec.residual:
        return Operands((*scan.inputs, w, b), y)
    residual = _normal(rng, *y.shape)
    return Operands((*scan.inputs, w, b, residual), y + residual)


def _layer_norm(rng: np.random.Generator, spec: LayerNormSpec) -> Operands:
    x = _normal(rng, *known(spec.lead), spec.n)
    gamma, beta = _normal(rng, spec.n), _normal(rng, spec.n)
    form = "axon-0.8.0" if spec.clamp_variance else "plain"
    g, b = (gamma, beta) if spec.affine else (np.ones(spec.n), np.zeros(spec.n))
    y = numpy_mega.layer_norm(x.astype(np.float64), g, b, form)
    inputs = (x, gamma, beta) if spec.affine else (x,)
    return Operands(inputs, y, _condition(x, spec.eps))


def _condition(x: Array, eps: float) -> float:
    """Return how much a layer norm may amplify rounding.

    The mean is rounded to u |mean|; that error is divided by the deviation. Of few columns the
    deviation may be small.
    """
    x = x.astype(np.float64)
    deviation = np.sqrt(x.var(axis=-1) + eps)
    return max(1.0, float((np.abs(x.mean(axis=-1)) / deviation).max()))


def _ema_scan(rng: np.random.Generator, spec: EmaScanSpec) -> Operands:
    B, N = known((spec.batch, spec.seq_len))
    p = _normal(rng, B, N, spec.channels)
    decay = numpy_mega.sigmoid(rng.standard_normal(spec.channels)).astype(np.float32)
    h = np.empty(p.shape)
    state = np.zeros((B, spec.channels))
    for t in range(N):
        state = decay.astype(np.float64) * state + p[:, t]
        h[:, t] = state
    return Operands((p, decay), h)


def _attention(rng: np.random.Generator, spec: AttentionSpec) -> Operands:
    B, Q, K = known((spec.batch, spec.q_len, spec.k_len))
    laplace = isinstance(spec, LaplaceAttentionSpec)
    q, k = _normal(rng, B, Q, spec.q_stride), _normal(rng, B, K, spec.k_stride)
    v = _normal(rng, B, K, spec.v_stride)
    gate = _normal(rng, B, Q, max(1, spec.gate_stride))
    if not laplace:  # scores of variance 1
        q /= np.float32(math.sqrt(spec.width) * spec.scale)
    every = np.zeros((B, K, spec.width))
    every[:, K - Q :] = q[..., spec.q_offset : spec.q_offset + spec.width]
    keys = k[..., spec.k_offset : spec.k_offset + spec.width].astype(np.float64)
    values = v[..., spec.v_offset : spec.v_offset + spec.value_width]
    # The oracle scales by 1 / sqrt(width).
    scaled = every if laplace else every * (spec.scale * math.sqrt(spec.width))
    out = numpy_mega.attention_weights(scaled, keys, laplace)[:, K - Q :] @ values
    condition = 1.0
    if not laplace:
        largest = float(np.abs(every[:, K - Q :] @ keys.swapaxes(1, 2)).max()) * spec.scale
        condition = max(1.0, largest / _SCORES)
    if not spec.has_gate:
        return Operands((q, k, v), out, condition)
    out = gate[..., spec.gate_offset : spec.gate_offset + spec.value_width] * out
    return Operands((q, k, v, gate), out, condition)
