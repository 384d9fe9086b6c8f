"""How much arithmetic a model is: as it is defined, and as a compiled library executes it.

Counted are multiplications, additions and subtractions of products, distances and moving averages.
Norms, activations and exponentials are not, so that a share of the FMA peak is never flattered.
Products in pairs (`schedules.dense.pairs`) count as the multiply-adds that they stand for, a third
of which no FMA unit does: a rate may exceed the FMA peak. An L1 distance counts two operations an
element (subtract, add), which are two instructions where a product's two are one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .workloads import Workload


def plain_flops(workload: Workload, pruned: bool) -> int:
    """Return the operations of the plain model; of causal attention, the visible half.

    Parameters
    ----------
    workload : Workload
    pruned : bool
        The last block's queries, gate, output projection and FFN are of one row.
    """
    config = workload.config
    B, T = workload.batch, workload.seq_len
    H, D = config.hidden_size, config.ema_dim

    def layer(rows: int) -> int:
        pairs = rows * T
        if not config.laplace_attention:  # the last row sees every key, each row above one less
            pairs -= rows * (rows - 1) // 2
        every_row = 2 * H * D + 2 * H * H  # EMA's two products, keys and values
        these_rows = 3 * H * H + 3 * H * config.ffn_size
        return 2 * T * (every_row + D) + 2 * rows * these_rows + 4 * pairs * H

    embedding = 2 * T * config.embed_dim * H if config.has_input_projection else 0
    return B * (embedding + (config.num_layers - 1) * layer(T) + layer(1 if pruned else T))


def kernel_flops(op: str, spec: Mapping[str, Any] | None) -> int:
    """Return the operations of one call of a kernel, from the specification in the manifest.

    Parameters
    ----------
    op : str
        The kernel's folder in ``schedules/``.
    spec : mapping or None
        Fields of its ``KernelSpec``. Without one, or with dimensions that only a call brings, the
        result is 0: it cannot be told.
    """
    if spec is None:
        return 0
    sizes = (*spec.get("lead", ()), *(spec.get(name) for name in ("batch", "seq_len", "q_len")))
    if any(isinstance(size, str) for size in sizes):
        return 0
    if op in ("dense", "normed_dense"):
        return 2 * math.prod(spec["lead"]) * int(spec["k"]) * int(spec["n"])
    if op == "ema_scan":
        return 2 * int(spec["batch"]) * int(spec["seq_len"]) * int(spec["channels"])
    if op == "ema_scan_dense":
        steps = int(spec["batch"]) * int(spec["seq_len"])
        return 2 * steps * int(spec["channels"]) * (1 + int(spec["n"]))
    if op in ("gated_attention", "laplace_attention"):
        rows, keys = int(spec["q_len"]), spec["k_len"]
        if isinstance(keys, str):
            return 0
        pairs = int(rows * keys)
        if op == "gated_attention":  # the last row sees every key, each row above one less
            pairs -= rows * (rows - 1) // 2
        return 2 * int(spec["batch"]) * pairs * (int(spec["width"]) + int(spec["value_width"]))
    return 0


def executed_flops(kernels: Sequence[Mapping[str, Any]]) -> int:
    """Return the operations of a run, from the manifest's list of kernels and their calls."""
    total = 0
    for kernel in kernels:
        spec = kernel["spec"]
        if "mean_keys" in kernel:  # linear in the keys, so that the mean gives the sum
            spec = {**spec, "k_len": kernel["mean_keys"]}
        total += int(kernel.get("calls", 1)) * kernel_flops(kernel["op"], spec)
    return total
