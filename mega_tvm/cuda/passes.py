"""The graph passes that only CUDA targets run: fewer launches.

A launch costs a GPU about 2.5 us, as long as a small model's kernel takes; on a CPU a call is free
and separate kernels are simpler.
"""

from __future__ import annotations

from tvm import relax

from schedules.ema_scan_dense.cuda import MAX_CHANNELS

from ..passes.rewrite import Rule, Site, graph_pass
from ..relax_ops import is_op, shape_of
from .fused_ops import ema_scan_dense, normed_dense


def _norm_rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        if not is_op(site.call, "mega.dense") or not site.is_only_use(0):
            return None
        norm = site.producer(0)
        if norm is None or not is_op(norm, "mega.layer_norm") or len(norm.args) != 1:
            return None
        return normed_dense(site.call, norm)

    return rule


def _scan_rule() -> Rule:
    def rule(site: Site) -> relax.Expr | None:
        if not is_op(site.call, "mega.dense") or not site.is_only_use(0):
            return None
        scan = site.producer(0)
        if scan is None or not is_op(scan, "mega.ema_scan"):
            return None
        attrs = site.call.attrs
        epilogue = attrs["swiglu"] or 0 <= attrs["sigmoid_from"] < shape_of(site.call.args[1])[1]
        if epilogue or shape_of(scan.args[0])[2] > MAX_CHANNELS:
            return None
        return ema_scan_dense(scan, site.call.args[1:])

    return rule


fuse_layer_norm = graph_pass("fuse_layer_norm", _norm_rule)
fuse_ema_scan = graph_pass("fuse_ema_scan", _scan_rule)

CUDA_PASSES = (fuse_layer_norm, fuse_ema_scan)
