"""merge_projections: one dense layer for all operands of an attention."""

from __future__ import annotations

import torch

from mega_tvm.relax_ops import OPERANDS
from reference.ops import gated_attention
from tests.passes.harness import (
    EMBED,
    WIDTH,
    Around,
    B,
    T,
    graph,
    linear,
    random_mega,
    run,
    without,
)  # fmt: skip

ALONE = without("merge_projections")
H = WIDTH


def offsets(attention) -> list[int]:
    return [int(attention.attrs[f"{name}_offset"]) for name in OPERANDS]


def test_all_four_projections_become_one() -> None:
    model = random_mega(laplace_attention=True)
    off, on = graph(model, off=without()), graph(model, off=ALONE)
    assert off.count("mega.dense") - on.count("mega.dense") == 2 * 3
    assert off.count("sigmoid") - on.count("sigmoid") == 2
    for attention in on.all("mega.attention"):
        assert len(set(attention.args)) == 1
        projection = on.values[attention.args[0]]
        assert int(projection.attrs["sigmoid_from"]) == 3 * H
        assert offsets(attention) == [0, H, 2 * H, 3 * H]
    assert [n for _, _, n in on.dense].count(4 * H) == 2


def test_three_are_left_once_query_and_key_are_merged() -> None:
    found = graph(random_mega(), off=without("merge_projections", "merge_query_key"))
    assert [n for _, _, n in found.dense].count(3 * H) == 2
    for attention in found.all("mega.attention"):
        query, key, value, gate = attention.args
        assert query == value == gate != key
        assert int(found.values[query].attrs["sigmoid_from"]) == 2 * H
        assert offsets(attention) == [0, 0, H, 2 * H]


def test_rows_of_the_last_timestep_and_of_all_are_not_merged() -> None:
    """The last block's query and gate have one row a sequence; keys and values have T."""
    found = graph(random_mega(laplace_attention=True), off=without(
        "merge_projections", "prune_last_timestep"
    ))  # fmt: skip
    query, key, value, gate = found.all("mega.attention")[1].args
    assert query == gate
    assert query not in (key, value)
    shapes = [(m, n) for m, _, n in found.dense if n in (2 * H, 4 * H)]
    assert (B * T, 4 * H) in shapes
    assert (B, 2 * H) in shapes


def _around(function):
    layers = {name: linear(EMBED, 8, seed) for seed, name in enumerate("qkvg")}
    return Around(function, **layers)


def test_a_gate_without_sigmoid_stays_apart() -> None:
    module = _around(lambda s, x: gated_attention(s.q(x), s.k(x), s.v(x), s.g(x), True))
    found = graph(module, off=ALONE)
    assert [n for _, _, n in found.dense] == [8, 24]
    query, key, value, gate = found.one("mega.attention").args
    assert query == key == value != gate
    run(module, off=ALONE)


def test_an_operand_that_something_else_reads_stays_apart() -> None:
    def function(s, x):
        v = s.v(x)
        return gated_attention(s.q(x), s.k(x), v, torch.sigmoid(s.g(x)), True) + v

    module = _around(function)
    found = graph(module, off=ALONE)
    assert sorted(n for _, _, n in found.dense) == [8, 24]
    run(module, off=ALONE)


def test_one_operand_in_two_places_stays_apart() -> None:
    def function(s, x):
        q = s.q(x)
        return gated_attention(q, q, s.v(x), torch.sigmoid(s.g(x)), True)

    module = _around(function)
    found = graph(module, off=ALONE)
    assert sorted(n for _, _, n in found.dense) == [8, 16]
    run(module, off=ALONE)


def test_operands_of_other_rows_stay_apart() -> None:
    module = _around(
        lambda s, x: gated_attention(s.q(x), s.k(-x), s.v(x), torch.sigmoid(s.g(x)), True)
    )
    found = graph(module, off=ALONE)
    assert sorted(n for _, _, n in found.dense) == [8, 24]
    run(module, off=ALONE)
