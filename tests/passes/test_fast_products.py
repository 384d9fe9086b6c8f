"""`fast_products`: which dense layers become those of Strassen's method."""

from __future__ import annotations

from mega_tvm import pipeline
from mega_tvm.passes import GRAPH_PASSES, OPTIONAL_PASSES
from mega_tvm.passes.fast_products import fast_products
from mega_tvm.relax_ops import shape_of
from tests.passes.harness import EMBED, Graph, imported, random_mega, rows


def test_wide_layers_of_many_rows_are_changed_and_no_others() -> None:
    mod = imported(random_mega(hidden_size=256), (1, 24, EMBED))
    before = Graph(pipeline.graph_phase(mod)["main"])
    after = Graph(pipeline.graph_phase(mod, passes=(*GRAPH_PASSES, fast_products))["main"])
    fast = after.all("mega.strassen_dense")
    sizes = [(rows(call), *shape_of(call.args[1])) for call in fast]
    # Of the first block; of the last block only what every row needs, which is narrow.
    output, gate_and_up, down = (24, 256, 256), (24, 256, 1376), (24, 688, 256)
    assert sizes == [output, gate_and_up, down]
    assert [len(call.args) for call in fast] == [4, 3, 4]
    assert after.dense == [size for size in before.dense if size not in sizes]


def test_operands_of_an_attention_stay() -> None:
    """Their rounding alone would take what the tolerance leaves."""
    mod = imported(random_mega(hidden_size=256), (1, 24, EMBED))
    after = Graph(pipeline.graph_phase(mod, passes=(*GRAPH_PASSES, fast_products))["main"])
    assert (24, 256, 768) in after.dense


def test_nothing_is_changed_unless_asked_for() -> None:
    assert "fast_products" not in OPTIONAL_PASSES
    graph = Graph(
        pipeline.graph_phase(imported(random_mega(hidden_size=256), (1, 24, EMBED)))["main"]
    )
    assert graph.count("mega.strassen_dense") == 0
