"""canonicalize: from imported operators to Mega's, with nothing else on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mega_tvm.errors import UnsupportedModelError
from mega_tvm.frontend.torch import import_module
from mega_tvm.passes import OPTIONAL_PASSES
from mega_tvm.passes.rewrite import to_constant
from mega_tvm.pipeline import graph_phase
from mega_tvm.relax_ops import shape_of
from tests.passes.harness import (
    EMBED,
    SHAPE,
    Around,
    T,
    constant,
    graph,
    imported,
    linear,
    random_mega,
    run,
)  # fmt: skip

H = 16
ALL = OPTIONAL_PASSES


def test_a_mega_becomes_megas_operators() -> None:
    found = graph(random_mega(), off=ALL)
    layers = 2
    assert found.count("mega.dense") == 1 + 10 * layers  # EMA 2, attention 5, FFN 3
    assert found.count("mega.layer_norm") == 3 * layers + 1
    assert found.count("mega.ema_scan") == layers
    assert found.count("mega.attention") == layers
    assert found.count("mega.last_timestep") == 1
    others = set(found.names) - {n for n in found.names if n.startswith("mega.")}
    assert others == {"add", "multiply", "sigmoid", "reshape"}
    assert found.count("reshape") == 1  # [B, 1, H] to [B, H], at the end


@pytest.mark.parametrize("shape", [(2, EMBED), SHAPE, (2, 3, 4, EMBED)], ids=lambda s: f"{len(s)}d")
def test_a_linear_layer_is_one_dense(shape) -> None:
    """With its bias, whatever reshapes the importer puts around."""
    layer = linear(EMBED, H)
    assert graph(layer, shape, ALL).names == ["mega.dense"]
    run(layer, shape, ALL)


def test_a_linear_layer_without_bias_is_one_dense() -> None:
    layer = nn.Linear(EMBED, H, bias=False)
    assert graph(layer, SHAPE, ALL).names == ["mega.dense"]
    run(layer, SHAPE, ALL)


@pytest.mark.parametrize("size", [(1,), (), (H,)], ids=str)
def test_a_second_bias_joins_the_first(size) -> None:
    module = Around(lambda s, x: s.c + s.l(x), l=linear(EMBED, H), c=constant(*size))
    assert graph(module, SHAPE, ALL).names == ["mega.dense"]
    run(module, SHAPE, ALL)


ADDENDS = {
    "per_row": (lambda s, x: s.l(x) + s.c, constant(T, 1)),
    "per_element": (lambda s, x: s.l(x) + s.c, constant(T, H)),
    "widening": (lambda s, x: s.narrow(x) + s.c, constant(5)),
}


@pytest.mark.parametrize("name", list(ADDENDS))
def test_an_addend_that_is_no_bias_stays(name) -> None:
    function, addend = ADDENDS[name]
    module = Around(function, l=linear(EMBED, H), narrow=linear(EMBED, 1), c=addend)
    assert graph(module, SHAPE, ALL).names == ["mega.dense", "add"]
    run(module, SHAPE, ALL)


def test_a_product_that_is_read_twice_keeps_both_values() -> None:
    def function(s, x):
        y = x @ s.w
        return (y + s.c) * y

    module = Around(function, w=constant(EMBED, H), c=constant(H))
    assert graph(module, SHAPE, ALL).names == ["mega.dense", "add", "multiply"]
    run(module, SHAPE, ALL)


def test_layer_norm_over_the_last_axis() -> None:
    module = nn.LayerNorm(EMBED, eps=1e-3)
    norm = graph(module, SHAPE, ALL).one("mega.layer_norm")
    assert float(norm.attrs["eps"]) == 1e-3
    run(module, SHAPE, ALL)


def test_layer_norm_without_affine_part() -> None:
    module = nn.LayerNorm(EMBED, elementwise_affine=False)
    assert graph(module, SHAPE, ALL).count("mega.layer_norm") == 1
    run(module, SHAPE, ALL)


def test_layer_norm_over_two_axes_stays_tvms() -> None:
    module = nn.LayerNorm([T, EMBED])
    assert graph(module, SHAPE, ALL).count("mega.layer_norm") == 0
    run(module, SHAPE, ALL)


# Slices. TVM's take in its fast mode reads out of bounds with a negative index.
SLICES = {
    "[:, 0]": lambda x: x[:, 0],
    "[:, -2]": lambda x: x[:, -2],
    "[:, -7]": lambda x: x[:, -7],
    "[:, 6]": lambda x: x[:, 6],
    "[:, -1]": lambda x: x[:, -1],
    "[:, -1:]": lambda x: x[:, -1:],
    "[:, -3:-1]": lambda x: x[:, -3:-1],
    "[:, [-1, 0, -2]]": lambda x: x[:, [-1, 0, -2]],
    "[-1]": lambda x: x[-1],
    "[..., -1]": lambda x: x[..., -1],
    "[..., -1, :]": lambda x: x[..., -1, :],
    "[0, -1, 3]": lambda x: x[0, -1, 3].reshape(1),
    "[:, :, 2][:, -1]": lambda x: x[:, :, 2][:, -1],
}
LAST = {"[:, 6]", "[:, -1]", "[..., -1, :]"}


@pytest.mark.parametrize("name", list(SLICES))
def test_slices(name) -> None:
    module = Around(lambda s, x: SLICES[name](s.l(x)), l=linear(EMBED, H))
    assert graph(module, SHAPE, ALL).count("mega.last_timestep") == (name in LAST)
    run(module)


def test_the_last_column_of_a_matrix_is_no_timestep() -> None:
    """Nothing may slice the layer norm's input to its last column."""
    module = Around(lambda s, x: s.n(s.m(x))[:, -1], m=random_mega(), n=nn.LayerNorm(40))
    assert graph(module, off=ALL).count("mega.last_timestep") == 1  # the Mega's own
    run(module)


# Other types keep TVM's operators: Mega's are float32.
TYPES = {
    "int64": lambda s, x: s.l(x).argmax(-1, keepdim=True)[:, -1].to(x.dtype),
    "float64": lambda s, x: s.l(x).double()[:, -1].to(x.dtype),
    "float64_product": lambda s, x: (s.l(x).double() @ s.w64).to(x.dtype),
}


@pytest.mark.parametrize("name", list(TYPES))
def test_other_types(name) -> None:
    weights = nn.Parameter(constant(H, 5).detach().double())
    module = Around(TYPES[name], l=linear(EMBED, H), w64=weights)
    found = graph(module, off=ALL)
    assert found.count("mega.dense") == 1
    assert found.count("mega.last_timestep") == 0
    run(module)


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda y: y.argmax(-1), "int64"),
        (lambda y: y.double(), "float64"),
        (lambda y: y > 0, "bool"),
    ],
    ids=["int64", "float64", "bool"],
)
def test_an_output_of_another_type_is_refused(convert, dtype) -> None:
    module = Around(lambda s, x: convert(s.l(x)), l=linear(EMBED, H))
    with pytest.raises(UnsupportedModelError, match=f"must return a float32 tensor; .* {dtype}"):
        import_module(module, SHAPE)


def test_operators_on_constants_are_computed() -> None:
    def function(s, x):
        scale = torch.exp(-s.a) * torch.sigmoid(s.b) / (s.c * s.c + 1.0)
        return s.l(x) * scale

    module = Around(
        function, l=linear(EMBED, H), a=constant(H), b=constant(H, seed=1), c=constant(H, seed=2)
    )
    found = graph(module, SHAPE, ALL)
    assert found.names == ["mega.dense", "multiply"]
    run(module, SHAPE, ALL)


def test_constants_keep_their_rank() -> None:
    for value in (np.float32(2), np.zeros((1,), np.float32), np.zeros((2, 3), np.float64).T):
        assert shape_of(to_constant(np.asarray(value))) == np.shape(value)


def test_the_module_that_came_is_not_changed() -> None:
    module = imported(random_mega(), SHAPE)
    before = module.script(show_meta=True)
    graph_phase(module)
    assert module.script(show_meta=True) == before
