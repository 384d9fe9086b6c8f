"""Entries that run their rows in pieces: results, memory, threads, tracing."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import tvm

import mega_tvm
from mega_tvm.bench.flops import executed_flops
from mega_tvm.c_function import serial_form
from mega_tvm.errors import MegaError
from mega_tvm.lowering import NOALIAS, forget_noalias
from mega_tvm.tolerances import assert_parity
from mega_tvm.tracing import name_layers, trace
from schedules.dense.naive import DenseSpec, dense
from tests.compiler.models import float64, mega, resident_bytes

ROWS, T = 16, 112  # seven pieces, the last in the middle of the order


@pytest.fixture(scope="module", params=[False, True], ids=["softmax", "laplace"])
def model(request):
    return mega(num_layers=2, laplace_attention=request.param)


@pytest.fixture(scope="module")
def compiled(model, tmp_path_factory):
    """Compile the model under a name, in short pieces."""
    folder = tmp_path_factory.mktemp("pieces")

    def compile_it(name, **options):
        with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
            # By its module: the package has the pass under this name.
            patch.setattr(sys.modules["mega_tvm.passes.split_rows"], "rows_for", lambda *_: ROWS)
            options = {"symbolic": False, "stream": False, **options}
            return mega_tvm.compile_model(model, output=folder / f"{name}.so", seq_len=T, **options)

    return compile_it


@pytest.fixture(scope="module")
def paths(compiled):
    """A library in pieces, and one of whole sequences."""
    return {
        "pieces": compiled("pieces"),
        "whole": compiled("whole", disabled_passes=["split_rows"]),
    }


@pytest.fixture
def x(rng):
    return rng.standard_normal((1, T, 13), dtype=np.float32)


@pytest.mark.parametrize("threads", [1, 2])
def test_any_number_of_threads_computes_the_same(model, paths, x, threads) -> None:
    found = mega_tvm.load(paths["pieces"], num_threads=threads)(x)
    assert_parity(found, float64(model, x))
    np.testing.assert_array_equal(found, mega_tvm.load(paths["pieces"])(x))


def test_less_is_kept_of_all_rows(paths) -> None:
    pieces, whole = (
        mega_tvm.load(paths[name]).entries[0].workspace for name in ("pieces", "whole")
    )
    assert pieces < 0.9 * whole


def test_calls_of_a_piece_count_once_a_piece(model, paths) -> None:
    pieces, whole = (mega_tvm.load(paths[name]).metadata["kernels"] for name in ("pieces", "whole"))
    if model.config.laplace_attention:
        assert executed_flops(pieces) == executed_flops(whole)
    else:  # values are projected after the attention, in float32 the same number of times
        assert executed_flops(pieces) == pytest.approx(executed_flops(whole), rel=0.01)


def test_what_runs_in_pieces_is_not_traced(paths, x) -> None:
    with pytest.raises(MegaError, match="runs its rows in pieces"):
        trace(mega_tvm.load(paths["pieces"]), "main", x)


@pytest.mark.parametrize("model", [False], ids=["softmax"], indirect=True)
def test_tracing_takes_the_symbolic_entry(model, compiled, x) -> None:
    calls = trace(mega_tvm.load(compiled("traced", symbolic=True)), "main", x)
    assert "mega_block_2_ffn_residual" in name_layers(calls, model.config)


def test_memory_is_given_back(paths, x) -> None:
    """A piece's own memory stays with its thread, from one call to the next."""
    loaded = mega_tvm.load(paths["pieces"], num_threads=2)
    first = loaded(x)

    def grown_by(calls: int) -> int:
        before = resident_bytes()
        for _ in range(calls):
            np.testing.assert_array_equal(loaded(x), first)
        return resident_bytes() - before

    grown_by(100)
    # The feed-forward layer's rows of one piece in each call would be as much.
    assert grown_by(1000) < 1000 * ROWS * 48 * 4


def test_the_input_is_not_written_over_and_windows_run_in_pieces(tmp_path, rng) -> None:
    """Without an input projection the residual stream has the shape of the input."""
    model = mega(embed_dim=16)
    path = mega_tvm.compile_model(
        model, output=tmp_path / "m.so", seq_len=60, threads=2, symbolic=False, stream=False
    )
    loaded = mega_tvm.load(path, num_threads=2)
    x = rng.standard_normal((1, 60, 16), dtype=np.float32) * 4  # read in place or copied
    before = x.copy()
    assert_parity(loaded(x), float64(model, x))
    np.testing.assert_array_equal(x, before)
    model = mega()
    path = mega_tvm.compile_model(
        model, output=tmp_path / "w.so", seq_len=60, threads=2, symbolic=False
    )
    loaded = mega_tvm.load(path, num_threads=2)
    assert "left_out" not in loaded.metadata["window"]
    frames = rng.standard_normal((1, 63, 13), dtype=np.float32)
    window = loaded.window()
    window.fill(frames[:, :60])
    for t in range(60, 63):
        found = window.push(frames[:, t])
        whole = np.ascontiguousarray(frames[:, t - 59 : t + 1])
        np.testing.assert_array_equal(found, loaded(whole))


def test_arguments_may_overlap_in_all_functions_or_in_none() -> None:
    """Of what LLVM knows of one function's arguments, TVM tells it of others'."""
    whole = dense(DenseSpec((1, 4), 8, 16)).with_attr(NOALIAS, True)
    plain = tvm.IRModule({"a": whole, "b": whole})
    assert forget_noalias(plain).same_as(plain)
    mixed = forget_noalias(tvm.IRModule({"a": whole, "b": serial_form(whole)}))
    assert [bool(func.attrs[NOALIAS]) for func in mixed.functions.values()] == [False, False]
