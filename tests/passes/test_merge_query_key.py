"""merge_query_key: softmax attention's key projection vanishes into the query's."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from mega_tvm.passes.rewrite import constant64
from mega_tvm.relax_ops import shape_of
from reference.ops import gated_attention
from tests.passes.harness import (
    EMBED,
    SHAPE,
    WIDTH,
    Around,
    B,
    T,
    constant,
    graph,
    linear,
    random_mega,
    run,
    without,
)  # fmt: skip

ALONE = without("merge_query_key")


def test_there_is_no_key_product() -> None:
    model = random_mega()
    off, on = graph(model, off=without()), graph(model, off=ALONE)
    assert off.count("mega.dense") - on.count("mega.dense") == 2  # one a layer
    for attention in on.all("mega.attention"):
        query, key = attention.args[:2]
        assert on.values[key].op.name == "relax.mega.layer_norm"
        assert on.values[query].args[0] == key  # the queries are projected from the keys' rows
        assert float(attention.attrs["scale"]) == 1.0
    for attention in off.all("mega.attention"):
        assert off.values[attention.args[1]].op.name == "relax.mega.dense"
        assert float(attention.attrs["scale"]) == 1 / np.sqrt(WIDTH)


def test_the_merged_weights_are_computed_in_float64() -> None:
    model = random_mega(num_layers=1)
    found = graph(model, off=ALONE)
    query = found.values[found.one("mega.attention").args[0]]
    wq, bq, wk = (
        model.get_parameter(f"mega_block_1_gattn_{name}").detach().double().numpy()
        for name in ("q.kernel", "q.bias", "k.kernel")
    )
    scale = 1 / np.sqrt(WIDTH)
    expected = (scale * wq @ wk.T).astype(np.float32)
    np.testing.assert_array_equal(constant64(query.args[1]), expected)
    expected = (scale * bq @ wk.T).astype(np.float32)
    np.testing.assert_array_equal(constant64(query.args[2]), expected)


def test_laplace_attention_is_left_alone() -> None:
    model = random_mega(laplace_attention=True)
    assert graph(model, off=ALONE).dense == graph(model, off=without()).dense


@pytest.mark.parametrize("off", [ALONE, without(), ()], ids=["alone", "off", "all_passes"])
def test_ill_conditioned_weights(off) -> None:
    """Singular values of Wq and Wk from 3 to 3e-6, against float64 within the usual tolerance."""
    width = 16
    model = copy.deepcopy(random_mega(num_layers=1, hidden_size=width))
    rng = np.random.default_rng(3)
    with torch.no_grad():
        for part in "qk":
            u, v = (np.linalg.qr(rng.standard_normal((width, width)))[0] for _ in "uv")
            kernel = u * np.geomspace(3, 3e-6, width) @ v
            assert np.linalg.cond(kernel) == pytest.approx(1e6, rel=1e-3)
            model.get_parameter(f"mega_block_1_gattn_{part}.kernel").copy_(torch.tensor(kernel))
    run(model, off=off)


def _around(function, rows=EMBED, width=8):
    layers = {name: linear(rows, width, seed) for seed, name in enumerate("qkvg")}
    return Around(function, **layers, c=constant(width))


def _keys_are_values(s, x):
    k = s.k(x)
    return gated_attention(s.q(x), k, k, torch.sigmoid(s.g(x)), False)


def _queries_are_returned(s, x):
    q = s.q(x)
    return gated_attention(q, s.k(x), s.v(x), torch.sigmoid(s.g(x)), False) + q


def _rows_are_wider(s, x):
    return gated_attention(s.q(x), s.k(x), s.v(x), torch.sigmoid(s.g(x)), False)


def _from_other_rows(s, x):
    x = x[..., :8]
    return gated_attention(s.q(x), s.k(x * s.c), s.v(x), torch.sigmoid(s.g(x)), False)


def _keys_are_no_dense(s, x):
    x = x[..., :8]
    return gated_attention(s.q(x), torch.tanh(s.k(x)), s.v(x), torch.sigmoid(s.g(x)), False)


@pytest.mark.parametrize(
    ("function", "rows", "width"),
    [
        (_keys_are_values, 13, 13),
        (_queries_are_returned, 13, 13),
        (_rows_are_wider, 13, 8),
        (_from_other_rows, 8, 8),
        (_keys_are_no_dense, 8, 8),
    ],
    ids=lambda v: v.__name__.lstrip("_") if callable(v) else "",
)
def test_where_it_must_not_apply(function, rows, width) -> None:
    module = _around(function, rows, width)
    off, on = graph(module, off=without()), graph(module, off=ALONE)
    assert on.dense == off.dense
    run(module)


def test_a_user_modules_attention_is_merged() -> None:
    module = _around(_rows_are_wider, 13, 13)
    found = graph(module, SHAPE, ALONE)
    assert found.count("mega.dense") == 3
    assert shape_of(found.one("mega.attention")) == (B, T, 13)
    run(module)
