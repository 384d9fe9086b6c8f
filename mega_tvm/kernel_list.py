"""The kernels of a module, and who calls them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir import Op

from schedules.common.spec import SPEC_ATTR
from schedules.registry import kernel_op

from .passes.split_rows import KEYS, is_piece, piece_count

SCHEDULE_ATTR = "mega.schedule"


def calls_of(mod: tvm.IRModule) -> Iterator[tuple[str, relax.Call]]:
    """Yield every bound call of every Relax function, with the function's name."""
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            for block in func.body.blocks:
                for binding in block.bindings:
                    if isinstance(binding.value, relax.Call):
                        yield gvar.name_hint, binding.value


def kernel_calls(mod: tvm.IRModule) -> Iterator[tuple[str, str]]:
    """Yield the kernel of every call of one, with the name of the function that calls."""
    for function, call in calls_of(mod):
        if call.op == Op.get("relax.call_tir"):
            yield function, str(call.args[0].name_hint)


def kernels_by_caller(mod: tvm.IRModule) -> tuple[set[str], set[str]]:
    """Return the kernels that entries call, and those that piece functions call."""
    pieces = piece_counts(mod)
    calls = list(kernel_calls(mod))
    return (
        {kernel for function, kernel in calls if function not in pieces},
        {kernel for function, kernel in calls if function in pieces},
    )


def kernels_in_pieces(mod: tvm.IRModule) -> set[str]:
    """Return the kernels that piece functions alone call."""
    in_entries, in_pieces = kernels_by_caller(mod)
    return in_pieces - in_entries


def piece_counts(mod: tvm.IRModule) -> dict[str, int]:
    """Return how many pieces each piece function stands for, by its name."""
    return {g.name_hint: piece_count(func) for g, func in mod.functions_items() if is_piece(func)}


def describe_kernels(mod: tvm.IRModule) -> list[dict[str, Any]]:
    """Return the manifest's list of kernels of a scheduled module."""
    pieces = piece_counts(mod)
    calls: Counter[str] = Counter()
    keys: Counter[str] = Counter()  # over all calls, in units of a piece's rows
    for function, name in kernel_calls(mod):
        count = pieces.get(function, 1)
        calls[name] += count
        keys[name] += count * (count + 1) // 2
    kernels = []
    for gvar, func in mod.functions_items():
        if isinstance(func, tirx.PrimFunc):
            spec = json.loads(str(func.attrs[SPEC_ATTR])) if SPEC_ATTR in func.attrs else None
            kernels.append(
                {
                    "name": str(gvar.name_hint),
                    "op": kernel_op(func) or "generic",
                    "spec": spec,
                    "schedule": str(func.attrs[SCHEDULE_ATTR]),
                    "calls": calls[gvar.name_hint],
                }
            )
            if spec is not None and spec.get("k_len") == KEYS:
                mean = spec["q_len"] * keys[gvar.name_hint] / calls[gvar.name_hint]
                kernels[-1]["mean_keys"] = mean
    return sorted(kernels, key=lambda kernel: str(kernel["name"]))
