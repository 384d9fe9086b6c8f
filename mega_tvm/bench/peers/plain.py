"""The model as the peers run it: one forward pass in plain operators, over any tensor library.

`forward` writes the model once; a peer brings the operators (`Ops`) and the constants of
`constants`, made by NumPy in float64 beforehand. No operator of ours is in it.

The moving average is a lower-triangular Toeplitz product per channel, ``h = L p``. Over a long
sequence L would be larger than the model, so that chunks of ``C`` frames get a product each, and
the state that enters a chunk is a second, shorter Toeplitz product over the chunks' last states.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from reference import MegaConfig
from reference.numpy_mega import MASKED_SCORE, sigmoid

from ..workloads import Workload

Array = npt.NDArray[Any]

# Up to here L of all channels (16 x 128 x 128 floats) is 1 MB a layer, less than its dense weights.
LONGEST_WHOLE_EMA = 128
EMA_CHUNK = 64
ATTENTION_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class Form:
    """How a peer writes what can be written in several ways; it is measured in its fastest one.

    Parameters
    ----------
    attention : str
        Softmax: ``"whole"`` (all scores, then a mask), ``"blocked"`` (blocks of query rows, each
        with the keys it sees), ``"fused"`` (the library's own attention). Laplace: the name of a
        form of the L1 distance that the peer knows.
    merged : bool
        Whether projections of one input are one product; only where a user prunes by hand.
    linear : str
        ``"matmul"`` or ``"gemm"``, for the peers that know both.
    """

    attention: str
    merged: bool = False
    linear: str = "matmul"

    @property
    def name(self) -> str:
        """A short name: ``"blocked+merged"``."""
        parts = [self.attention, "merged" if self.merged else ""]
        parts.append(self.linear if self.linear != "matmul" else "")
        return "+".join(filter(None, parts))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What `forward` needs to know: the shapes, the form, and whether the graph is pruned."""

    config: MegaConfig
    batch: int
    seq_len: int
    form: Form
    pruned: bool

    @classmethod
    def of(cls, workload: Workload, form: Form, pruned: bool) -> Plan:
        """Return the plan of a workload."""
        return cls(workload.config, workload.batch, workload.seq_len, form, pruned)

    @property
    def ema_chunks(self) -> int:
        """Chunks of the moving average; 1 where one product makes it all."""
        return 1 if self.seq_len <= LONGEST_WHOLE_EMA else -(-self.seq_len // EMA_CHUNK)


class Ops(Protocol):
    """The operators that a tensor library brings. Tensors also know ``+``, ``*`` and ``@``."""

    def linear(self, x: Any, w: Any, b: Any) -> Any:
        """Return ``x @ w + b``."""

    def layer_norm(self, x: Any, gamma: Any, beta: Any) -> Any:
        """Normalize the last axis."""

    def sigmoid(self, x: Any) -> Any:
        """Return ``sigmoid(x)``."""

    def silu(self, x: Any) -> Any:
        """Return ``x * sigmoid(x)``."""

    def softmax(self, x: Any) -> Any:
        """Softmax over the last axis."""

    def split(self, x: Any, sizes: Sequence[int]) -> Sequence[Any]:
        """Split the last axis."""

    def rows(self, x: Any, begin: int, end: int, axis: int = 1) -> Any:
        """Return ``x[:, begin:end]``, or the same of another axis."""

    def concat(self, parts: Sequence[Any], axis: int) -> Any:
        """Join along an axis."""

    def reshape(self, x: Any, shape: Sequence[int]) -> Any:
        """Reshape."""

    def permute(self, x: Any, axes: Sequence[int]) -> Any:
        """Permute the axes."""

    def pad_time(self, x: Any, count: int) -> Any:
        """Append ``count`` frames of zeros to ``x``, [B, T, D]."""

    def fused_attention(self, q: Any, k: Any, v: Any, causal: bool) -> Any:
        """Return the library's own softmax attention."""

    def laplace_attention(self, q: Any, k: Any, v: Any) -> Any:
        """Return the L1-Laplace attention of [B, Q, H] over [B, K, H]."""


def constants(plan: Plan, params: Mapping[str, Array]) -> dict[str, Array]:
    """Return every constant of `forward` by a short name; names of matrices end in ``_w``."""
    config, form = plan.config, plan.form
    c: dict[str, Array] = {}

    def dense(name: str, *layers: str) -> None:
        c[f"{name}_w"] = np.concatenate([params[f"{layer}/kernel"] for layer in layers], axis=1)
        c[f"{name}_b"] = np.concatenate([params[f"{layer}/bias"] for layer in layers])

    def norm(name: str, layer: str) -> None:
        c[f"{name}_gamma"], c[f"{name}_beta"] = params[f"{layer}/gamma"], params[f"{layer}/beta"]

    if config.has_input_projection:
        dense("in", "input_projection")
    for i in range(1, config.num_layers + 1):
        b, block = f"b{i}", f"mega_block_{i}"
        for part in ("ema", "attn", "ffn"):
            norm(f"{b}_{part}_norm", f"{block}_{part}_norm")
        ema = f"{block}_ema/{block}_ema"
        for part in ("proj", "out"):
            c[f"{b}_ema_{part}_w"] = params[f"{ema}_{part}_w"]
            c[f"{b}_ema_{part}_b"] = params[f"{ema}_{part}_b"]
        c.update({f"{b}_{k}": v for k, v in _ema_constants(plan, params[f"{ema}_alpha"]).items()})
        for name in _projections(plan, i):
            dense(f"{b}_{name}", *(f"{block}_gattn_{part}" for part in name.split("_")))
        if form.merged:
            dense(f"{b}_ffn_in", f"{block}_ffn_gate", f"{block}_ffn_up")
        else:
            dense(f"{b}_ffn_gate", f"{block}_ffn_gate")
            dense(f"{b}_ffn_up", f"{block}_ffn_up")
        dense(f"{b}_ffn_down", f"{block}_ffn_down")
        dense(f"{b}_attn_out", f"{block}_gattn_out")
    norm("final_norm", "final_norm")
    if not config.laplace_attention and form.attention != "fused":
        size = plan.seq_len if form.attention == "whole" else min(ATTENTION_BLOCK, plan.seq_len)
        c["mask"] = np.triu(np.full((size, size), MASKED_SCORE), k=1)
    return c


def forward(ops: Ops, c: Mapping[str, Any], plan: Plan, x: Any) -> Any:
    """Run the model: [B, T, embed_dim] to [B, H].

    Parameters
    ----------
    ops : Ops
    c : mapping of str to tensor
        What `constants` returned, as tensors of the library.
    plan : Plan
    x : tensor
    """
    config, T = plan.config, plan.seq_len

    def dense(name: str, value: Any) -> Any:
        return ops.linear(value, c[f"{name}_w"], c[f"{name}_b"])

    def norm(name: str, value: Any) -> Any:
        return ops.layer_norm(value, c[f"{name}_gamma"], c[f"{name}_beta"])

    if config.has_input_projection:
        x = dense("in", x)
    for i in range(1, config.num_layers + 1):
        b = f"b{i}"
        p = dense(f"{b}_ema_proj", norm(f"{b}_ema_norm", x))
        x = x + dense(f"{b}_ema_out", _ema(ops, c, plan, b, p))

        y = norm(f"{b}_attn_norm", x)
        q_y = y
        if plan.pruned and i == config.num_layers:
            x, q_y = ops.rows(x, T - 1, T), ops.rows(y, T - 1, T)
        parts: dict[str, Any] = {}
        for name in _projections(plan, i):
            names = name.split("_")
            out = dense(f"{b}_{name}", y if names[0] in "kv" else q_y)
            split = ops.split(out, [config.hidden_size] * len(names)) if len(names) > 1 else [out]
            parts.update(zip(names, split, strict=True))
        a = _attention(ops, c, plan, parts["q"], parts["k"], parts["v"], q_y is not y)
        x = x + dense(f"{b}_attn_out", ops.sigmoid(parts["gate"]) * a)

        y = norm(f"{b}_ffn_norm", x)
        if plan.form.merged:
            gate, up = ops.split(dense(f"{b}_ffn_in", y), [config.ffn_size] * 2)
        else:
            gate, up = dense(f"{b}_ffn_gate", y), dense(f"{b}_ffn_up", y)
        x = x + dense(f"{b}_ffn_down", ops.silu(gate) * up)
    rows = 1 if plan.pruned else T
    x = ops.rows(norm("final_norm", x), rows - 1, rows)
    return ops.reshape(x, (plan.batch, config.hidden_size))


def forms(
    workload: Workload, pruned: bool, attention: Callable[[Workload], Sequence[str]]
) -> list[Form]:
    """Return the forms of a workload: each attention; merged too where it is pruned."""
    return [
        Form(name, merged=merged)
        for name in attention(workload)
        for merged in ((False, True) if pruned else (False,))
    ]


def softmax_forms(workload: Workload) -> list[str]:
    """Return the softmax forms that make sense at a length."""
    T = workload.seq_len
    # Above 4096 the scores of all rows are a gigabyte or more.
    whole = ["whole"] if T <= 4096 else []
    return whole + (["blocked"] if T > ATTENTION_BLOCK else [])


def _projections(plan: Plan, index: int) -> Sequence[str]:
    """Return the attention's products: the parts that each makes, joined by ``_``."""
    if not plan.form.merged:
        return ("q", "k", "v", "gate")
    last = plan.pruned and index == plan.config.num_layers
    return ("q_gate", "k_v") if last else ("q_k_v_gate",)


def _ema_constants(plan: Plan, alpha: Array) -> dict[str, Array]:
    """Return the Toeplitz matrices of one layer, [D, ...], of ``a = sigmoid(alpha)``."""
    a = sigmoid(alpha.astype(np.float64))[:, None, None]
    chunks = plan.ema_chunks
    size = plan.seq_len if chunks == 1 else EMA_CHUNK

    def toeplitz(base: Array, count: int, first: int) -> Array:
        # [D, count, count]: base^(t - s - first) on and below that diagonal, zero above
        lag = np.subtract.outer(np.arange(count), np.arange(count)) - first
        return np.where(lag >= 0, base ** np.maximum(lag, 0), 0.0)

    found = {"ema_local": (1 - a) * toeplitz(a, size, 0)}
    if chunks > 1:
        found["ema_carry"] = toeplitz(a**size, chunks, 1)
        found["ema_decay"] = (a ** (np.arange(size) + 1)[:, None])[..., None]  # [D, C, 1, 1]
    return found


def _ema(ops: Ops, c: Mapping[str, Any], plan: Plan, block: str, p: Any) -> Any:
    """Return the moving average of ``p``, [B, T, D]."""
    B, T, D, n = plan.batch, plan.seq_len, plan.config.ema_dim, plan.ema_chunks
    if n == 1:
        h = c[f"{block}_ema_local"] @ ops.permute(p, (2, 1, 0))  # [D, T, B]
        return ops.permute(h, (2, 1, 0))
    C = EMA_CHUNK
    if n * C > T:
        p = ops.pad_time(p, n * C - T)
    p = ops.permute(ops.reshape(p, (B, n, C, D)), (3, 2, 1, 0))  # [D, C, n, B]
    local = c[f"{block}_ema_local"] @ ops.reshape(p, (D, C, n * B))
    last = ops.reshape(ops.rows(local, C - 1, C), (D, n, B))
    entering = ops.reshape(c[f"{block}_ema_carry"] @ last, (D, 1, n, B))
    h = ops.reshape(local, (D, C, n, B)) + c[f"{block}_ema_decay"] * entering
    h = ops.reshape(ops.permute(h, (3, 2, 1, 0)), (B, n * C, D))
    return ops.rows(h, 0, T) if n * C > T else h


def _attention(
    ops: Ops, c: Mapping[str, Any], plan: Plan, q: Any, k: Any, v: Any, last_row: bool
) -> Any:
    """Return the attention of all rows, or of the last one, which sees every key."""
    T, form = plan.seq_len, plan.form.attention
    if plan.config.laplace_attention:
        return ops.laplace_attention(q, k, v)
    if form == "fused":
        return ops.fused_attention(q, k, v, not last_row)
    scale = float(plan.config.hidden_size) ** -0.5
    if last_row or form == "whole":
        scores = (q @ ops.permute(k, (0, 2, 1))) * scale
        return ops.softmax(scores if last_row else scores + c["mask"]) @ v
    blocks = []
    for begin in range(0, T, ATTENTION_BLOCK):
        end = min(T, begin + ATTENTION_BLOCK)
        keys = ops.permute(ops.rows(k, 0, end), (0, 2, 1))
        scores = (ops.rows(q, begin, end) @ keys) * scale
        # Only the square at the diagonal is masked; the columns before it are all visible.
        size = end - begin
        mask = c["mask"]
        if size < min(ATTENTION_BLOCK, T):
            mask = ops.rows(ops.rows(mask, 0, size, axis=0), 0, size)
        square = ops.rows(scores, begin, end, axis=2) + mask
        if begin:
            square = ops.concat([ops.rows(scores, 0, begin, axis=2), square], 2)
        blocks.append(ops.softmax(square) @ ops.rows(v, 0, end))
    return ops.concat(blocks, 1) if len(blocks) > 1 else blocks[0]
