"""carry_state: which functions can go on from a state, and what they become."""

from __future__ import annotations

import pytest
import torch
import tvm

from mega_tvm.passes.canonicalize import canonicalize
from mega_tvm.passes.carry_state import mark, states_of, streaming_problem
from mega_tvm.pipeline import graph_phase
from reference.ops import gated_attention
from tests.passes.harness import EMBED, Around, Graph, imported, linear, random_mega

SHAPE = (2, 5, EMBED)


def _canonical(module: torch.nn.Module) -> tvm.IRModule:
    return canonicalize(imported(module, SHAPE))


def _extended(off=()) -> tvm.IRModule:
    function = mark(_canonical(random_mega())["main"].with_attr("global_symbol", "main"))
    return graph_phase(tvm.IRModule({"main": function}), off)


def test_each_layer_has_a_moving_average_and_a_cache() -> None:
    mod = _extended()
    assert (
        states_of(mod)["main"]
        == [
            {"kind": "ema", "width": 16},
            {"kind": "cache", "width": 48},
        ]
        * 2
    )
    graph = Graph(mod["main"])
    assert graph.count("mega.attention") == 0
    assert [len(call.args) for call in graph.all("mega.ema_scan")] == [3, 3]
    # Queries, keys that are the values too, lengths and cache.
    assert [len(call.args) for call in graph.all("mega.cached_attention")] == [4, 4]


@pytest.mark.parametrize("off", ["merge_query_key", "reassociate_values"])
def test_without_a_rewrite_keys_and_values_are_both_kept(off) -> None:
    mod = _extended([off])
    assert [state["width"] for state in states_of(mod)["main"]] == [16, 96, 16, 96]
    assert [len(c.args) for c in Graph(mod["main"]).all("mega.cached_attention")] == [5, 5]


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        (lambda s, x: s.a(x).mean(1), "mean does not treat timesteps alone"),
        (lambda s, x: s.a(x), "more than the last timestep"),
        (lambda s, x: (s.a(x) - s.a(x)[:, -1:])[:, -1], "does not treat timesteps alone"),
        (lambda s, x: s.a(x.flip(1))[:, -1], "does not treat timesteps alone"),
        (
            lambda s, x: gated_attention(s.a(x), s.a(x), s.a(x), torch.sigmoid(s.a(x)), True)[
                :, -1
            ],
            "not causal",
        ),
    ],
    ids=["mean", "all", "last_row_to_all", "reversed", "laplace"],
)
def test_what_mixes_timesteps_is_refused(function, problem) -> None:
    module = Around(function, a=linear(EMBED, EMBED))
    assert problem in str(streaming_problem(_canonical(module)["main"]))


def test_heads_are_no_problem() -> None:
    module = torch.nn.Sequential(random_mega(), linear(40, 3))
    assert streaming_problem(_canonical(module)["main"]) is None
