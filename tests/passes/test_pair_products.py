"""`pair_products`: which dense layers get scaled weights, and that these compute the same."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from mega_tvm import pipeline
from mega_tvm.passes import GRAPH_PASSES
from mega_tvm.passes.pair_products import pair_products
from mega_tvm.relax_ops import shape_of
from mega_tvm.targets import resolve_target
from tests.passes.harness import EMBED, Around, Graph, imported, linear, random_mega, rows


def _after(module: nn.Module, shape: tuple[int, ...]) -> Graph:
    passes = (*GRAPH_PASSES, pair_products)
    return Graph(pipeline.graph_phase(imported(module, shape), passes=passes)["main"])


def _paired(graph: Graph) -> list[tuple[int, ...]]:
    calls = [call for call in graph.all("mega.dense") if call.attrs["paired"]]
    assert all(shape_of(call.args[2])[0] == 3 for call in calls)
    return [(rows(call), *shape_of(call.args[1])) for call in calls]


def test_wide_layers_are_changed_and_no_others() -> None:
    """The last timestep's layers too: other entries run them on many rows."""
    graph = _after(random_mega(hidden_size=256), (1, 24, EMBED))
    block = [(24, 256, 768), (24, 256, 256), (24, 256, 1376), (24, 688, 256)]
    assert [size for size in _paired(graph) if size[0] == 24] == block
    small = {(24, EMBED, 256), (24, 256, 3), (24, 3, 256)}
    assert small <= set(graph.dense)


def test_small_models_stay() -> None:
    assert _paired(_after(random_mega(), (1, 24, EMBED))) == []


def test_what_reads_the_input_stays() -> None:
    """In the user's units, whatever stands between that is no layer; the next layer is changed."""

    def function(layers: Around, x: torch.Tensor) -> torch.Tensor:
        return layers.second(layers.first(torch.relu(x * 2)))

    model = Around(function, first=linear(200, 150), second=linear(150, 140))
    assert _paired(_after(model, (2, 7, 200))) == [(14, 150, 140)]


def test_scaled_weights_are_the_same_weights() -> None:
    mod, model = None, random_mega(hidden_size=256)
    mod = imported(model, (1, 24, EMBED))
    before = Graph(pipeline.graph_phase(mod)["main"]).all("mega.dense")
    after = _after(model, (1, 24, EMBED)).all("mega.dense")
    assert any(call.attrs["paired"] for call in after)
    for old, new in zip(before, after, strict=True):
        w, b = (np.asarray(constant.value.numpy()) for constant in new.args[1:3])
        if new.attrs["paired"]:
            w, b = w * b[1], b[0]
        np.testing.assert_array_equal(w, old.args[1].value.numpy())
        np.testing.assert_array_equal(b, old.args[2].value.numpy())


def test_the_pass_is_for_machines_where_pairs_pay(monkeypatch) -> None:
    def names(target: str) -> list[str]:
        return [p.info.name for p in pipeline.passes_of(resolve_target(target), "float32", 1)]

    for pays in (True, False):
        monkeypatch.setattr(pipeline, "pairs_pay", lambda target, pays=pays: pays)
        assert ("pair_products" in names("native")) == pays
        assert "pair_products" not in names("x86-64-v4")
