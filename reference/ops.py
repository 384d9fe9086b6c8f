"""Mega's three custom torch operators, each one node in an exported graph.

``mega::ema_scan``, ``mega::gated_attention`` and ``mega::axon_layer_norm`` work on any floating
type and any device; half types accumulate in float32. Gradients are written by hand. Those of the
first two are operators of their own, because they loop over time: a tracer sees one node, and a
symbolic length stays symbolic.

The formulas are those of `reference.numpy_mega`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .numpy_mega import ATTENTION_EPS, LAYER_NORM_EPS, MASKED_SCORE


@torch.library.custom_op("mega::ema_scan", mutates_args=())
def ema_scan(p: Tensor, alpha: Tensor) -> Tensor:
    """Exponential moving average over time, one decay per channel.

    ``h_t = a * h_{t-1} + (1 - a) * p_t`` with ``a = sigmoid(alpha)`` and ``h_{-1} = 0``. The scan
    is sequential: nothing is divided by a power of ``a``, so any length is sound.

    Parameters
    ----------
    p : Tensor, [B, T, D], floating
    alpha : Tensor, [D], floating

    Returns
    -------
    Tensor, [B, T, D], dtype of ``p``
    """
    _check_ema(p, alpha)
    a = torch.sigmoid(alpha.to(_accumulator(p)))
    return _scan(p, a).to(p.dtype)


@torch.library.custom_op("mega::ema_scan_backward", mutates_args=())
def ema_scan_backward(grad: Tensor, p: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `ema_scan` for ``p`` and ``alpha``.

    With ``g_t = grad_t + a * g_{t+1}`` (the scan, backwards): ``dp_t = (1 - a) * g_t`` and
    ``da = sum_t g_t * (h_{t-1} - p_t)``. The states are computed again, because the forward pass
    returned them rounded to the type of ``p``.

    Parameters
    ----------
    grad, p : Tensor, [B, T, D]
    alpha : Tensor, [D]
    """
    dtype = _accumulator(p)
    a = torch.sigmoid(alpha.to(dtype))
    h = _scan(p, a)
    g = grad.to(dtype, copy=True, memory_format=torch.contiguous_format)
    for t in range(p.shape[1] - 2, -1, -1):
        g[:, t].addcmul_(a, g[:, t + 1])
    da = (g[:, 1:] * h[:, :-1]).sum(dim=(0, 1)) - (g * p).sum(dim=(0, 1))
    return ((1 - a) * g).to(p.dtype), (da * a * (1 - a)).to(alpha.dtype)


@torch.library.custom_op("mega::gated_attention", mutates_args=())
def gated_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, laplace: bool) -> Tensor:
    """Single-head attention with an output gate: ``gate * (A(q, k) @ v)``.

    Softmax: ``s = q k^T / sqrt(H)``, causal, ``w = exp(s - max)``. Laplace (not causal, not
    scaled): ``w_ij = 1 / (1 + sum_d |q_id - k_jd|)``. Both: ``A = w / (sum_j w + 1e-8)``.
    Memory is O(B * T * T) in both.

    Parameters
    ----------
    q, k, v, gate : Tensor, [B, T, H], one floating dtype
        ``gate`` is already in (0, 1): the sigmoid belongs to the caller.
    laplace : bool
        The L1-Laplace weights in place of the softmax.

    Returns
    -------
    Tensor, [B, T, H], contiguous
    """
    _check_attention(q, k, v, gate)
    dtype = _accumulator(q)
    _, attention = _attention_weights(q.to(dtype), k.to(dtype), laplace)
    return (gate * (attention @ v.to(dtype))).to(q.dtype).contiguous()


@torch.library.custom_op("mega::gated_attention_backward", mutates_args=())
def gated_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, laplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of `gated_attention` for ``q``, ``k``, ``v`` and ``gate``.

    The weights are computed again: keeping them would hold [B, T, T] per block between the passes.

    Parameters
    ----------
    grad, q, k, v, gate : Tensor, [B, T, H]
    laplace : bool
    """
    dtype = _accumulator(q)
    grad, q32, k32, v32 = (x.to(dtype) for x in (grad, q, k, v))
    w, attention = _attention_weights(q32, k32, laplace)
    d_out = grad * gate
    d_attention = d_out @ v32.mT
    # w * dL/dw. For the softmax this is dL/ds, with the subtracted maximum held constant: what that
    # leaves out is 1e-8 of the result, the weight of the epsilon in the denominator.
    centre = (d_attention * attention).sum(dim=-1, keepdim=True)
    d_log_w = attention * (d_attention - centre)
    if laplace:
        d_q, d_k = _l1_distance_backward(-w * d_log_w, q32, k32)
    else:
        d_scores = d_log_w / math.sqrt(q.shape[-1])
        d_q, d_k = d_scores @ k32, d_scores.mT @ q32
    d_v, d_gate = attention.mT @ d_out, grad * (attention @ v32)
    d_q, d_k, d_v, d_gate = (x.to(q.dtype).contiguous() for x in (d_q, d_k, d_v, d_gate))
    return d_q, d_k, d_v, d_gate


@torch.library.custom_op("mega::axon_layer_norm", mutates_args=())
def axon_layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Layer norm over the last axis as Axon 0.8.0 computes it.

    Biased variance, eps 1e-5; where ``var < eps`` the factor is ``rsqrt(eps)`` in place of
    ``rsqrt(var + eps)``.

    Parameters
    ----------
    x : Tensor, [..., H], floating
    gamma, beta : Tensor, [H], floating

    Returns
    -------
    Tensor, [..., H], dtype of ``x``, contiguous
    """
    _check_layer_norm(x, gamma, beta)
    x_hat, _, _ = _axon_normalize(x)
    return (gamma * x_hat + beta).to(x.dtype).contiguous()


def _scan(p: Tensor, a: Tensor) -> Tensor:
    """Return the moving average of ``p``, [B, T, D], in the type of its decay ``a``, [D]."""
    h = ((1 - a) * p).contiguous()
    for t in range(1, p.shape[1]):
        h[:, t].addcmul_(a, h[:, t - 1])
    return h


def _attention_weights(q: Tensor, k: Tensor, laplace: bool) -> tuple[Tensor, Tensor]:
    """Return the raw and the normalized attention weights, both [B, T, T]."""
    if laplace:
        w = 1 / (1 + torch.cdist(q, k, p=1.0))
    else:
        scores = q @ k.mT / math.sqrt(q.shape[-1])
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(future, MASKED_SCORE)
        w = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
    return w, w / (w.sum(dim=-1, keepdim=True) + ATTENTION_EPS)


def _l1_distance_backward(grad: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``sum_d |q_id - k_jd|`` for ``q`` and ``k``; ``grad`` is [B, T, T].

    Row by row: [B, T, H] at a time in place of [B, T, T, H].
    """
    d_q, d_k = torch.empty_like(q), torch.zeros_like(k)
    for i in range(q.shape[1]):
        signs = torch.sign(q[:, i, None] - k)  # [B, T, H]
        d_q[:, i] = (grad[:, i, None] @ signs).squeeze(1)
        d_k.addcmul_(grad[:, i, :, None], signs, value=-1)
    return d_q, d_k


def _axon_normalize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the normalized ``x``, the factor, and where the factor depends on the variance."""
    x = x.to(_accumulator(x))
    var, mean = torch.var_mean(x, dim=-1, correction=0, keepdim=True)
    varies = var >= LAYER_NORM_EPS
    factor = torch.rsqrt(torch.where(varies, var + LAYER_NORM_EPS, LAYER_NORM_EPS))
    return (x - mean) * factor, factor, varies


def _accumulator(x: Tensor) -> torch.dtype:
    """Return the type sums are kept in: float32 for the half types, else that of ``x``."""
    return torch.promote_types(x.dtype, torch.float32)


def _check_ema(p: Tensor, alpha: Tensor) -> None:
    if p.dim() != 3 or alpha.dim() != 1:
        raise ValueError(
            f"ema_scan: p must be [B, T, D] and alpha [D]; got {_shape(p)} and {_shape(alpha)}"
        )
    _check_floating("ema_scan", p=p, alpha=alpha)
    torch._check_value(
        p.shape[2] == alpha.shape[0],
        lambda: f"ema_scan: p has {p.shape[2]} channels but alpha {alpha.shape[0]}",
    )


def _check_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> None:
    tensors = {"q": q, "k": k, "v": v, "gate": gate}
    shapes = ", ".join(f"{name} {_shape(x)}" for name, x in tensors.items())
    message = f"gated_attention: q, k, v and gate must share one shape [B, T, H]; got {shapes}"
    if any(x.dim() != 3 for x in tensors.values()):
        raise ValueError(message)
    _check_floating("gated_attention", **tensors)
    if any(x.dtype != q.dtype for x in tensors.values()):
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise TypeError(f"gated_attention: q, k, v and gate must share one dtype; got {dtypes}")
    for other in (k, v, gate):
        for axis in range(3):
            torch._check_value(q.shape[axis] == other.shape[axis], lambda: message)


def _check_layer_norm(x: Tensor, gamma: Tensor, beta: Tensor) -> None:
    _check_floating("axon_layer_norm", x=x, gamma=gamma, beta=beta)
    message = (
        "axon_layer_norm: x must be [..., H], gamma and beta [H]; "
        f"got {_shape(x)}, {_shape(gamma)} and {_shape(beta)}"
    )
    if x.dim() < 1 or gamma.dim() != 1 or beta.dim() != 1:
        raise ValueError(message)
    for vector in (gamma, beta):
        torch._check_value(x.shape[-1] == vector.shape[0], lambda: message)


def _check_floating(op: str, **tensors: Tensor) -> None:
    for name, x in tensors.items():
        if not x.is_floating_point():
            raise TypeError(f"{op}: {name} must have a floating dtype; got {x.dtype}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)


# The fake kernels promise contiguous outputs whatever the strides of the inputs, as the real ones
# return them.


@ema_scan.register_fake
def _(p: Tensor, alpha: Tensor) -> Tensor:
    _check_ema(p, alpha)
    return p.new_empty(p.shape)


@ema_scan_backward.register_fake
def _(grad: Tensor, p: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    return p.new_empty(p.shape), alpha.new_empty(alpha.shape)


@gated_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, laplace: bool) -> Tensor:
    _check_attention(q, k, v, gate)
    return q.new_empty(q.shape)


@gated_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, laplace: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        q.new_empty(q.shape),
        k.new_empty(k.shape),
        v.new_empty(v.shape),
        gate.new_empty(gate.shape),
    )


@axon_layer_norm.register_fake
def _(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    _check_layer_norm(x, gamma, beta)
    return x.new_empty(x.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _ema_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    return ema_scan_backward(grad, *ctx.saved_tensors)


def _save_attention(
    ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor, bool], output: Tensor
) -> None:
    *tensors, ctx.laplace = inputs
    ctx.save_for_backward(*tensors)


def _attention_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *gated_attention_backward(grad, *ctx.saved_tensors, ctx.laplace), None


def _layer_norm_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, gamma, beta = ctx.saved_tensors
    x_hat, factor, varies = _axon_normalize(x)
    d_x_hat = grad * gamma
    # Where the factor is the constant rsqrt(eps), no gradient flows through the variance.
    through_var = torch.where(varies, (d_x_hat * x_hat).mean(dim=-1, keepdim=True), 0.0)
    d_x = factor * (d_x_hat - d_x_hat.mean(dim=-1, keepdim=True) - x_hat * through_var)
    d_gamma, d_beta = (y.reshape(-1, x.shape[-1]).sum(dim=0) for y in (grad * x_hat, grad))
    return d_x.to(x.dtype), d_gamma.to(gamma.dtype), d_beta.to(beta.dtype)


ema_scan.register_autograd(_ema_gradients, setup_context=_save_inputs)
gated_attention.register_autograd(_attention_gradients, setup_context=_save_attention)
axon_layer_norm.register_autograd(_layer_norm_gradients, setup_context=_save_inputs)
