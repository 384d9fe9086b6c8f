"""The graph phase: one rewrite a module, each a pass that can be switched off.

``GRAPH_PASSES`` is their order. ``canonicalize`` and ``narrow_weights`` change the form of the
graph, not its arithmetic, and always run; so do ``carry_state`` and ``split_window``, on the
functions marked for them.
"""

from __future__ import annotations

import tvm

from .canonicalize import canonicalize
from .carry_state import carry_state
from .fold_layer_norm import fold_layer_norm
from .fold_scale import fold_scale
from .fuse_epilogues import fuse_residual, fuse_sigmoid, fuse_swiglu
from .merge_projections import merge_projections
from .merge_query_key import merge_query_key
from .narrow_weights import narrow_weights
from .pair_products import pair_products
from .prune_last_timestep import prune_last_timestep
from .reassociate_values import reassociate_values
from .split_rows import split_rows
from .split_window import split_window

GRAPH_PASSES: tuple[tvm.transform.Pass, ...] = (
    canonicalize,
    fold_scale,
    fold_layer_norm,
    merge_query_key,
    prune_last_timestep,
    reassociate_values,
    carry_state,
    merge_projections,
    fuse_swiglu,
    fuse_sigmoid,
    fuse_residual,
    narrow_weights,
    split_window,
)
# Behind these, on CPUs; products in pairs on those where they pay.
CPU_PASSES: tuple[tvm.transform.Pass, ...] = (pair_products, split_rows)
REQUIRED_PASSES = frozenset({"canonicalize", "carry_state", "narrow_weights", "split_window"})
OPTIONAL_PASSES = tuple(
    graph_pass.info.name
    for graph_pass in (*GRAPH_PASSES, *CPU_PASSES)
    if graph_pass.info.name not in REQUIRED_PASSES
)
