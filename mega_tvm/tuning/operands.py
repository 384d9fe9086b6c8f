"""Inputs for a kernel, and what must come out: the naive kernel evaluated by NumPy in float64.

The naive PrimFunc itself would run for seconds at some sizes, and round like float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import ml_dtypes  # noqa: F401 (tells NumPy of bfloat16)
import numpy as np
import numpy.typing as npt
from tvm import tirx

from reference import numpy_mega
from schedules.common.attention import AttentionSpec
from schedules.common.dims import known
from schedules.common.storage import FLOAT32, storage_of
from schedules.dense.naive import DenseSpec
from schedules.dense.pairs import scaled_columns
from schedules.ema_scan.naive import EmaScanSpec
from schedules.ema_scan_dense.naive import EmaScanDenseSpec
from schedules.gated_attention.naive import GatedAttentionSpec
from schedules.laplace_attention.naive import LaplaceAttentionSpec
from schedules.layer_norm.naive import LayerNormSpec
from schedules.normed_dense.naive import NormedDenseSpec
from schedules.registry import kernel_op

Array = npt.NDArray[Any]
# What a softmax amplifies: a score is rounded to u |score|, and the tolerance has room up to 8.
_SCORES = 8.0


@dataclasses.dataclass(frozen=True)
class Operands:
    """Inputs of one call, in the PrimFunc's order, and the output in float64.

    ``condition`` is that of `mega_tvm.tolerances.compare`; ``dtypes`` are the types of the tensors,
    the output's last. Inputs are float32, and numbers of their tensor's type.
    """

    inputs: tuple[Array, ...]
    expected: Array
    condition: float = 1.0
    dtypes: tuple[str, ...] = ()


class _Random:
    """Random numbers of a type, as float32."""

    def __init__(self, seed: int, dtype: str) -> None:
        self._rng = np.random.default_rng(seed)
        self._dtype = np.dtype(dtype)

    def normal(self, *shape: int, divisor: float = 1.0) -> Array:
        """Return normal numbers of variance ``1 / divisor^2``."""
        values = self._rng.standard_normal(shape, dtype=np.float32) / np.float32(divisor)
        return values.astype(self._dtype).astype(np.float32)


def make_operands(func: tirx.PrimFunc, seed: int = 0) -> Operands:
    """Return random operands of a naive Mega kernel."""
    dtypes = storage_of(func) or (FLOAT32,) * len(func.params)
    half = next((dtype for dtype in dtypes if dtype != FLOAT32), FLOAT32)
    return dataclasses.replace(_operands(func, _Random(seed, half)), dtypes=dtypes)


def _operands(func: tirx.PrimFunc, rng: _Random) -> Operands:
    op = kernel_op(func)
    if op == DenseSpec.op:
        return _dense(rng, DenseSpec.of(func))
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


def _dense(rng: _Random, spec: DenseSpec, normed: Callable[[Array], Array] = np.array) -> Operands:
    x, b = rng.normal(*known(spec.lead), spec.k), rng.normal(spec.n)
    w = rng.normal(spec.k, spec.n, divisor=math.sqrt(spec.k))
    y = normed(x.astype(np.float64)) @ w + b
    if spec.paired:
        w, b = scaled_columns(w, b)
    if spec.swiglu:
        gate, up = np.split(y, 2, axis=-1)
        y = gate * numpy_mega.sigmoid(gate) * up
    elif spec.sigmoid_from >= 0:
        y[..., spec.sigmoid_from :] = numpy_mega.sigmoid(y[..., spec.sigmoid_from :])
    if not spec.residual:
        return Operands((x, w, b), y)
    residual = rng.normal(*known(spec.lead), spec.out_n)
    return Operands((x, w, b, residual), y + residual)


def _normed_dense(rng: _Random, spec: NormedDenseSpec) -> Operands:
    form = "axon-0.8.0" if spec.clamp_variance else "plain"

    def normed(x: Array) -> Array:
        return numpy_mega.layer_norm(x, np.ones(spec.k), np.zeros(spec.k), form)

    found = _dense(rng, spec, normed)
    return dataclasses.replace(found, condition=_condition(found.inputs[0], spec.eps))


def _ema_scan_dense(rng: _Random, spec: EmaScanDenseSpec) -> Operands:
    scan = _ema_scan(rng, EmaScanSpec(spec.batch, spec.seq_len, spec.channels))
    w = rng.normal(spec.channels, spec.n, divisor=math.sqrt(spec.channels))
    b = rng.normal(spec.n)
    y = scan.expected @ w + b
    if not spec.residual:
        return Operands((*scan.inputs, w, b), y)
    residual = rng.normal(*y.shape)
    return Operands((*scan.inputs, w, b, residual), y + residual)


def _layer_norm(rng: _Random, spec: LayerNormSpec) -> Operands:
    x = rng.normal(*known(spec.lead), spec.n)
    gamma, beta = rng.normal(spec.n), rng.normal(spec.n)
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


def _ema_scan(rng: _Random, spec: EmaScanSpec) -> Operands:
    B, N = known((spec.batch, spec.seq_len))
    p = rng.normal(B, N, spec.channels)
    decay = numpy_mega.sigmoid(rng.normal(spec.channels)).astype(np.float32)
    h = np.empty(p.shape)
    state = np.zeros((B, spec.channels))
    for t in range(N):
        state = decay.astype(np.float64) * state + p[:, t]
        h[:, t] = state
    return Operands((p, decay), h)


def _attention(rng: _Random, spec: AttentionSpec) -> Operands:
    B, Q, K = known((spec.batch, spec.q_len, spec.k_len))
    laplace = isinstance(spec, LaplaceAttentionSpec)
    # Softmax: scores of variance 1.
    divisor = 1.0 if laplace else math.sqrt(spec.width) * spec.scale
    q = rng.normal(B, Q, spec.q_stride, divisor=divisor)
    k = rng.normal(B, K, spec.k_stride)
    v = rng.normal(B, K, spec.v_stride)
    gate = rng.normal(B, Q, max(1, spec.gate_stride))
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
