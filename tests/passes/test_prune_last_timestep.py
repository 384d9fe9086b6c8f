"""prune_last_timestep: what never reaches the last timestep is not computed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from mega_tvm.relax_ops import shape_of
from reference import MegaConfig
from reference.ops import gated_attention
from reference.torch_mega import build_mega_block
from tests.passes.harness import (
    EMBED,
    WIDTH,
    Around,
    B,
    T,
    constant,
    graph,
    linear,
    random_mega,
    rows,
    run,
    without,
)  # fmt: skip

ALONE = without("prune_last_timestep")
WHOLE, LAST = B * T, B


def dense_rows(found) -> list[int]:
    return [rows(call) for call in found.all("mega.dense")]


@pytest.mark.parametrize("laplace", [False, True], ids=["softmax", "laplace"])
def test_the_last_block_computes_one_row(laplace) -> None:
    """All rows: the input projection, a whole block, the EMA's two products, keys and values."""
    model = random_mega(laplace_attention=laplace)
    on = graph(model, off=ALONE)
    assert dense_rows(graph(model, off=without())) == [WHOLE] * (1 + 2 * 10)
    assert sorted(dense_rows(on)) == [LAST] * 6 + [WHOLE] * (1 + 10 + 2 + 2)
    first, last = on.all("mega.attention")
    assert [shape_of(arg)[1] for arg in first.args] == [T, T, T, T]
    assert [shape_of(arg)[1] for arg in last.args] == [1, T, T, 1]
    assert [rows(norm) for norm in on.all("mega.layer_norm")] == [WHOLE] * 5 + [LAST] * 2


def test_with_all_passes_no_product_of_the_last_attention_has_all_rows() -> None:
    """Softmax: keys are the rows themselves, and values are projected behind the attention."""
    found = graph(random_mega(num_layers=1))
    assert found.dense == [
        (WHOLE, EMBED, WIDTH),
        (WHOLE, WIDTH, 3),
        (WHOLE, 3, WIDTH),
        *[(LAST, WIDTH, WIDTH)] * 4,  # query, gate, values, out
        (LAST, WIDTH, 2 * 112),
        (LAST, 112, WIDTH),
    ]


def test_one_timestep_leaves_nothing_to_prune() -> None:
    model = random_mega()
    shape = (B, 1, EMBED)
    assert dense_rows(graph(model, shape, ALONE)) == dense_rows(graph(model, shape, without()))


ROWWISE = {
    "linear": lambda s, x: s.l(x),
    "norm": lambda s, x: s.n(s.l(x)),
    "gelu": lambda s, x: nn.functional.gelu(s.l(x)),
    "clip": lambda s, x: s.l(x).clip(-0.1, 0.3),
    "two_inputs": lambda s, x: s.l(x) * torch.tanh(s.m(x)),
    "same_position": lambda s, x: s.l(x) + s.row,
    "broadcast_over_time": lambda s, x: s.l(x) + s.m(x)[:, :1],
}


def _around(function):
    return Around(
        lambda s, x: function(s, x)[:, -1],
        l=linear(EMBED, 8), m=linear(EMBED, 8, 1), n=nn.LayerNorm(8),
        row=constant(1, 1, 8), positions=constant(T, 8),
    )  # fmt: skip


@pytest.mark.parametrize("name", list(ROWWISE))
def test_rowwise_operators_let_the_slice_pass(name) -> None:
    module = _around(ROWWISE[name])
    found = graph(module, off=ALONE)
    assert LAST in dense_rows(found)
    run(module)


STOPS = {
    "over_time": lambda s, x: s.l(x).flip(1),
    "mean_over_time": lambda s, x: s.l(x) - s.l(x).mean(1, keepdim=True),
    "positions": lambda s, x: s.l(x) + s.positions,
    "another_rank": lambda s, x: s.l(x) * s.l(x).mean(0),
    "regrouped": lambda s, x: s.l(x).reshape(B, T * 2, 4),
}


@pytest.mark.parametrize("name", list(STOPS))
def test_it_stops_at_what_depends_on_other_timesteps(name) -> None:
    module = _around(STOPS[name])
    found = graph(module, off=ALONE)
    assert WHOLE in dense_rows(found)
    run(module)


READ_WHOLE = {
    "mean_over_time": lambda s, x: s.a(s.p(x)).mean(1),
    "next_to_last": lambda s, x: s.a(s.p(x))[:, -2],
    "last_two": lambda s, x: s.a(s.p(x))[:, -2:],
    "last_and_mean": lambda s, x: torch.cat([(y := s.a(s.p(x)))[:, -1], y.mean(1)], -1),
}


@pytest.mark.parametrize("name", list(READ_WHOLE))
def test_a_block_of_which_more_is_read_is_computed_whole_and_once(name) -> None:
    block = build_mega_block(MegaConfig(EMBED, hidden_size=8, ema_dim=3), 1, init="axon", seed=0)
    module = Around(READ_WHOLE[name], p=linear(EMBED, 8), a=block)
    assert dense_rows(graph(module, off=ALONE)) == [WHOLE] * 11
    run(module)


def test_an_attention_that_is_also_returned_whole_is_computed_once() -> None:
    def function(s, x):
        y = gated_attention(s.q(x), s.k(x), s.v(x), torch.sigmoid(s.g(x)), False)
        return torch.cat([s.o(y)[:, -1], y.sum(1)], -1)

    layers = {name: linear(EMBED, 8, seed) for seed, name in enumerate("qkvg")}
    module = Around(function, **layers, o=linear(8, 8))
    found = graph(module, off=ALONE)
    assert shape_of(found.one("mega.attention")) == (B, T, 8)
    assert dense_rows(found) == [WHOLE] * 4 + [LAST]  # of the head, the last row alone
    run(module)
