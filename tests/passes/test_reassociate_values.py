"""reassociate_values: where one query row is left, values are projected behind the attention."""

from __future__ import annotations

import torch

from mega_tvm.relax_ops import shape_of
from reference.ops import gated_attention
from tests.passes.harness import (
    EMBED,
    Around,
    B,
    T,
    graph,
    linear,
    random_mega,
    rows,
    run,
    without,
)  # fmt: skip

PRUNED = without("prune_last_timestep")
BOTH = without("prune_last_timestep", "reassociate_values")


def test_values_of_the_last_block_are_projected_after() -> None:
    model = random_mega()
    off, on = graph(model, off=PRUNED), graph(model, off=BOTH)
    assert off.values[off.all("mega.attention")[1].args[2]].op.name == "relax.mega.dense"
    attention = on.all("mega.attention")[1]
    assert on.values[attention.args[2]].op.name == "relax.mega.layer_norm"
    assert len(attention.args) == 3  # the gate moved behind the projection
    (var,) = [v for v, value in on.bindings if value.same_as(attention)]
    (projection,) = [call for call in on.all("mega.dense") if call.args[0] == var]
    assert rows(projection) == B
    whole = [sum(m == B * T for m, _, _ in found.dense) for found in (off, on)]
    assert whole[0] - whole[1] == 1
    assert len(off.dense) == len(on.dense)


def test_blocks_with_all_rows_are_left_alone() -> None:
    """There the values' product would be the same size, and the gate would leave the attention."""
    on = graph(random_mega(), off=BOTH)
    first = on.all("mega.attention")[0]
    assert on.values[first.args[2]].op.name == "relax.mega.dense"
    assert len(first.args) == 4


def test_one_timestep_is_left_alone() -> None:
    found = graph(random_mega(), (B, 1, EMBED), BOTH)
    assert [len(call.args) for call in found.all("mega.attention")] == [4, 4]


def test_laplace_attention_is_left_alone() -> None:
    """Its weights may sum to far less than one, where 1e-8 counts."""
    model = random_mega(laplace_attention=True)
    assert graph(model, off=BOTH).dense == graph(model, off=PRUNED).dense


def test_values_that_something_else_reads_stay() -> None:
    def function(s, x):
        v = s.v(x)
        y = gated_attention(s.q(x), s.k(x), v, torch.sigmoid(s.g(x)), False)
        return torch.cat([y[:, -1], v.mean(1)], -1)

    layers = {name: linear(EMBED, 8, seed) for seed, name in enumerate("qkvg")}
    module = Around(function, **layers)
    attention = graph(module, off=BOTH).one("mega.attention")
    assert len(attention.args) == 4
    run(module)


def test_values_wider_than_their_rows() -> None:
    """The attention's width follows the rows that it now mixes."""

    def function(s, x):
        return gated_attention(s.q(x), s.k(x), s.v(x), torch.sigmoid(s.g(x)), False)[:, -1]

    layers = {name: linear(EMBED, 24, seed) for seed, name in enumerate("qkvg")}
    module = Around(function, **layers)
    attention = graph(module, off=BOTH).one("mega.attention")
    assert shape_of(attention) == (B, 1, EMBED)
    run(module)
