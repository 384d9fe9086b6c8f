"""The oracle: Mega's forward pass in NumPy, float64 by default.

Parameters are a flat dict under Axon's names (``layer/param``), dense kernels ``[in, out]``.
Written for reading, against the contract of ``Edifice.Attention.Mega`` v0.2.0; nothing here is
fast but the L1 attention, whose ``[B, T, T, H]`` intermediate is avoided row by row.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from .config import MegaConfig

Array = npt.NDArray[np.floating[Any]]
Params = Mapping[str, npt.NDArray[Any]]

LAYER_NORM_EPS = 1e-5
ATTENTION_EPS = 1e-8
MASKED_SCORE = -1e9


def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + exp(-x))``, without overflow for large ``|x|``."""
    z = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + z), z / (1 + z))


def layer_norm(x: Array, gamma: Array, beta: Array, form: str = "plain") -> Array:
    """Normalize the last axis: biased variance, eps 1e-5.

    Parameters
    ----------
    x : array, [..., H]
    gamma, beta : array, [H]
    form : {"plain", "axon-0.8.0"}
        See `MegaConfig.layer_norm`.
    """
    mean = x.mean(axis=-1, keepdims=True)
    var = np.square(x - mean).mean(axis=-1, keepdims=True)
    eps = x.dtype.type(LAYER_NORM_EPS)
    denominator = var + eps
    if form == "axon-0.8.0":
        denominator = np.where(var < eps, eps, denominator)
    return gamma * (x - mean) / np.sqrt(denominator) + beta


def ema_scan(p: Array, alpha: Array) -> Array:
    """Exponential moving average over time, one decay per channel.

    ``h_t = a * h_{t-1} + (1 - a) * p_t`` with ``a = sigmoid(alpha)`` and ``h_{-1} = 0``.

    Parameters
    ----------
    p : array, [B, T, D]
    alpha : array, [D]

    Returns
    -------
    array, [B, T, D]
    """
    a = sigmoid(alpha)
    h = np.empty_like(p)
    state = np.zeros_like(p[:, 0])
    for t in range(p.shape[1]):
        state = a * state + (1 - a) * p[:, t]
        h[:, t] = state
    return h


def attention_weights(q: Array, k: Array, laplace: bool) -> Array:
    """Return the attention matrix ``A``, [B, T, T].

    Softmax: ``s = q k^T / sqrt(H)``, causal, ``w = exp(s - max)``. Laplace (not causal, not
    scaled): ``w_ij = 1 / (1 + sum_d |q_id - k_jd|)``. Both: ``A = w / (sum_j w + 1e-8)``.

    Parameters
    ----------
    q, k : array, [B, T, H]
    laplace : bool
    """
    if laplace:
        w = np.empty((q.shape[0], q.shape[1], k.shape[1]), dtype=q.dtype)
        for i in range(q.shape[1]):  # row by row: [B, T, H] at a time in place of [B, T, T, H]
            w[:, i] = 1 / (1 + np.abs(q[:, i, None] - k).sum(axis=-1))
    else:
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.dtype.type(q.shape[-1]))
        future = np.triu(np.ones(scores.shape[-2:], dtype=bool), k=1)
        scores = np.where(future, scores.dtype.type(MASKED_SCORE), scores)
        w = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return w / (w.sum(axis=-1, keepdims=True) + w.dtype.type(ATTENTION_EPS))


def gated_attention(q: Array, k: Array, v: Array, gate: Array, laplace: bool = False) -> Array:
    """Single-head attention with an output gate: ``gate * (A(q, k) @ v)``.

    Parameters
    ----------
    q, k, v, gate : array, [B, T, H]
        ``gate`` is already in (0, 1): the sigmoid belongs to the caller.
    laplace : bool
        See `attention_weights`.

    Returns
    -------
    array, [B, T, H]
    """
    return gate * (attention_weights(q, k, laplace) @ v)


def forward(
    config: MegaConfig,
    params: Params,
    x: npt.ArrayLike,
    *,
    dtype: npt.DTypeLike = np.float64,
    intermediates: dict[str, Array] | None = None,
) -> Array:
    """Run the whole model.

    Parameters
    ----------
    config : MegaConfig
    params : mapping of str to array
        Every parameter under its Axon name.
    x : array_like, [B, T, embed_dim]
        T >= 1; need not equal ``config.seq_len``.
    dtype : dtype, default float64
        Type of all arithmetic.
    intermediates : dict, optional
        If given, filled with every named layer's output over the full sequence.

    Returns
    -------
    array, [B, hidden_size]

    Raises
    ------
    ValueError
        If ``x`` has not the shape [B, T >= 1, embed_dim].
    """
    x = np.asarray(x, dtype=dtype)
    if x.ndim != 3 or x.shape[1] < 1 or x.shape[2] != config.embed_dim:
        raise ValueError(
            f"x must be [B, T >= 1, embed_dim={config.embed_dim}]; got {list(x.shape)}"
        )
    params = {name: np.asarray(value, dtype=dtype) for name, value in params.items()}
    seen: dict[str, Array] = {} if intermediates is None else intermediates

    def keep(name: str, value: Array) -> Array:
        seen[name] = value
        return value

    def dense(name: str, value: Array) -> Array:
        return keep(name, value @ params[f"{name}/kernel"] + params[f"{name}/bias"])

    def norm(name: str, value: Array) -> Array:
        gamma, beta = params[f"{name}/gamma"], params[f"{name}/beta"]
        return keep(name, layer_norm(value, gamma, beta, config.layer_norm))

    if config.has_input_projection:
        x = dense("input_projection", x)
    for i in range(1, config.num_layers + 1):
        block = f"mega_block_{i}"
        ema = f"{block}_ema/{block}_ema"
        y = norm(f"{block}_ema_norm", x)
        p = y @ params[f"{ema}_proj_w"] + params[f"{ema}_proj_b"]
        h = ema_scan(p, params[f"{ema}_alpha"])
        y = keep(f"{block}_ema", h @ params[f"{ema}_out_w"] + params[f"{ema}_out_b"])
        x = keep(f"{block}_ema_residual", x + y)

        y = norm(f"{block}_attn_norm", x)
        q, k, v, g = (dense(f"{block}_gattn_{part}", y) for part in ("q", "k", "v", "gate"))
        g = keep(f"{block}_gattn_gate_sigmoid", sigmoid(g))
        y = keep(f"{block}_gattn_compute", gated_attention(q, k, v, g, config.laplace_attention))
        x = keep(f"{block}_attn_residual", x + dense(f"{block}_gattn_out", y))

        y = norm(f"{block}_ffn_norm", x)
        g = dense(f"{block}_ffn_gate", y)
        g = keep(f"{block}_ffn_gate_act", g * sigmoid(g))
        y = keep(f"{block}_ffn_mul", g * dense(f"{block}_ffn_up", y))
        x = keep(f"{block}_ffn_residual", x + dense(f"{block}_ffn_down", y))
    return keep("last_timestep", norm("final_norm", x)[:, -1])
