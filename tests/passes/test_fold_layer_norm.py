"""fold_layer_norm: gamma and beta vanish into the dense layers that read the norm."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mega_tvm.passes.rewrite import constant64
from tests.passes.harness import EMBED, Around, graph, linear, random_mega, run, without

ALONE = without("fold_layer_norm")


def norm(seed: int = 0) -> nn.LayerNorm:
    layer = nn.LayerNorm(EMBED)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for param in layer.parameters():
            param.uniform_(-2, 2, generator=generator)
    return layer


def affine(found) -> list[bool]:
    return [len(call.args) == 3 for call in found.all("mega.layer_norm")]


@pytest.mark.parametrize("form", ["plain", "axon-0.8.0"])
def test_only_the_final_norm_stays_affine(form) -> None:
    model = random_mega(layer_norm=form)
    on = graph(model, off=ALONE)
    assert affine(on) == [False] * 6 + [True]
    assert affine(graph(model, off=without())) == [True] * 7
    clamped = {bool(call.attrs["clamp_variance"]) for call in on.all("mega.layer_norm")}
    assert clamped == {form == "axon-0.8.0"}


def test_the_fold_is_in_float64() -> None:
    n, layer = norm(), linear(EMBED, 5)
    module = Around(lambda s, x: s.l(s.n(x)), n=n, l=layer)
    _, w, b = graph(module, off=ALONE).one("mega.dense").args
    gamma, beta, weight, bias = (
        p.detach().double().numpy() for p in (n.weight, n.bias, layer.weight, layer.bias)
    )
    np.testing.assert_array_equal(constant64(w), (gamma[:, None] * weight.T).astype(np.float32))
    np.testing.assert_array_equal(constant64(b), (beta @ weight.T + bias).astype(np.float32))


def test_readers_share_one_plain_norm() -> None:
    module = Around(
        lambda s, x: s.a(y := s.n(x)) * s.b(y), n=norm(), a=linear(EMBED, 5), b=linear(EMBED, 5, 1)
    )
    assert affine(graph(module, off=ALONE)) == [False]
    run(module, off=ALONE)


def test_a_reader_that_is_no_dense_keeps_the_affine_form() -> None:
    module = Around(lambda s, x: s.l(y := s.n(x)) + y, n=norm(), l=linear(EMBED, EMBED))
    assert sorted(affine(graph(module, off=ALONE))) == [False, True]
    run(module, off=ALONE)


def test_a_norm_behind_a_dense_is_left_alone() -> None:
    module = Around(lambda s, x: s.n(s.l(x)), n=norm(), l=linear(EMBED, EMBED))
    assert affine(graph(module, off=ALONE)) == [True]
    run(module, off=ALONE)
