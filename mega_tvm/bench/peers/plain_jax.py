"""The plain model in jax.numpy, for XLA and IREE."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from reference.numpy_mega import ATTENTION_EPS, LAYER_NORM_EPS

from ..workloads import Workload
from .plain import Plan, constants, forward, softmax_forms


class JaxOps:
    """JAX's operators."""

    def __init__(self, attention: str) -> None:
        self.attention = attention

    def linear(self, x: jax.Array, w: jax.Array, b: jax.Array) -> jax.Array:
        """Return ``x @ w + b``."""
        return x @ w + b

    def layer_norm(self, x: jax.Array, gamma: jax.Array, beta: jax.Array) -> jax.Array:
        """Normalize the last axis."""
        mean = x.mean(axis=-1, keepdims=True)
        var = jnp.square(x - mean).mean(axis=-1, keepdims=True)
        return gamma * ((x - mean) * jax.lax.rsqrt(var + LAYER_NORM_EPS)) + beta

    def sigmoid(self, x: jax.Array) -> jax.Array:
        """Return ``sigmoid(x)``."""
        return jax.nn.sigmoid(x)

    def silu(self, x: jax.Array) -> jax.Array:
        """Return ``x * sigmoid(x)``."""
        return jax.nn.silu(x)

    def softmax(self, x: jax.Array) -> jax.Array:
        """Softmax over the last axis."""
        return jax.nn.softmax(x, axis=-1)

    def split(self, x: jax.Array, sizes: Sequence[int]) -> Sequence[jax.Array]:
        """Split the last axis."""
        ends = np.cumsum(sizes)
        return [x[..., end - size : end] for end, size in zip(ends, sizes, strict=True)]

    def rows(self, x: jax.Array, begin: int, end: int, axis: int = 1) -> jax.Array:
        """Return a range of one axis."""
        return jax.lax.slice_in_dim(x, begin, end, axis=axis)

    def concat(self, parts: Sequence[jax.Array], axis: int) -> jax.Array:
        """Join along an axis."""
        return jnp.concatenate(parts, axis=axis)

    def reshape(self, x: jax.Array, shape: Sequence[int]) -> jax.Array:
        """Reshape."""
        return x.reshape(tuple(shape))

    def permute(self, x: jax.Array, axes: Sequence[int]) -> jax.Array:
        """Permute the axes."""
        return jnp.transpose(x, axes)

    def pad_time(self, x: jax.Array, count: int) -> jax.Array:
        """Append ``count`` frames of zeros."""
        return jnp.pad(x, ((0, 0), (0, count), (0, 0)))

    def fused_attention(self, q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> jax.Array:
        """Not used: on a CPU, JAX's attention function is the plain products."""
        raise NotImplementedError

    def laplace_attention(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """L1-Laplace attention; XLA fuses the differences into the sum, so none is stored.

        ``"features-last"`` sums along the contiguous axis. ``"features-first"`` sums along the
        outermost one, whose loop vectorizes over the keys.
        """
        if self.attention == "features-last":
            distance = jnp.abs(q[:, :, None] - k[:, None]).sum(axis=-1)
        else:
            qt, kt = jnp.moveaxis(q, -1, 0), jnp.moveaxis(k, -1, 0)
            distance = jnp.abs(qt[..., :, None] - kt[..., None, :]).sum(axis=0)
        w = 1 / (1 + distance)
        return (w @ v) / (w.sum(axis=-1, keepdims=True) + ATTENTION_EPS)


def attention_forms(workload: Workload) -> Sequence[str]:
    """Return the forms of attention that suit JAX."""
    if workload.config.laplace_attention:
        return ["features-last", "features-first"]
    return softmax_forms(workload)


def build(plan: Plan, params: Mapping[str, npt.NDArray[Any]]) -> Callable[[jax.Array], jax.Array]:
    """Return the model as a function to jit, its constants closed over."""
    ops = JaxOps(plan.form.attention)
    values = {
        name: jnp.asarray(value, dtype=jnp.float32)
        for name, value in constants(plan, params).items()
    }

    def mega(x: jax.Array) -> jax.Array:  # its name becomes the compiled module's
        return forward(ops, values, plan, x)

    return mega
