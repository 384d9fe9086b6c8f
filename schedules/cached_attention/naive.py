"""What a cached_attention kernel computes, unscheduled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from tvm import tirx
from tvm.script import tirx as T

from ..common.attention import ATTENTION_EPS
from ..common.dims import Dim, DimVars
from ..common.lines import padded
from ..common.spec import KernelSpec


@dataclasses.dataclass(frozen=True)
class CachedAttentionSpec(KernelSpec):
    """Sizes of a causal softmax attention over a cache.

    Parameters
    ----------
    batch, new_len : int or str
        Streams, and new frames of each.
    q_len : int or str
        Query rows, those of the last ``q_len`` new frames: ``new_len``, or 1.
    max_len : int or str
        Frames that the cache holds of each stream.
    width, value_width : int
        Columns of queries and keys, and of values and output.
    shared : bool
        The keys are the values too; else a cache row is a key, then a value.
    scale : float
        Factor of the scores; 1 where it was folded into weights.
    """

    op: ClassVar[str] = "cached_attention"

    batch: Dim
    new_len: Dim
    q_len: Dim
    max_len: Dim
    width: int
    value_width: int
    shared: bool
    scale: float = 1.0

    @property
    def sizes(self) -> tuple[Dim, Dim, Dim, Dim]:
        """The dimensions that may be named: ``batch``, ``new_len``, ``q_len``, ``max_len``."""
        return self.batch, self.new_len, self.q_len, self.max_len

    @property
    def row_width(self) -> int:
        """Columns of a cache row: key and value start at cache lines, whichever row it is."""
        return padded(self.width) + (0 if self.shared else padded(self.value_width))

    @property
    def value_offset(self) -> int:
        """First column of the values in a cache row."""
        return 0 if self.shared else padded(self.width)

    @property
    def name(self) -> str:
        """A readable name for the PrimFunc."""
        kind = "" if self.shared else f"x{self.value_width}"
        sizes = f"{self.batch}x{self.q_len}of{self.new_len}x{self.max_len}"
        return f"cached_attention_{sizes}x{self.width}{kind}"


def cached_attention(spec: CachedAttentionSpec) -> tirx.PrimFunc:
    """Return the PrimFunc ``(q, k[, v], lengths, cache, out)``, which also writes ``cache``.

    Frame ``c`` of stream ``b`` has position ``lengths[b] + c``; its key and value go to cache row
    ``position % max_len``. A query sees the cache rows up to its own, or all of them from position
    ``max_len`` on: the last ``max_len`` frames. Either ``new_len`` is 1, or ``lengths[b] + new_len
    <= max_len``.

    ``s = scale * q k^T``, ``w = exp(s - max)``, ``out = (w @ v) / (sum(w) + 1e-8)``.

    Padding columns of the cache are neither read nor written.

    Shapes: ``q [B, q_len, width]``, ``k [B, new_len, width]``, ``v [B, new_len, value_width]``,
    ``lengths [B]`` int64, ``cache [B, max_len, row_width]``, ``out [B, q_len, value_width]``.
    """
    dims = DimVars()
    B, C, Q, N = dims.shape(spec.sizes)
    W, V, v_off, scale = spec.width, spec.value_width, spec.value_offset, spec.scale
    shared = spec.shared

    @T.inline
    def append(rows, lengths, cache, width, offset):
        for b, c, d in T.grid(B, C, width):
            with T.sblock("append"):
                vb, vc, vd = T.axis.remap("SSS", [b, c, d])
                cache[vb, (lengths[vb] + vc) % N, offset + vd] = rows[vb, vc, vd]

    @T.inline
    def attend(q, lengths, cache, out):
        s = T.alloc_buffer((B, Q, N), "float32")
        peak = T.alloc_buffer((B, Q), "float32")
        total = T.alloc_buffer((B, Q), "float32")
        for b, i, j, d in T.grid(B, Q, N, W):
            with T.sblock("scores"):
                vb, vi, vj, vd = T.axis.remap("SSSR", [b, i, j, d])
                with T.init():
                    s[vb, vi, vj] = T.float32(0)
                s[vb, vi, vj] += q[vb, vi, vd] * cache[vb, vj, vd]
        for b, i, j in T.grid(B, Q, N):
            with T.sblock("peak"):
                vb, vi, vj = T.axis.remap("SSR", [b, i, j])
                with T.init():
                    peak[vb, vi] = T.min_value("float32")
                peak[vb, vi] = T.if_then_else(
                    T.Cast("int64", vj) <= lengths[vb] + (C - Q) + vi,
                    T.max(peak[vb, vi], s[vb, vi, vj]),
                    peak[vb, vi],
                )
        for b, i, j in T.grid(B, Q, N):
            with T.sblock("weights"):
                vb, vi, vj = T.axis.remap("SSS", [b, i, j])
                s[vb, vi, vj] = T.if_then_else(
                    T.Cast("int64", vj) <= lengths[vb] + (C - Q) + vi,
                    T.exp((s[vb, vi, vj] - peak[vb, vi]) * T.float32(scale)),
                    T.float32(0),
                )
        for b, i, j in T.grid(B, Q, N):
            with T.sblock("total"):
                vb, vi, vj = T.axis.remap("SSR", [b, i, j])
                with T.init():
                    total[vb, vi] = T.float32(0)
                total[vb, vi] += s[vb, vi, vj]
        for b, i, d, j in T.grid(B, Q, V, N):
            with T.sblock("mixed"):
                vb, vi, vd, vj = T.axis.remap("SSSR", [b, i, d, j])
                with T.init():
                    out[vb, vi, vd] = T.float32(0)
                # Rows behind the last one hold what an earlier stream left.
                out[vb, vi, vd] += T.if_then_else(
                    T.Cast("int64", vj) <= lengths[vb] + (C - Q) + vi,
                    s[vb, vi, vj] * cache[vb, vj, v_off + vd],
                    T.float32(0),
                )
        for b, i, d in T.grid(B, Q, V):
            with T.sblock("out"):
                vb, vi, vd = T.axis.remap("SSS", [b, i, d])
                out[vb, vi, vd] = out[vb, vi, vd] / (total[vb, vi] + T.float32(ATTENTION_EPS))

    @T.inline
    def body(q, k, v, lengths, cache, out):
        append(k, lengths, cache, W, 0)
        if not shared:
            append(v, lengths, cache, V, v_off)
        attend(q, lengths, cache, out)

    return spec.attach(cached_attention_prim_func(spec, dims, body))


def cached_attention_prim_func(
    spec: CachedAttentionSpec, dims: DimVars, body: Callable[..., None]
) -> tirx.PrimFunc:
    """Wrap ``body(q, k, v, lengths, cache, out)`` in the PrimFunc of a spec."""
    B, C, Q, N = dims.shape(spec.sizes)
    W, V, R = spec.width, spec.value_width, spec.row_width
    if spec.shared:

        @T.prim_func(s_tir=True, private=True)
        def shared(
            q: T.Buffer((B, Q, W), "float32"),
            k: T.Buffer((B, C, W), "float32"),
            lengths: T.Buffer((B,), "int64"),
            cache: T.Buffer((B, N, R), "float32"),
            out: T.Buffer((B, Q, V), "float32"),
        ):
            T.func_attr({"tirx.noalias": True})
            body(q, k, k, lengths, cache, out)

        return shared

    @T.prim_func(s_tir=True, private=True)
    def separate(
        q: T.Buffer((B, Q, W), "float32"),
        k: T.Buffer((B, C, W), "float32"),
        v: T.Buffer((B, C, V), "float32"),
        lengths: T.Buffer((B,), "int64"),
        cache: T.Buffer((B, N, R), "float32"),
        out: T.Buffer((B, Q, V), "float32"),
    ):
        T.func_attr({"tirx.noalias": True})
        body(q, k, v, lengths, cache, out)

    return separate
