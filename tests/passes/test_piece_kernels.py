"""own_piece_kernels: what runs in pieces is another function than what runs whole."""

from __future__ import annotations

import pytest
import tvm
import tvm_ffi

from mega_tvm.input_shapes import import_entries
from mega_tvm.kernel_list import kernel_calls, kernels_by_caller, kernels_in_pieces
from mega_tvm.passes.piece_kernels import SUFFIX
from mega_tvm.passes.split_rows import is_piece
from mega_tvm.pipeline import graph_phase, kernel_phase, passes_of
from mega_tvm.targets import resolve_target
from tests.passes.harness import random_mega


def kernels_of(*lengths: int) -> tvm.IRModule:
    """Return the kernels of a model for two threads, as the schedule phase gets them."""
    target = resolve_target("x86-64-v3")
    with target.tvm_target():
        shapes = {f"t{length}": (1, length, 13) for length in lengths}
        mod, _ = import_entries(random_mega(laplace_attention=True), shapes)
        return kernel_phase(graph_phase(mod, passes=passes_of(target, "float32", 2)))


def test_a_kernel_of_both_is_two() -> None:
    """59 frames stay whole; 118 are two pieces of as many."""
    mod = kernels_of(59, 118)
    in_entries, in_pieces = kernels_by_caller(mod)
    assert not in_entries & in_pieces
    own = {name for name in in_pieces if name.endswith(SUFFIX)}
    assert own and own < in_pieces == kernels_in_pieces(mod)
    for name in own:
        shared = name.removesuffix(SUFFIX)
        assert shared in in_entries
        assert tvm_ffi.structural_equal(mod[name], mod[shared])
    callers = {function for function, kernel in kernel_calls(mod) if kernel in own}
    assert callers and all(is_piece(mod[name]) for name in callers)


@pytest.mark.parametrize("length", [59, 118])
def test_a_kernel_of_one_keeps_its_name(length: int) -> None:
    in_entries, in_pieces = kernels_by_caller(kernels_of(length))
    assert not in_entries & in_pieces
    assert bool(in_pieces) == (length == 118)
    assert not any(name.endswith(SUFFIX) for name in in_entries | in_pieces)
