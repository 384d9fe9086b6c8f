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
    # merged projections, attention's output, gate and up, down of the first block; of the last
    # block only what every row needs
    wide = [size for size in before.dense if size[0] == 24 and min(size[1:]) >= 128]
    assert sizes == wide and len(sizes) >= 4
    assert after.dense == [size for size in before.dense if size not in wide]
    assert {len(call.args) for call in fast} == {3, 4}  # with and without a residual
    assert any(call.attrs["swiglu"] for call in fast)


def test_nothing_is_changed_unless_asked_for() -> None:
    assert "fast_products" not in OPTIONAL_PASSES
    graph = Graph(
        pipeline.graph_phase(imported(random_mega(hidden_size=256), (1, 24, EMBED)))["main"]
    )
    assert graph.count("mega.strassen_dense") == 0
