"""The kernels that the tests of this folder run, with inputs and float64 references."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable

import numpy as np
import pytest
from tvm import tirx

from reference import numpy_mega as reference
from schedules.common.attention import AttentionSpec
from schedules.dense.naive import DenseSpec, dense
from schedules.dense.pairs import scaled_columns
from schedules.ema_scan.naive import EmaScanSpec, ema_scan
from schedules.gated_attention.naive import GatedAttentionSpec, gated_attention
from schedules.laplace_attention.naive import LaplaceAttentionSpec, laplace_attention
from schedules.layer_norm.naive import LayerNormSpec, layer_norm

Array = np.ndarray


@dataclasses.dataclass(frozen=True)
class Case:
    """A naive kernel with the inputs of one run and what must come out."""

    func: tirx.PrimFunc
    inputs: tuple[Array, ...]
    expected: Array
    condition: float = 1.0


def sized(names: str, rows: Iterable[tuple]) -> pytest.MarkDecorator:
    """Parametrize a test by rows of arguments, with ids such as ``B2-T59-H40``.

    An argument that is no number stands in the id by itself, a flag by its name or not at all.
    """

    def part(name: str, value: object) -> str:
        if isinstance(value, bool):
            return name if value else ""
        return f"{name}{value}" if isinstance(value, int) else str(value)

    arguments = tuple(names.split())
    return pytest.mark.parametrize(
        arguments,
        [pytest.param(*row, id="-".join(filter(None, map(part, arguments, row)))) for row in rows],
    )


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, dtype=np.float32)


def dense_case(
    rng: np.random.Generator,
    spec: DenseSpec,
    x: Array | None = None,
    w: Array | None = None,
    b: Array | None = None,
) -> Case:
    x = _normal(rng, *spec.lead, spec.k) if x is None else x
    b = _normal(rng, spec.n) if b is None else b
    w = _normal(rng, spec.k, spec.n) / np.float32(math.sqrt(spec.k)) if w is None else w
    y = x.astype(np.float64) @ w + b
    if spec.paired:
        w, b = scaled_columns(w, b)
    if spec.swiglu:
        gate, up = np.split(y, 2, axis=-1)
        y = gate * reference.sigmoid(gate) * up
    elif spec.sigmoid_from >= 0:
        y[..., spec.sigmoid_from :] = reference.sigmoid(y[..., spec.sigmoid_from :])
    if not spec.residual:
        return Case(dense(spec), (x, w, b), y)
    residual = _normal(rng, *spec.lead, spec.out_n)
    return Case(dense(spec), (x, w, b, residual), y + residual)


def layer_norm_case(spec: LayerNormSpec, x: Array, rng: np.random.Generator) -> Case:
    gamma, beta = _normal(rng, spec.n), _normal(rng, spec.n)
    x64 = x.astype(np.float64)
    form = "axon-0.8.0" if spec.clamp_variance else "plain"
    g, b = (gamma, beta) if spec.affine else (np.ones(spec.n), np.zeros(spec.n))
    # The mean is rounded to u |mean|; that error is divided by the deviation.
    deviation = np.sqrt(x64.var(axis=-1) + spec.eps)
    condition = max(1.0, float((np.abs(x64.mean(axis=-1)) / deviation).max()))
    inputs = (x, gamma, beta) if spec.affine else (x,)
    return Case(layer_norm(spec), inputs, reference.layer_norm(x64, g, b, form), condition)


def ema_case(rng: np.random.Generator, spec: EmaScanSpec) -> Case:
    p, alpha = _normal(rng, spec.batch, spec.seq_len, spec.channels), _normal(rng, spec.channels)
    decay = reference.sigmoid(alpha.astype(np.float64)).astype(np.float32)
    expected = np.empty(p.shape)
    state = np.zeros((spec.batch, spec.channels))
    for t in range(spec.seq_len):
        state = decay.astype(np.float64) * state + p[:, t]
        expected[:, t] = state
    return Case(ema_scan(spec), (p, decay), expected)


def attention_spec(
    laplace: bool,
    B: int,
    Q: int,
    K: int,
    W: int,
    V: int | None = None,
    *,
    gate: bool = True,
    merged: bool = False,
) -> AttentionSpec:
    """Return a specification; ``merged`` puts queries, values and gate side by side.

    Columns that no operand needs lie between them, so that an offset off by one is noticed.
    """
    V = W if V is None else V
    sizes = {"batch": B, "q_len": Q, "k_len": K, "width": W, "value_width": V}
    if merged:
        row = 1 + W + 2 + V + 3 + V + 1
        layout = {"q_offset": 1, "v_offset": W + 3, "gate_offset": W + V + 6 if gate else 0}
        layout |= {"q_stride": row, "v_stride": row, "gate_stride": row if gate else 0}
        layout |= {"k_stride": W + 3, "k_offset": 2}
    else:
        layout = {"q_stride": W, "k_stride": W, "v_stride": V, "gate_stride": V if gate else 0}
    if laplace:
        return LaplaceAttentionSpec(**sizes, **layout)
    return GatedAttentionSpec(**sizes, **layout, scale=1 / math.sqrt(W))


def attention_case(
    rng: np.random.Generator,
    spec: AttentionSpec,
    q: Array | None = None,
    k: Array | None = None,
) -> Case:
    """Return a case with random operands; ``q`` and ``k``, where given, replace them."""
    B, Q, K, W, V = spec.batch, spec.q_len, spec.k_len, spec.width, spec.value_width
    laplace = isinstance(spec, LaplaceAttentionSpec)
    q = _normal(rng, B, Q, W) if q is None else q
    k = _normal(rng, B, K, W) if k is None else k
    v, gate = _normal(rng, B, K, V), _normal(rng, B, Q, V)
    every = np.zeros((B, K, W))
    every[:, K - Q :] = q
    weights = reference.attention_weights(every, k.astype(np.float64), laplace)[:, K - Q :]
    expected = weights @ v
    if spec.has_gate:
        expected = expected * gate
    condition = 1.0
    if not laplace:
        # A score is rounded to u |score|, and its exponential is off by as much. The tolerance,
        # 33 u, has room for scores up to 8.
        largest = np.abs(every[:, K - Q :] @ k.swapaxes(1, 2).astype(np.float64)).max()
        condition = max(1.0, float(largest) * spec.scale / 8)
    func = laplace_attention(spec) if laplace else gated_attention(spec)
    if not spec.q_offset:
        inputs = (q, k, v, gate) if spec.has_gate else (q, k, v)
        return Case(func, inputs, expected, condition)
    merged = np.full((B, K, spec.q_stride), np.nan, np.float32)
    merged[..., spec.q_offset : spec.q_offset + W] = q
    merged[..., spec.v_offset : spec.v_offset + V] = v
    if spec.has_gate:
        merged[..., spec.gate_offset : spec.gate_offset + V] = gate
    keys = np.full((B, K, spec.k_stride), np.nan, np.float32)
    keys[..., spec.k_offset : spec.k_offset + W] = k
    inputs = (merged, keys, merged, merged) if spec.has_gate else (merged, keys, merged)
    return Case(func, inputs, expected, condition)
