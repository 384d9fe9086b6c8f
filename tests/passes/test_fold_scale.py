"""fold_scale: a constant scale of a dense output vanishes into its weights."""

from __future__ import annotations

import numpy as np
import pytest

from mega_tvm.passes.rewrite import constant64
from tests.passes.harness import (
    EMBED,
    SHAPE,
    Around,
    T,
    constant,
    graph,
    linear,
    random_mega,
    run,
    without,
)  # fmt: skip

ALONE = without("fold_scale")


def test_the_gain_of_the_moving_average_vanishes() -> None:
    """(1 - a) of each layer; what is left multiplies the FFN's gate: silu, and its product."""
    model = random_mega()
    off, on = graph(model, off=without()), graph(model, off=ALONE)
    assert off.count("multiply") - on.count("multiply") == 2
    for scan in on.all("mega.ema_scan"):
        assert on.values[scan.args[0]].op.name == "relax.mega.dense"
    for scan in off.all("mega.ema_scan"):
        assert off.values[scan.args[0]].op.name == "relax.multiply"


def test_weights_and_bias_are_scaled_in_float64() -> None:
    layer, scale = linear(EMBED, 5), constant(5)
    module = Around(lambda s, x: s.c * s.l(x), l=layer, c=scale)
    _, w, b = graph(module, off=ALONE).one("mega.dense").args
    c = scale.detach().double().numpy()
    weight, bias = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    np.testing.assert_array_equal(constant64(w), (weight.T * c).astype(np.float32))
    np.testing.assert_array_equal(constant64(b), (bias * c).astype(np.float32))


@pytest.mark.parametrize("size", [(5,), (1,), ()], ids=str)
def test_scales_that_fold(size) -> None:
    module = Around(lambda s, x: s.l(x) * s.c, l=linear(EMBED, 5), c=constant(*size))
    assert graph(module, off=ALONE).names == ["mega.dense"]
    run(module, off=ALONE)


def _read_twice(s, x):
    y = s.l(x)
    return y * s.c + y


STAYS = {
    "per_row": (lambda s, x: s.l(x) * s.c, (T, 1)),
    "per_element": (lambda s, x: s.l(x) * s.c, (T, 5)),
    "read_twice": (_read_twice, (5,)),
    "not_constant": (lambda s, x: s.l(x) * x[..., :5], (5,)),
}


@pytest.mark.parametrize("name", list(STAYS))
def test_scales_that_stay(name) -> None:
    function, size = STAYS[name]
    module = Around(function, l=linear(EMBED, 5), c=constant(*size))
    found = graph(module, SHAPE, ALONE)
    assert (found.count("mega.dense"), found.count("multiply")) == (1, 1)
    run(module, off=ALONE)


def test_a_row_scale_of_a_square_output_is_no_column_scale() -> None:
    """T = N: only the rank tells the two apart."""
    module = Around(lambda s, x: s.l(x) * s.c, l=linear(EMBED, T), c=constant(T, 1))
    assert graph(module, off=ALONE).count("multiply") == 1
    run(module, off=ALONE)
