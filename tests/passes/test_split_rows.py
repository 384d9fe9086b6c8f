"""split_rows: a sequence in pieces of rows, each piece through many operators at once."""

from __future__ import annotations

import pytest
import torch
import tvm
from tvm import relax

from mega_tvm import pipeline
from mega_tvm.passes import CPU_PASSES, GRAPH_PASSES
from mega_tvm.passes.split_rows import (
    CALL,
    LEAST_ROWS,
    LONG,
    is_piece,
    mark,
    piece_count,
    rows_for,
)
from mega_tvm.relax_ops import is_op, shape_of
from reference.ops import gated_attention
from tests.passes.harness import Around, Graph, imported, linear, random_mega

T, ROWS = 96, 32


def split(module: torch.nn.Module, width: int = 13, rows: int = ROWS) -> tvm.IRModule:
    mod = imported(module, (1, T, width)).clone()
    mod.update_func(mod.get_global_var("main"), mark(mod["main"], rows))
    return pipeline.graph_phase(mod, passes=(*GRAPH_PASSES, *CPU_PASSES))


def pieces(mod: tvm.IRModule) -> dict[str, relax.Function]:
    return {g.name_hint: func for g, func in mod.functions_items() if is_piece(func)}


def test_between_two_scans_lie_two_piece_functions() -> None:
    """What makes the normed rows, and what needs them all; the last block has one row left."""
    mod = split(random_mega())
    found = pieces(mod)
    assert [piece_count(func) for func in found.values()] == [T // ROWS] * 4
    main = Graph(mod["main"])
    order = [
        "scan" if is_op(call, "mega.ema_scan") else "pieces"
        for call in main
        if is_op(call, "mega.ema_scan") or is_op(call, "call_pure_packed")
    ]
    assert order == ["pieces", "scan", "pieces", "pieces", "scan", "pieces"]
    attention = [call for f in found.values() for call in Graph(f).all("mega.attention")]
    assert [str(shape_of(call.args[1])[1]) for call in attention] == ["keys"]
    assert main.count("mega.attention") == 1  # that of the last row
    assert all(m == 1 for m, _, _ in main.dense)


def test_a_layer_keeps_two_tensors_of_all_rows() -> None:
    """The residual stream and the normed rows; and the moving average's, which are narrow."""
    mod = split(random_mega(num_layers=3))
    kept = [
        [shape_of(var)[2] for var, value in Graph(mod["main"]).bindings if takes(value, call)]
        for call, _ in calls(mod)
    ]
    assert kept == [[40, 3], [40, 40], [40, 3], [40, 40], [40, 3], [40, 40]]


def calls(mod: tvm.IRModule) -> list[tuple[relax.Var, relax.Expr]]:
    bindings = Graph(mod["main"]).bindings
    return [(v, c) for v, c in bindings if is_op(c, "call_pure_packed")]


def takes(value: relax.Expr, var: relax.Var) -> bool:
    return isinstance(value, relax.TupleGetItem) and value.tuple_value == var


def test_laplace_attention_sees_all_keys() -> None:
    mod = split(random_mega(laplace_attention=True))
    attention = [c for f in pieces(mod).values() for c in Graph(f).all("mega.attention")]
    assert [shape_of(call.args[1])[1] for call in attention] == [T]
    assert [shape_of(call.args[0])[1] for call in attention] == [ROWS]


MIXING = {
    "a sum over time": lambda m, x: m.a(x) + m.a(x).sum(dim=1, keepdim=True),
    "time reversed": lambda m, x: m.a(x).flip(1),
}


@pytest.mark.parametrize("function", MIXING.values(), ids=MIXING)
def test_what_mixes_rows_stays_whole(function) -> None:
    mod = split(Around(function, a=linear(16, 16)), width=16)
    assert not pieces(mod)
    assert not any(is_op(call, "call_pure_packed") for call in Graph(mod["main"]))


def test_keys_that_are_not_rows_of_the_input_stay_whole() -> None:
    def function(m: Around, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        return gated_attention(y, y, y, torch.sigmoid(y[:, -1:] + y), False)

    assert not pieces(split(Around(function, a=linear(16, 16)), width=16))


@pytest.mark.parametrize(
    ("seq_len", "threads", "rows"),
    [
        (60, 1, None),
        (60, 2, 30),
        (59, 2, None),
        (256, 2, 64),
        (128, 4, 32),
        (2 * LEAST_ROWS - 2, 2, None),
        (LONG - 1, 1, None),
        (LONG, 1, 256),
        (4096, 1, 256),
        (4096, 16, 128),
        (4099, 1, None),
    ],
)
def test_the_rows_of_a_piece(seq_len, threads, rows) -> None:
    assert rows_for(seq_len, threads) == rows


def test_pieces_are_called_by_name() -> None:
    (_, call), *_ = calls(split(random_mega()))
    assert call.args[0].global_symbol == CALL
